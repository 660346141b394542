// SPDX-License-Identifier: Apache-2.0
#include "command.hpp"
#include "layer_file.hpp"
#include "set_error.hpp"
#include "verify.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

namespace restkv::cli {

namespace {

const std::string expected_prefix = "expected.";

/// Known results of one case, and the case.
struct case_problem {
  const safetensors_file& file;
  const std::string& path;
  const configuration& c;
  const layer_view<float>& layer;

  [[nodiscard]] bool has(const char* name) const { return file.find(expected_prefix + name) != nullptr; }
  template <class T>
  [[nodiscard]] known_tensor<T> known(const char* name, index_t rows, std::size_t axes) const {
    return read_known<T>(file, path, expected_prefix + name, rows, axes);
  }
};

/// The file's margin; nothing where it does not say one.
std::optional<double> margin_of(const safetensors_file& file) {
  const std::string* const text = file.find_metadata("margin");
  if (text == nullptr) return std::nullopt;
  double margin = 0;
  const auto [end, trouble] = std::from_chars(text->data(), text->data() + text->size(), margin);
  if (trouble != std::errc{} || end != text->data() + text->size()) return std::nullopt;
  return margin;
}

/// StreamingLLM has no scores to compare: the known ones are 1 for kept tokens and 0 for others.
void compare_marked_tokens(const case_problem& problem, const selection& chosen, comparison& compare) {
  const known_tensor<float> known = problem.known<float>("score", problem.layer.key.extent(1), 2);
  compare.compared(known.name);
  const const_kept_tokens kept = chosen.kept();
  for (index_t h = 0; h < std::min(known.rows, kept.heads()); ++h) {
    std::vector<float> marks(static_cast<std::size_t>(known.columns));
    for (index_t i = 0; i < kept.lengths(0, h) && kept.positions(0, h, i) < known.columns; ++i) {
      marks[static_cast<std::size_t>(kept.positions(0, h, i))] = 1;
    }
    const auto differs = std::mismatch(marks.begin(), marks.end(), known.row(h)).first;
    if (differs != marks.end()) {
      compare.mismatch(fmt::format("token {} of head {} is {}", differs - marks.begin(), h,
                                   *differs == 1 ? "kept, the file drops it" : "dropped, the file keeps it"));
      return;
    }
  }
}

/// Scores where a source shows a marker in the place of some: the largest float for CriticalKV's first stage, whose
/// other scores are those that tokens are ranked by; 1 for CurDKV's sinks; nothing for the newest token of TOVA.
/// Markers must stand where they belong, the other scores are compared.
void compare_marked_scores(const case_problem& problem, const selection& chosen, comparison& compare) {
  const configuration& c = problem.c;
  const bool two_stages = c.rescoring == rescoring_kind::criticalkv;
  known_tensor<float> known = problem.known<float>("score", chosen.heads, 2);
  const std::vector<double>& ours = two_stages ? chosen.smoothed : chosen.score;
  const index_t fewest = c.method == method_kind::tova ? chosen.past - c.window : chosen.past;
  const index_t columns = std::clamp(known.columns, fewest, chosen.past);
  constexpr float most = std::numeric_limits<float>::max();
  const float marker = two_stages ? most : 1.0f;
  std::vector<double> scores;
  for (index_t h = 0; h < chosen.heads; ++h) {
    for (index_t n = 0; n < columns; ++n) {
      const double score = ours[static_cast<std::size_t>(h * chosen.past + n)];
      const bool is_marked =
          two_stages ? score >= static_cast<double>(most) : c.method == method_kind::curdkv && n < c.n_sink;
      scores.push_back(is_marked ? 0.0 : score);
      if (n >= known.columns) continue;
      float& expected = known.elements[static_cast<std::size_t>(h * known.columns + n)];
      if (is_marked ? expected != marker : two_stages && expected == marker) {
        compare.mismatch(fmt::format("{}: token {} of row {} is {}, the file says that it is {}", known.name, n, h,
                                     is_marked ? "kept whatever the others are" : "ranked",
                                     is_marked ? "ranked" : "kept whatever the others are"));
        return;
      }
      if (is_marked) expected = 0.0f;
    }
  }
  compare.floats(known, scores, columns);
}

/// AdaKV's release rounds each head's share on its own, and so misses the total by a few tokens. What it rounds are
/// counts that a floor of 0 shows: they must reproduce the file's lengths exactly. Our own lengths must lie within one
/// token of the same shares, and add up to the whole budget.
void compare_head_lengths(const case_problem& problem, const selection& chosen, const selection& without_floor,
                          comparison& compare) {
  const known_tensor<std::int32_t> known = problem.known<std::int32_t>("head_lengths", chosen.heads, 1);
  const index_t window = problem.layer.key.extent(2) - chosen.past;
  const index_t base = std::min(problem.c.size().of(problem.layer.key.extent(2)), problem.layer.key.extent(2)) - window;
  const auto floor = static_cast<double>(problem.c.floor);
  std::vector<std::int32_t> released;
  for (index_t h = 0; h < chosen.heads; ++h) {
    const auto count = static_cast<double>(without_floor.lengths[static_cast<std::size_t>(h)] - window);
    // nearbyint rounds halves to even, as Python does.
    const double own = std::nearbyint(count * (1.0 - floor) + std::floor(static_cast<double>(base) * floor));
    released.push_back(static_cast<std::int32_t>(own) + static_cast<std::int32_t>(window));
    const double share = count * (1.0 - floor) + static_cast<double>(base) * floor + static_cast<double>(window);
    const position_t ours = chosen.lengths[static_cast<std::size_t>(h)];
    if (!(std::abs(share - static_cast<double>(ours)) < 1.0)) {
      compare.mismatch(fmt::format("head {} keeps {} tokens, its share is {:.2f}", h, ours, share));
    }
  }
  compare.equal_numbers(known, released);
  if (chosen.kept().total() != chosen.heads * (base + window)) {
    compare.mismatch(fmt::format("the heads keep {} tokens, the budget is {}", chosen.kept().total(),
                                 chosen.heads * (base + window)));
  }
}

void compare_selection(const case_problem& problem, const selection& chosen, comparison& compare) {
  const configuration& c = problem.c;
  if (c.method == method_kind::streamingllm && problem.has("score")) {
    compare_marked_tokens(problem, chosen, compare);
    return;
  }
  std::vector<double> ranking = chosen.smoothed;
  std::optional<selection> rounding;
  const auto rounding_of = [&](std::vector<double> selection::*which) -> std::function<const std::vector<double>&()> {
    if (!c.scores_odds()) return {};
    return [&problem, &rounding, which]() -> const std::vector<double>& {
      if (!rounding) rounding = rounding_of_release(problem.c, problem.layer, problem.path);
      return (*rounding).*which;
    };
  };
  if (problem.has("score") &&
      (c.method == method_kind::tova || c.method == method_kind::curdkv || c.rescoring == rescoring_kind::criticalkv)) {
    compare_marked_scores(problem, chosen, compare);
  } else if (problem.has("score")) {
    compare.floats(problem.known<float>("score", chosen.heads, 2), chosen.score, chosen.past,
                   rounding_of(&selection::score));
  }
  if (problem.has("smoothed")) {
    const known_tensor<float> known = problem.known<float>("smoothed", chosen.heads, 2);
    compare.floats(known, chosen.smoothed, chosen.past, rounding_of(&selection::smoothed));
    if (known.columns == chosen.past) ranking.assign(known.elements.begin(), known.elements.end());
  }
  if (problem.has("indices")) {
    compare.kept_sets(problem.known<std::int32_t>("indices", chosen.heads, 2), chosen, ranking,
                      margin_of(problem.file));
  }
  if (problem.has("drift")) compare.equal_floats(problem.known<float>("drift", chosen.heads, 1), chosen.drift);
  const adaptive_windows windows(c, chosen.drift);
  if (problem.has("kernel"))
    compare.equal_numbers(problem.known<std::int32_t>("kernel", chosen.heads, 1), windows.kernel);
  if (problem.has("shift")) compare.equal_numbers(problem.known<std::int32_t>("shift", chosen.heads, 1), windows.shift);
}

void compare_errors(const case_problem& problem, const layer_file& tensors, const verify_options& options,
                    file_outcome& outcome) {
  if (!tensors.has("wo") && (problem.has("output_error_per_head") || problem.has("output_error_layer"))) {
    throw input_error(problem.path + ": there is no tensor wo: the known output errors are measured through it");
  }
  const selection given = given_selection(tensors, problem.c);
  score_memory unused;
  for (const verified_backend* const backend : options.backends) {
    if (backend->errors == nullptr) continue;
    comparison compare(outcome, backend->name, options.tolerance);
    const window_errors errors =
        backend->errors(given, {problem.c, problem.layer, options.threads, unused, problem.path});
    const auto rows = [&](const char* name, const std::vector<double>& ours) {
      if (problem.has(name)) compare.floats(problem.known<float>(name, errors.heads, 2), ours, errors.queries);
    };
    rows("value_error", errors.value_error);
    rows("output_error_per_head", errors.output_error_per_head);
    if (problem.has("output_error_layer")) {
      known_tensor<float> known = problem.known<float>("output_error_layer", errors.queries, 1);
      std::swap(known.rows, known.columns);  // one row
      compare.floats(known, errors.output_error_layer, errors.queries);
    }
  }
}

}  // namespace

namespace {

/// CriticalKV's source takes the first stage's part of a budget that is not rounded to whole tokens yet, we that of the
/// budget itself: where that is not the same number, the configuration gets the part that gives the source's.
void take_first_stage_of_source(configuration& c, index_t tokens, file_outcome& outcome) {
  if (c.rescoring != rescoring_kind::criticalkv || c.compression_ratio == 0.0) return;
  const auto part = static_cast<double>(c.first_stage_ratio);
  const auto budget = static_cast<double>(c.size().of(tokens));
  const double ours = std::floor(budget * part);
  const double source = std::floor((1.0 - c.compression_ratio) * static_cast<double>(tokens) * part);
  if (ours == source) return;
  c.first_stage_ratio = static_cast<float>((source + 0.5) / budget);
  outcome.notes.push_back(
      fmt::format("first stage of {} tokens, from a budget that is not rounded; ours has {}", source, ours));
}

}  // namespace

void verify_case(const safetensors_file& file, const std::string& path, const verify_options& options,
                 file_outcome& outcome) {
  const std::string* const text = file.find_metadata("case");
  if (text == nullptr) throw input_error(path + ": the metadata have no case: this is no case file");
  configuration c = parse_configuration(*text, path + ": metadata case");
  outcome.method = name_of(c.method);
  const bool has_known = std::any_of(file.entries().begin(), file.entries().end(), [](const safetensors_entry& entry) {
    return entry.name.starts_with(expected_prefix);
  });
  if (!has_known) throw input_error(path + ": there are no tensors expected.*: nothing to compare with");
  layer_file tensors(file, path, "", options.allow_non_finite);
  take_first_stage_of_source(c, tensors.tokens(), outcome);
  const layer_view<float> layer = tensors.view(c);
  const case_problem problem{file, path, c, layer};
  if (c.method == method_kind::set_error) {
    compare_errors(problem, tensors, options, outcome);
    return;
  }
  score_memory memory;
  for (const verified_backend* const backend : options.backends) {
    if (backend->select == nullptr) continue;
    comparison compare(outcome, backend->name, options.tolerance);
    const auto run = [&](const configuration& what, inspection how = inspection::scores) {
      return backend->select({what, layer, options.threads, memory, path, how});
    };
    const selection chosen = run(c);
    compare_selection(problem, chosen, compare);
    if (backend->prunes) compare.without_scores(chosen, run(c, inspection::kept_only));
    if (problem.has("head_lengths")) {
      configuration without_floor = c;
      without_floor.floor = 0.0f;
      compare_head_lengths(problem, chosen, run(without_floor), compare);
    }
  }
}

}  // namespace restkv::cli
