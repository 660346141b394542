// SPDX-License-Identifier: Apache-2.0
#include "configuration.hpp"

#include "command.hpp"
#include "output.hpp"

#include <restkv/presets.hpp>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <type_traits>

namespace restkv::cli {

namespace {

using nlohmann::json;

std::string joined(const std::vector<std::string>& texts) {
  std::string line;
  for (const std::string& text : texts) line += (line.empty() ? "" : ", ") + text;
  return line;
}

template <class Enum>
std::string known_names() {
  std::string line;
  for (const char* name : names<Enum>::values) line += std::string(line.empty() ? "" : ", ") + name;
  return line;
}

std::string shown(const json& value) {
  std::string text = one_line(value.dump(-1, ' ', false, json::error_handler_t::replace));
  if (text.size() > 60) text = text.substr(0, 60) + "...";
  return text;
}

/// Reads one value into a member; throws with the key's name, the value and what is needed.
template <class Member>
void read_value(const key_facts& key, const json& value, Member& member, const std::string& where) {
  const auto reject = [&](const std::string& needed) {
    return input_error(fmt::format("{}: {} is {}, {}", where, key.name, shown(value), needed));
  };
  if constexpr (std::is_enum_v<Member>) {
    const std::string known = known_names<Member>();
    if (!value.is_string()) throw reject("must be one of " + known);
    for (std::size_t i = 0; i < names<Member>::values.size(); ++i) {
      if (value.get_ref<const std::string&>() == names<Member>::values[i]) {
        member = static_cast<Member>(i);
        return;
      }
    }
    const bool is_method = std::is_same_v<Member, method_kind>;
    throw reject(
        fmt::format("which is not {}: {}", is_method ? "supported; supported are" : "known; known are", known));
  } else if constexpr (std::is_same_v<Member, bool>) {
    if (!value.is_boolean()) throw reject("must be true or false");
    member = value.get<bool>();
  } else if constexpr (std::is_floating_point_v<Member>) {
    if (!value.is_number()) throw reject("must be a number");
    const auto number = static_cast<Member>(value.get<double>());
    if (!std::isfinite(number)) throw reject("must be a finite number");
    member = number;
  } else {
    const bool fits = value.is_number_unsigned()
                          ? std::in_range<Member>(value.get<std::uint64_t>())
                          : value.is_number_integer() && std::in_range<Member>(value.get<std::int64_t>());
    if (!fits) {
      throw reject(fmt::format("must be a whole number within [{}, {}]", std::numeric_limits<Member>::min(),
                               std::numeric_limits<Member>::max()));
    }
    member = value.get<Member>();
  }
}

}  // namespace

method_kind method_in(const json& object, const std::string& where) {
  method_kind method = method_kind::restkv;
  if (const auto at = object.find("method"); at != object.end()) {
    read_value(key_facts{"method", "", ""}, *at, method, where);
  }
  return method;
}

namespace {

// From the parts of a policy of the library back to keys.
void take(configuration& c, const rest_kv& score) {
  c.method = method_kind::restkv;
  c.order = score.order;
  c.use_wo = score.metric_of_distance == metric::projection;
  c.use_norm = score.normalised;
  c.tau = score.tau;
}
void take(configuration& c, const caote&) {
  c.method = method_kind::caote;
  c.use_wo = false;
}
void take(configuration& c, const fast_caote&) {
  c.method = method_kind::fastcaote;
  c.use_wo = false;
}
void take(configuration& c, const snap_kv&) { c.method = method_kind::snapkv; }
void take(configuration& c, const observed_attention&) { c.method = method_kind::h2o; }
void take(configuration& c, const keyformer& score) {
  c.method = method_kind::keyformer;
  c.temperature = score.temperature;
  c.seed = score.seed;
}
void take(configuration& c, const vatp&) { c.method = method_kind::vatp; }
void take(configuration& c, const drop_kv& score) {
  c.method = method_kind::dropkv;
  c.epsilon = score.epsilon;
}
void take(configuration& c, const ob_cache& score) {
  c.method = method_kind::obcache;
  c.part = score.part;
}
void take(configuration& c, const la_prox& score) {
  c.method = method_kind::laprox;
  c.use_wo = score.metric_of_distance == metric::projection;
}
void take(configuration& c, const an_d_pro& score) {
  c.method = method_kind::andpro;
  c.use_wo = score.metric_of_distance == metric::projection;
}
void take(configuration& c, const defensive_kv& score) {
  c.method = method_kind::defensivekv;
  c.attention_pool = score.attention_pool;
}
void take(configuration& c, const knorm&) { c.method = method_kind::knorm; }
void take(configuration& c, const key_diff&) { c.method = method_kind::keydiff; }
void take(configuration& c, const lag_kv& score) {
  c.method = method_kind::lagkv;
  c.lag_size = score.lag;
  c.cross_scoring = score.cross_scoring;
}
void take(configuration& c, const cur_dkv& score) {
  c.method = method_kind::curdkv;
  c.leverage_type = score.leverage;
  c.local_window_size = score.local_window;
}
void take(configuration& c, const leverage_score& score) {
  c.method = method_kind::leverage;
  c.sketch = score.sketch;
  c.ridge = score.ridge;
}
void take(configuration& c, const value_range&) { c.method = method_kind::valuerange; }
void take(configuration& c, const expected_attention& score) {
  c.method = method_kind::expectedattention;
  c.use_covariance = score.use_covariance;
  c.use_vnorm = score.use_value_norm;
  c.epsilon = static_cast<float>(score.epsilon);
}
void take(configuration& c, const cap_kv& score) {
  c.method = method_kind::capkv;
  c.tau = static_cast<float>(score.tau);
  c.cosine = score.cosine;
}
void take(configuration& c, const q_filter&) { c.method = method_kind::qfilter; }
void take(configuration& c, const streaming_llm&) { c.method = method_kind::streamingllm; }
void take(configuration& c, const random_score& score) {
  c.method = method_kind::random;
  c.seed = score.seed;
}
void take(configuration& c, const mean&) { c.temporal = temporal_kind::mean; }
void take(configuration& c, const sum&) { c.temporal = temporal_kind::sum; }
void take(configuration& c, const ema& temporal) {
  c.temporal = temporal_kind::ema;
  c.alpha = temporal.alpha;
}
void take(configuration& c, const last&) { c.temporal = temporal_kind::last; }
void take(configuration& c, const maximum&) { c.temporal = temporal_kind::max; }
void take(configuration& c, const root_sum_square&) { c.temporal = temporal_kind::root_sum_square; }
void take(configuration& c, const no_pool&) { c.spatial = spatial_kind::none; }
void take(configuration& c, const average_pool& spatial) {
  c.spatial = spatial_kind::avgpool;
  c.kernel = spatial.width;
}
void take(configuration& c, const max_pool& spatial) {
  c.spatial = spatial_kind::maxpool;
  c.kernel = spatial.width;
}
void take(configuration& c, const adaptive_window& spatial) {
  c.spatial = spatial_kind::adaptive;
  c.kernel = spatial.min_width;
  c.scale = spatial.scale;
  c.shift_rule = spatial.shift_rule;
}
void take(configuration&, const no_rescoring&) {}
// A rescoring that names the method.
void take(configuration& c, const critical_kv<>& rescoring) {
  c.method = method_kind::criticalkv;
  c.rescoring = rescoring_kind::criticalkv;
  c.first_stage_ratio = rescoring.first_stage;
  c.epsilon = rescoring.epsilon;
}
void take(configuration& c, const caote_rescoring& rescoring) {
  c.rescoring = rescoring.output == caote_output::mean ? rescoring_kind::fastcaote : rescoring_kind::caote;
}
void take(configuration& c, const lava&) {
  c.method = method_kind::lava;
  c.rescoring = rescoring_kind::lava;
}
void take(configuration& c, const defensive_rescoring<>& rescoring) {
  c.rescoring = rescoring_kind::defensive;
  c.mass = rescoring.mass;
}
void take(configuration& c, const r_kv& rescoring) {
  c.method = method_kind::rkv;
  c.rescoring = rescoring_kind::rkv;
  c.lambda = rescoring.lambda;
  c.threshold = rescoring.weight.threshold;
  c.similar = rescoring.weight.recent;
}
void take(configuration& c, const uniform& budget) {
  c.allocation = allocation_kind::uniform;
  c.budget = budget.budget.tokens;
}
void take(configuration& c, const pyramid& budget) {
  c.allocation = allocation_kind::pyramid;
  c.budget = budget.budget.tokens;
  c.beta = budget.beta;
  c.rounding = budget.rounding;
}
void take(configuration& c, const ada_kv& budget) {
  c.allocation = allocation_kind::adakv;
  c.budget = budget.budget.tokens;
  c.floor = budget.floor;
  c.normalize = budget.normalise;
}

template <class Policy>
configuration from_policy(const Policy& policy) {
  configuration c;
  take(c, policy.score);
  take(c, policy.temporal);
  take(c, policy.spatial);
  take(c, policy.rescoring);
  take(c, policy.budget);
  c.group = policy.group;
  c.n_sink = policy.protect.sink;
  c.unit = policy.granularity.tokens;
  c.reduce = policy.granularity.reduce;
  c.shared = policy.granularity.shared;
  if (c.observes_every_query() && policy.window != every_query) c.method = method_kind::tova;
  if (c.observes_every_query()) {
    c.window = policy.protect.recent;  // see protected_recent
    return c;
  }
  c.window = policy.window;
  // The window is protected in any case: only what goes beyond it is said.
  c.recent = policy.protect.recent > policy.window || !c.observes() ? policy.protect.recent : 0;
  return c;
}

const std::map<std::string, configuration>& presets_by_name() {
  constexpr index_t budget = configuration{}.budget;
  static const std::map<std::string, configuration> all{
      {"standard", from_policy(presets::standard(budget))},
      {"lowest_error", from_policy(presets::lowest_error(budget))},
      {"rest_kv_released", from_policy(presets::rest_kv_released(budget))},
      {"rest_kv_paper", from_policy(presets::rest_kv_paper(budget))},
      {"caote", from_policy(presets::caote(budget))},
      {"fast_caote", from_policy(presets::fast_caote(budget))},
      {"drop_kv", from_policy(presets::drop_kv(budget))},
      {"snap_kv", from_policy(presets::snap_kv(budget))},
      {"ada_kv", from_policy(presets::ada_kv(budget))},
      {"pyramid_kv", from_policy(presets::pyramid_kv(budget))},
      {"chunk_kv", from_policy(presets::chunk_kv(budget))},
      {"h2o", from_policy(presets::h2o(budget))},
      {"h2o_mean", from_policy(presets::h2o_mean(budget))},
      {"h2o_caote", from_policy(presets::h2o_caote(budget))},
      {"tova", from_policy(presets::tova(budget))},
      {"keyformer", from_policy(presets::keyformer(budget))},
      {"vatp", from_policy(presets::vatp(budget))},
      {"ob_cache", from_policy(presets::ob_cache(budget))},
      {"la_prox", from_policy(presets::la_prox(budget))},
      {"an_d_pro", from_policy(presets::an_d_pro(budget))},
      {"critical_kv", from_policy(presets::critical_kv(budget))},
      {"critical_ada_kv", from_policy(presets::critical_ada_kv(budget))},
      {"lava", from_policy(presets::lava(budget))},
      {"defensive_kv", from_policy(presets::defensive_kv(budget))},
      {"r_kv", from_policy(presets::r_kv(budget))},
      {"knorm", from_policy(presets::knorm(budget))},
      {"key_diff", from_policy(presets::key_diff(budget))},
      {"lag_kv", from_policy(presets::lag_kv(budget))},
      {"cur_dkv", from_policy(presets::cur_dkv(budget))},
      {"leverage_score", from_policy(presets::leverage_score(budget))},
      {"value_range", from_policy(presets::value_range(budget))},
      {"expected_attention", from_policy(presets::expected_attention(budget, {}, {}))},
      {"cap_kv", from_policy(presets::cap_kv(budget, {}))},
      {"q_filter", from_policy(presets::q_filter(budget, {}))},
      {"streaming_llm", from_policy(presets::streaming_llm(budget))},
      {"random", from_policy(presets::random(budget))}};
  return all;
}

}  // namespace

json parse_flat_object(const std::string& text, const std::string& where) {
  std::set<std::string> keys;
  const auto check = [&](int depth, json::parse_event_t event, json& value) {
    const bool begins = event == json::parse_event_t::object_start || event == json::parse_event_t::array_start;
    if (begins && (depth > 0 || event == json::parse_event_t::array_start)) {
      throw input_error(fmt::format("{}: must be one JSON object of numbers, texts and truth values", where));
    }
    if (event == json::parse_event_t::key && !keys.insert(value.get<std::string>()).second) {
      throw input_error(fmt::format("{}: has {} twice", where, shown(value)));
    }
    return true;
  };
  json object = json::parse(text, check, false);
  if (object.is_discarded()) throw input_error(fmt::format("{}: is not valid JSON", where));
  if (!object.is_object()) throw input_error(fmt::format("{}: is {}, must be a JSON object", where, shown(object)));
  return object;
}

configuration defaults_of(method_kind method) {
  configuration c;
  switch (method) {
    case method_kind::restkv: c = preset("rest_kv_paper"); break;
    case method_kind::caote:
    case method_kind::fastcaote: c.use_wo = false; break;
    case method_kind::snapkv: c = preset("snap_kv"); break;
    case method_kind::adakv: c = preset("ada_kv"); break;
    case method_kind::h2o: c = preset("h2o"); break;
    case method_kind::tova: c = preset("tova"); break;
    case method_kind::keyformer: c = preset("keyformer"); break;
    case method_kind::vatp: c = preset("vatp"); break;
    case method_kind::dropkv:
      c = preset("drop_kv");
      c.epsilon = 0.0f;  // a case says so where there is one
      break;
    case method_kind::obcache: c = preset("ob_cache"); break;
    case method_kind::laprox: c = preset("la_prox"); break;
    case method_kind::andpro: c = preset("an_d_pro"); break;
    case method_kind::criticalkv: c = preset("critical_kv"); break;
    case method_kind::lava: c = preset("lava"); break;
    case method_kind::defensivekv: c = preset("defensive_kv"); break;
    case method_kind::rkv: c = preset("r_kv"); break;
    case method_kind::knorm: c = preset("knorm"); break;
    case method_kind::keydiff: c = preset("key_diff"); break;
    case method_kind::lagkv: c = preset("lag_kv"); break;
    case method_kind::curdkv: c = preset("cur_dkv"); break;
    case method_kind::leverage: c = preset("leverage_score"); break;
    case method_kind::valuerange: c = preset("value_range"); break;
    case method_kind::expectedattention: c = preset("expected_attention"); break;
    case method_kind::capkv: c = preset("cap_kv"); break;
    case method_kind::qfilter: c = preset("q_filter"); break;
    case method_kind::keyredundancy: c.group = group_reduce::mean; break;
    case method_kind::lacache:
      c.group = group_reduce::mean;
      c.n_sink = 4;
      break;
    case method_kind::streamingllm: c = preset("streaming_llm"); break;
    case method_kind::random: c = preset("random"); break;
    case method_kind::set_error: break;
  }
  c.method = method;
  return c;
}

configuration preset(const std::string& name) { return presets_by_name().at(name); }

configuration parse_configuration(const std::string& text, const std::string& where) {
  const json object = parse_flat_object(text, where);
  configuration c = defaults_of(method_in(object, where));
  apply(c, object, where);
  return c;
}

namespace {

/// Other names for keys and values, as case files have them: in those of the list.
json in_known_keys(const configuration& c, json object, const std::string& where) {
  const auto take = [&](const char* name) {
    json value = object[name];
    object.erase(name);
    return value;
  };
  const auto need = [&](const char* name, const json& value, bool accepted, const char* needed) {
    if (!accepted) throw input_error(fmt::format("{}: {} is {}, must be {}", where, name, shown(value), needed));
  };
  const auto rename = [&](const char* name, const char* known, const json& value) {
    if (object.contains(known)) throw input_error(fmt::format("{}: {} and {} mean the same", where, name, known));
    object[known] = value;
  };
  if (object.contains("note")) {
    const json note = take("note");
    need("note", note, note.is_string(), "a text");
  }
  if (object.contains("base")) {
    const json base = take("base");
    need("base", base, base == "snapkv", "snapkv");
  }
  if (object.contains("num_sinks")) rename("num_sinks", "n_sink", take("num_sinks"));
  if (object.contains("use_random_leverage")) {
    const json random = take("use_random_leverage");
    need("use_random_leverage", random, random == false, "false: curdkv ranks by norms");
  }
  if (object.contains("accumulate")) {
    const json how = take("accumulate");
    need("accumulate", how, how == "sum" || how == "mean_over_observers", "sum or mean_over_observers");
    rename("accumulate", "temporal", how == "sum" ? "sum" : "mean");
  }
  if (object.value("temporal", json()) == "sum_of_squares") {
    need("temporal", "sum_of_squares", c.method == method_kind::dropkv,
         "another but for dropkv, whose scores are squares (root_sum_square has the same order)");
    object["temporal"] = "sum";
  }
  return object;
}

}  // namespace

void apply(configuration& c, const json& given, const std::string& where) {
  std::map<std::string, std::function<void(const json&)>> readers;
  std::vector<std::string> known;
  visit_keys(c, [&](const key_facts& key, auto& member) {
    known.emplace_back(key.name);
    readers[key.name] = [key, &member, &where](const json& value) { read_value(key, value, member, where); };
  });
  const json object = in_known_keys(c, given, where);
  for (const auto& [key, value] : object.items()) {
    const auto reader = readers.find(key);
    if (reader == readers.end()) {
      throw input_error(fmt::format("{}: unknown key {}; known are: {}", where, shown(json(key)), joined(known)));
    }
    reader->second(value);
  }
  const bool has_ratio = object.contains("compression_ratio");
  if (has_ratio && !(c.compression_ratio >= 0.0 && c.compression_ratio < 1.0)) {
    throw input_error(
        fmt::format("{}: compression_ratio is {}, must be at least 0 and below 1", where, c.compression_ratio));
  }
  if (object.contains("budget")) {
    if (has_ratio) throw input_error(fmt::format("{}: budget and compression_ratio exclude each other", where));
    c.compression_ratio = 0.0;
  }
}

json to_json(const configuration& c) {
  json object = json::object();
  visit_keys(c, [&](const key_facts& key, const auto& member) {
    using member_type = std::decay_t<decltype(member)>;
    if constexpr (std::is_enum_v<member_type>) {
      object[key.name] = name_of(member);
    } else if constexpr (std::is_same_v<member_type, float>) {
      object[key.name] = std::stod(fmt::format("{}", member));  // 0.3, not the digits of the nearest float
    } else {
      object[key.name] = member;
    }
  });
  object.erase(c.compression_ratio == 0.0 ? "compression_ratio" : "budget");
  return object;
}

}  // namespace restkv::cli
