// SPDX-License-Identifier: Apache-2.0
/// @file
/// `configuration`: a policy as a case file or the command line describes it.
#pragma once

#include <restkv/core/layer.hpp>
#include <restkv/policy.hpp>
#include <restkv/score/cur_dkv.hpp>
#include <restkv/score/ob_cache.hpp>

#include <nlohmann/json_fwd.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

namespace CLI {
class App;
}

namespace restkv::cli {

/// A method names a score and the defaults of every other key.
enum class method_kind {
  restkv,
  caote,
  fastcaote,
  snapkv,
  adakv,
  h2o,
  tova,
  keyformer,
  vatp,
  dropkv,
  obcache,
  laprox,
  andpro,
  criticalkv,
  lava,
  defensivekv,
  rkv,
  knorm,
  keydiff,
  lagkv,
  curdkv,
  leverage,
  expectedattention,
  qfilter,
  capkv,
  keyredundancy,
  valuerange,
  lacache,
  streamingllm,
  random,
  set_error
};
enum class temporal_kind { mean, sum, ema, last, max, root_sum_square };
enum class spatial_kind { none, avgpool, maxpool, adaptive, following, segments };
enum class rescoring_kind { none, criticalkv, caote, fastcaote, lava, defensive, rkv };
/// From `global` on: over the layers of a model.
enum class allocation_kind { uniform, pyramid, adakv, global, lava, cake };

/// The names of an enumeration's values in a configuration, in the order of the values.
template <class Enum>
struct names;
template <>
struct names<method_kind> {
  static constexpr std::array values{"restkv",
                                     "caote",
                                     "fastcaote",
                                     "snapkv",
                                     "adakv",
                                     "h2o",
                                     "tova",
                                     "keyformer",
                                     "vatp",
                                     "dropkv",
                                     "obcache",
                                     "laprox",
                                     "andpro",
                                     "criticalkv",
                                     "lava",
                                     "defensivekv",
                                     "rkv",
                                     "knorm",
                                     "keydiff",
                                     "lagkv",
                                     "curdkv",
                                     "leverage",
                                     "expectedattention",
                                     "qfilter",
                                     "capkv",
                                     "keyredundancy",
                                     "valuerange",
                                     "lacache",
                                     "streamingllm",
                                     "random",
                                     "set_error"};
};
template <>
struct names<query_order> {
  static constexpr std::array values{"before", "after"};
};
template <>
struct names<temporal_kind> {
  static constexpr std::array values{"mean", "sum", "ema", "last", "max", "root_sum_square"};
};
template <>
struct names<spatial_kind> {
  static constexpr std::array values{"none", "avgpool", "maxpool", "adaptive", "following", "segments"};
};
template <>
struct names<drift_shift> {
  static constexpr std::array values{"released", "centred"};
};
template <>
struct names<group_reduce> {
  static constexpr std::array values{"none", "mean", "max", "sum", "l2"};
};
template <>
struct names<rescoring_kind> {
  static constexpr std::array values{"none", "criticalkv", "caote", "fastcaote", "lava", "defensive", "rkv"};
};
template <>
struct names<allocation_kind> {
  static constexpr std::array values{"uniform", "pyramid", "adakv", "global", "lava", "cake"};
};
template <>
struct names<pyramid_rounding> {
  static constexpr std::array values{"exact", "released", "kvpress"};
};
template <>
struct names<unit_reduce> {
  static constexpr std::array values{"mean", "max"};
};
template <>
struct names<ob_cache_part> {
  static constexpr std::array values{"value", "key", "joint"};
};
template <>
struct names<cur_leverage> {
  static constexpr std::array values{"key", "value", "kv_avg", "kv_product"};
};

template <class Enum>
[[nodiscard]] constexpr const char* name_of(Enum value) noexcept {
  return names<Enum>::values[static_cast<std::size_t>(value)];
}

/// A policy in the keys of a case file. Which keys act depends on the values of others: `alpha` only with the temporal
/// smoother ema, `floor` only with the allocation adakv. Keys that do not act are allowed, as case files have them.
struct configuration {
  method_kind method = method_kind::restkv;
  query_order order = query_order::before;
  bool use_wo = true;     ///< measure through W_O; without it, tau does not act
  bool use_norm = false;  ///< divide each query's scores by the norm of its output
  float tau = 1.0f;
  temporal_kind temporal = temporal_kind::mean;
  float alpha = 0.3f;
  spatial_kind spatial = spatial_kind::none;
  int kernel = 5;  ///< width of a pool; least width of the adaptive window
  float scale = 2000.0f;
  drift_shift shift_rule = drift_shift::released;
  double share = 0.1;  ///< of the tokens, which begin a segment
  group_reduce group = group_reduce::none;
  index_t window = 32;
  index_t budget = 1024;           ///< tokens kept per head, protected ones included
  double compression_ratio = 0.0;  ///< part of the tokens that is evicted; 0: `budget` acts
  rescoring_kind rescoring = rescoring_kind::none;
  float first_stage_ratio = 0.5f;  ///< with the rescoring criticalkv
  float epsilon = 0.0f;            ///< of dropkv, criticalkv and expectedattention
  float mass = 0.9f;               ///< with the rescoring defensive
  float lambda = 0.1f;             ///< with the rescoring rkv
  allocation_kind allocation = allocation_kind::uniform;
  float floor = 0.2f;
  bool normalize = false;
  float beta = 20.0f;
  pyramid_rounding rounding = pyramid_rounding::exact;
  index_t layer_index = 0;  ///< with the allocation pyramid
  index_t layer_count = 1;
  index_t n_sink = 0;
  index_t recent = 0;  ///< newest tokens that are always kept; the window is in any case
  index_t unit = 1;    ///< tokens that are evicted together
  unit_reduce reduce = unit_reduce::mean;
  bool shared = false;  ///< one kept set for all heads of a layer
  std::uint64_t seed = 0;
  // Of single methods; see the keys.
  float temperature = 1.0f;
  int attention_pool = 5;
  ob_cache_part part = ob_cache_part::key;
  index_t lag_size = 128;
  bool cross_scoring = false;
  cur_leverage leverage_type = cur_leverage::product;
  bool use_local_approximation = true;
  index_t local_window_size = 16;
  index_t sketch = 48;
  double ridge = 0.01;
  bool use_covariance = true;
  bool use_vnorm = true;
  bool cosine = true;
  double rope_theta = 0.0;  ///< 0: statistics of the queries as they are
  index_t n_future = 512;
  double threshold = 0.5;
  index_t similar = 1;
  index_t span = 16;
  index_t overlap = 0;

  /// True for methods that score each query of an observation window.
  [[nodiscard]] bool observes() const noexcept {
    return method < method_kind::knorm || method == method_kind::set_error;
  }
  /// True for methods that look at queries in some way.
  [[nodiscard]] bool reads_queries() const noexcept {
    return observes() || method == method_kind::expectedattention || method == method_kind::qfilter ||
           method == method_kind::capkv;
  }
  /// True for methods whose observation window is every query that there is.
  [[nodiscard]] bool observes_every_query() const noexcept {
    return method == method_kind::h2o || method == method_kind::keyformer;
  }
  /// True for methods that score the tokens of the observation window like others.
  [[nodiscard]] bool scores_window() const noexcept {
    return observes_every_query() || method == method_kind::tova;
  }
  /// True for methods whose score is the odds of the attention times a distance.
  [[nodiscard]] bool scores_odds() const noexcept {
    return method == method_kind::restkv || method == method_kind::caote;
  }
  /// True when distances or norms are measured through W_O.
  [[nodiscard]] bool measures_through_wo() const noexcept {
    return use_wo && (scores_odds() || method == method_kind::laprox || method == method_kind::andpro);
  }
  /// True when W_O itself is needed.
  [[nodiscard]] bool needs_wo() const noexcept {
    return measures_through_wo() || rescoring == rescoring_kind::criticalkv || rescoring == rescoring_kind::defensive;
  }
  /// True for methods that look at keys in some way.
  [[nodiscard]] bool reads_keys() const noexcept {
    return method != method_kind::valuerange && method != method_kind::lacache && method != method_kind::streamingllm &&
           method != method_kind::random;
  }
  /// True for methods that look at values in some way.
  [[nodiscard]] bool reads_values() const noexcept {
    switch (method) {
      case method_kind::snapkv:
      case method_kind::adakv:
      case method_kind::h2o:
      case method_kind::tova: return rescoring != rescoring_kind::none;
      case method_kind::keyformer:
      case method_kind::rkv:
      case method_kind::knorm:
      case method_kind::keydiff:
      case method_kind::leverage:
      case method_kind::qfilter:
      case method_kind::keyredundancy:
      case method_kind::lacache:
      case method_kind::streamingllm:
      case method_kind::random: return false;
      default: return true;
    }
  }
  [[nodiscard]] budget_size size() const noexcept {
    if (compression_ratio == 0.0) return budget;
    return budget_size::keep_ratio(1.0 - compression_ratio);
  }
  /// True for a budget over the layers of a model, which one layer alone has no share of.
  [[nodiscard]] bool over_layers() const noexcept { return allocation >= allocation_kind::global; }
  /// Queries that are observed of a layer.
  template <element T, memory_space Space>
  [[nodiscard]] index_t window_of(const layer_view<T, Space>& layer) const noexcept {
    return observes_every_query() ? std::max<index_t>(layer.query.extent(2), 1) : window;
  }
  /// Newest tokens that are kept, where the policy does not keep those of its window anyway. H2O's window is that.
  [[nodiscard]] index_t protected_recent() const noexcept {
    return observes_every_query() ? std::max(window, recent) : recent;
  }
  /// True for one kept set a query head.
  [[nodiscard]] bool per_query_head() const noexcept { return group == group_reduce::none; }
};

/// What a key of the configuration is called, and what it means.
struct key_facts {
  const char* name;
  const char* option;  ///< on the command line
  const char* meaning;
};

/// The one list of all keys: calls visit(facts, member) for each. `Configuration` is const or not.
template <class Configuration, class Visit>
void visit_keys(Configuration& c, const Visit& visit) {
  visit(key_facts{"method", "--method", "Score, and the defaults of everything else"}, c.method);
  visit(key_facts{"order", "--order", "Smooth over queries after or before scoring"}, c.order);
  visit(key_facts{"use_wo", "--wo", "Measure distances through W_O"}, c.use_wo);
  visit(key_facts{"use_norm", "--norm", "Divide each query's scores by the norm of its output"}, c.use_norm);
  visit(key_facts{"tau", "--tau", "Exponent of the distance; sharpness of the weights, for capkv"}, c.tau);
  visit(key_facts{"temporal", "--temporal", "Smoothing over the window's queries"}, c.temporal);
  visit(key_facts{"alpha", "--alpha", "Weight of the newest query, for ema"}, c.alpha);
  visit(key_facts{"spatial", "--spatial", "Smoothing over tokens"}, c.spatial);
  visit(key_facts{"kernel", "--kernel", "Tokens a pool is wide, or the adaptive window at least"}, c.kernel);
  visit(key_facts{"scale", "--scale", "Tokens of drift per step of the adaptive window"}, c.scale);
  visit(key_facts{"shift_rule", "--shift-rule", "How drift shifts the adaptive window"}, c.shift_rule);
  visit(key_facts{"share", "--share", "Part of the tokens that begin a segment, for segments"}, c.share);
  visit(key_facts{"group", "--group", "From the query heads of a KV head to one score; none: a set per query head"},
        c.group);
  visit(key_facts{"window", "--window", "Queries that are observed, and newest tokens that are kept"}, c.window);
  visit(key_facts{"budget", "--budget", "Tokens kept per head, window and sinks included"}, c.budget);
  visit(key_facts{"compression_ratio", "--compression-ratio", "Part of the tokens to evict, instead of a budget"},
        c.compression_ratio);
  visit(key_facts{"rescoring", "--rescoring", "A second look at the smoothed scores"}, c.rescoring);
  visit(key_facts{"first_stage_ratio", "--first-stage-ratio", "Part of the budget by the score alone, for criticalkv"},
        c.first_stage_ratio);
  visit(key_facts{"epsilon", "--epsilon", "For dropkv, criticalkv and expectedattention"}, c.epsilon);
  visit(key_facts{"mass", "--mass", "Part of the attention that is kept whatever its scores, for defensive"}, c.mass);
  visit(key_facts{"lambda", "--lambda", "Weight of the score beside redundancy, for rkv"}, c.lambda);
  visit(key_facts{"allocation", "--allocation", "How the budget is divided"}, c.allocation);
  visit(key_facts{"floor", "--floor", "Part of the uniform share that every head gets, for adakv"}, c.floor);
  visit(key_facts{"normalize", "--normalize", "Compare heads by concentration, for adakv"}, c.normalize);
  visit(key_facts{"beta", "--beta", "Steepness, for pyramid"}, c.beta);
  visit(key_facts{"rounding", "--rounding", "Exact totals, or as released, for pyramid"}, c.rounding);
  visit(key_facts{"layer_index", "--layer-index", "Which layer of the model this is, for pyramid and lacache"},
        c.layer_index);
  visit(key_facts{"layer_count", "--layer-count", "Layers of the model, for pyramid and lacache"}, c.layer_count);
  visit(key_facts{"n_sink", "--sink", "First tokens that are always kept"}, c.n_sink);
  visit(key_facts{"recent", "--recent", "Newest tokens that are always kept"}, c.recent);
  visit(key_facts{"unit", "--unit", "Tokens that are evicted together"}, c.unit);
  visit(key_facts{"unit_reduce", "--unit-reduce", "From the scores of a unit's tokens to its score"}, c.reduce);
  visit(key_facts{"shared", "--shared", "One kept set for all heads of a layer"}, c.shared);
  visit(key_facts{"seed", "--seed", "Of the random scores, of keyformer and leverage"}, c.seed);
  visit(key_facts{"temperature", "--temperature", "Of the softmax, for keyformer"}, c.temperature);
  visit(key_facts{"attention_pool", "--attention-pool",
                  "Tokens over which a query's attention is spread, for defensivekv"},
        c.attention_pool);
  visit(key_facts{"part", "--part", "What is taken away, for obcache"}, c.part);
  visit(key_facts{"lag_size", "--lag-size", "Tokens of a chunk, for lagkv"}, c.lag_size);
  visit(key_facts{"cross_scoring", "--cross-scoring", "Compare tokens of different chunks, for lagkv"},
        c.cross_scoring);
  visit(key_facts{"leverage_type", "--leverage-type", "What is ranked, for curdkv"}, c.leverage_type);
  visit(key_facts{"use_local_approximation", "--local-approximation", "Normalise in local windows, for curdkv"},
        c.use_local_approximation);
  visit(key_facts{"local_window_size", "--local-window-size", "Tokens of such a window, for curdkv"},
        c.local_window_size);
  visit(key_facts{"sketch", "--sketch", "Columns of the random matrix, 0 for none, for leverage"}, c.sketch);
  visit(key_facts{"ridge", "--ridge", "Added to the diagonal, for leverage"}, c.ridge);
  visit(key_facts{"use_covariance", "--covariance", "Use the queries' covariance, for expectedattention"},
        c.use_covariance);
  visit(key_facts{"use_vnorm", "--vnorm", "Multiply by the norm of the value, for expectedattention"}, c.use_vnorm);
  visit(key_facts{"cosine", "--cosine", "Directions of queries and keys only, for capkv"}, c.cosine);
  visit(key_facts{"rope_theta", "--rope-theta",
                  "Base of RoPE, for the queries to come of expectedattention and capkv; 0: those recorded"},
        c.rope_theta);
  visit(key_facts{"n_future", "--n-future", "Positions to come, for expectedattention and capkv"}, c.n_future);
  visit(key_facts{"threshold", "--threshold", "Cosine above which keys are similar, for keyredundancy and rkv"},
        c.threshold);
  visit(key_facts{"similar", "--similar", "Latest similar keys that do not count, for keyredundancy and rkv"},
        c.similar);
  visit(key_facts{"span", "--span", "Layers over which a token is repeated, for lacache"}, c.span);
  visit(key_facts{"overlap", "--overlap", "Overlap of such runs, for lacache"}, c.overlap);
}

/// A method's own settings, as published.
[[nodiscard]] configuration defaults_of(method_kind method);

/// The method that an object names, restkv where it names none. Throws input_error for one that is not known.
[[nodiscard]] method_kind method_in(const nlohmann::json& object, const std::string& where);

/// A preset of the library by its name there. Throws std::out_of_range for one that it does not have.
[[nodiscard]] configuration preset(const std::string& name);

/// Parses an untrusted text that must be a JSON object without objects or lists in it, each key once. Throws input_error,
/// beginning with `where`.
[[nodiscard]] nlohmann::json parse_flat_object(const std::string& text, const std::string& where);

/// The configuration that a case file's text describes. Throws input_error, beginning with `where`: text that is not a
/// JSON object, unknown keys, unknown values, values of another type, budget and compression_ratio together.
[[nodiscard]] configuration parse_configuration(const std::string& text, const std::string& where);

/// Sets the keys that `object` holds. Throws as parse_configuration does.
void apply(configuration& c, const nlohmann::json& object, const std::string& where);

/// All keys: what parse_configuration reads back as the same configuration.
[[nodiscard]] nlohmann::json to_json(const configuration& c);

/// What the command line says about the configuration: --preset, and one option a key.
struct configuration_options {
  std::string preset;
  std::shared_ptr<nlohmann::json> keys;

  /// The case's configuration with the options applied. Null is a file without one: the policy `standard`. --preset,
  /// a name of `policy_table`, replaces the case's configuration but for its budget and window.
  [[nodiscard]] configuration over(const std::string* case_text, const std::string& where) const;
};

void add_configuration_options(CLI::App& command, configuration_options& options);

}  // namespace restkv::cli
