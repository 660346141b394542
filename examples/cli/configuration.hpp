// SPDX-License-Identifier: Apache-2.0
/// @file
/// `configuration`: a policy as a case file or the command line describes it.
#pragma once

#include <restkv/policy.hpp>

#include <nlohmann/json_fwd.hpp>

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
enum class method_kind { restkv, caote, snapkv, adakv, streamingllm, random, set_error };
enum class temporal_kind { mean, sum, ema, last, max };
enum class spatial_kind { none, avgpool, maxpool, adaptive };
enum class allocation_kind { uniform, pyramid, adakv };

/// The names of an enumeration's values in a configuration, in the order of the values.
template <class Enum>
struct names;
template <>
struct names<method_kind> {
  static constexpr std::array values{"restkv", "caote", "snapkv", "adakv", "streamingllm", "random", "set_error"};
};
template <>
struct names<query_order> {
  static constexpr std::array values{"before", "after"};
};
template <>
struct names<temporal_kind> {
  static constexpr std::array values{"mean", "sum", "ema", "last", "max"};
};
template <>
struct names<spatial_kind> {
  static constexpr std::array values{"none", "avgpool", "maxpool", "adaptive"};
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
struct names<allocation_kind> {
  static constexpr std::array values{"uniform", "pyramid", "adakv"};
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
  int kernel = 5;  ///< width of a pool; smallest width of the adaptive window
  float scale = 2000.0f;
  drift_shift shift_rule = drift_shift::released;
  group_reduce group = group_reduce::none;
  index_t window = 32;
  index_t budget = 1024;           ///< tokens kept per head, protected ones included
  double compression_ratio = 0.0;  ///< part of the tokens that is evicted; 0: `budget` acts
  allocation_kind allocation = allocation_kind::uniform;
  float floor = 0.2f;
  bool normalize = false;
  float beta = 20.0f;
  index_t layer_index = 0;  ///< with the allocation pyramid
  index_t layer_count = 1;
  index_t n_sink = 0;
  index_t recent = 0;  ///< newest tokens that are always kept; the window is in any case
  std::uint64_t seed = 0;

  /// True for methods that look at the window's queries.
  [[nodiscard]] bool observes() const noexcept {
    return method != method_kind::streamingllm && method != method_kind::random;
  }
  /// True for methods whose score is the odds of the attention times a distance.
  [[nodiscard]] bool scores_odds() const noexcept {
    return method == method_kind::restkv || method == method_kind::caote;
  }
  /// True when distances are measured through W_O.
  [[nodiscard]] bool measures_through_wo() const noexcept { return scores_odds() && use_wo; }
  [[nodiscard]] budget_size size() const noexcept {
    if (compression_ratio == 0.0) return budget;
    return budget_size::keep_ratio(1.0 - compression_ratio);
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
  visit(key_facts{"tau", "--tau", "Exponent of the distance"}, c.tau);
  visit(key_facts{"temporal", "--temporal", "Smoothing over the window's queries"}, c.temporal);
  visit(key_facts{"alpha", "--alpha", "Weight of the newest query, for ema"}, c.alpha);
  visit(key_facts{"spatial", "--spatial", "Smoothing over tokens"}, c.spatial);
  visit(key_facts{"kernel", "--kernel", "Tokens a pool is wide, or the adaptive window at least"}, c.kernel);
  visit(key_facts{"scale", "--scale", "Tokens of drift per step of the adaptive window"}, c.scale);
  visit(key_facts{"shift_rule", "--shift-rule", "How drift shifts the adaptive window"}, c.shift_rule);
  visit(key_facts{"group", "--group", "From the query heads of a KV head to one score; none: a set per query head"},
        c.group);
  visit(key_facts{"window", "--window", "Queries that are observed, and newest tokens that are kept"}, c.window);
  visit(key_facts{"budget", "--budget", "Tokens kept per head, window and sinks included"}, c.budget);
  visit(key_facts{"compression_ratio", "--compression-ratio", "Part of the tokens to evict, instead of a budget"},
        c.compression_ratio);
  visit(key_facts{"allocation", "--allocation", "How the budget is divided"}, c.allocation);
  visit(key_facts{"floor", "--floor", "Part of the uniform share that every head gets, for adakv"}, c.floor);
  visit(key_facts{"normalize", "--normalize", "Compare heads by concentration, for adakv"}, c.normalize);
  visit(key_facts{"beta", "--beta", "Steepness, for pyramid"}, c.beta);
  visit(key_facts{"layer_index", "--layer-index", "Which layer of the model this is, for pyramid"}, c.layer_index);
  visit(key_facts{"layer_count", "--layer-count", "Layers of the model, for pyramid"}, c.layer_count);
  visit(key_facts{"n_sink", "--sink", "First tokens that are always kept"}, c.n_sink);
  visit(key_facts{"recent", "--recent", "Newest tokens that are always kept"}, c.recent);
  visit(key_facts{"seed", "--seed", "Of the random scores"}, c.seed);
}

/// A method's own settings, as published.
[[nodiscard]] configuration defaults_of(method_kind method);

/// A preset of the library. Throws input_error that lists the names for one it does not know.
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

  /// The case's configuration with the options applied. Null is a file without one: the preset `standard`. --preset
  /// replaces the case's configuration but for its budget and window.
  [[nodiscard]] configuration over(const std::string* case_text, const std::string& where) const;
};

void add_configuration_options(CLI::App& command, configuration_options& options);

}  // namespace restkv::cli
