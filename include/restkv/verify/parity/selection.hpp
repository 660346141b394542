// SPDX-License-Identifier: Apache-2.0
/// @file
/// `compare_selection`: which tokens two backends keep, or a backend and a kernel.
#pragma once

#include <restkv/score/given_scores.hpp>
#include <restkv/select.hpp>
#include <restkv/verify/parity/token_scores.hpp>

#include <algorithm>
#include <string>
#include <vector>

namespace restkv::parity {

/// What a kernel that selects is given, scores and all.
template <element T, class Policy>
struct selection_call {
  const plan<Policy>& made;    ///< the policy, the shape, the capacity of a head
  const layer_view<T>& layer;  ///< on the host; any strides
  kept_tokens kept{};          ///< [batch, heads, capacity] and [batch, heads], to be filled
};

namespace detail {

/// A selection and what it saw, in double.
struct selection_result {
  status outcome;
  index_t heads = 0;
  index_t tokens = 0;
  std::vector<double> score, smoothed;        ///< [batch, heads, tokens], NaN where not defined; or empty
  std::vector<double> drift;                  ///< [batch, heads]
  std::vector<std::vector<position_t>> kept;  ///< [batch * heads]
};

template <class Policy>
struct selection_calls {
  template <element T>
  using call = selection_call<T, Policy>;
};

inline void read_kept(const kept_tokens& kept, selection_result& result) {
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      std::vector<position_t> row;
      for (index_t i = 0; i < kept.lengths(b, h); ++i) row.push_back(kept.positions(b, h, i));
      result.kept.push_back(std::move(row));
    }
  }
}

/// Without details a backend is free to leave out what cannot change the kept set.
template <class Backend, class Policy, element T>
[[nodiscard]] selection_result run_selection(Backend& backend, const Policy& policy, const layer_view<T>& layer,
                                             bool with_details) {
  using real = typename Backend::score_type;
  selection_result result;
  plan<Policy> made;
  result.outcome = make_plan(backend, policy, shape_of(layer), made);
  if (!result.outcome.ok()) return result;
  result.heads = made.heads;
  result.tokens = made.shape.tokens;
  const std::array<index_t, 3> extents{made.shape.batch, made.heads, made.shape.tokens};
  std::vector<real> score(static_cast<std::size_t>(extents[0] * extents[1] * extents[2]),
                          std::numeric_limits<real>::quiet_NaN());
  std::vector<real> smoothed = score;
  result.drift.assign(static_cast<std::size_t>(extents[0] * extents[1]), 0.0);
  const selection_details<real> details{
      {score.data(), extents}, {smoothed.data(), extents}, {result.drift.data(), {extents[0], extents[1]}}};
  // Memory that was used before: who reads what he did not write shows it.
  std::vector<std::byte> memory(made.workspace_bytes, std::byte{0xff});
  kept_tokens kept;
  result.outcome =
      select(backend, made, layer, workspace(memory.data(), memory.size()), kept, with_details ? &details : nullptr);
  if (!result.outcome.ok()) return result;
  result.outcome = check_kept(kept, made.shape.batch, made.shape.kv_heads, made.shape.tokens);
  if (!result.outcome.ok()) return result;
  result.outcome = check_kept_sequences(kept, layer);
  read_kept(kept, result);
  if (!with_details) return result;
  result.score.assign(score.begin(), score.end());
  result.smoothed.assign(smoothed.begin(), smoothed.end());
  return result;
}

template <class Mine, class Policy, element T>
[[nodiscard]] selection_result call_selection(Mine& mine, const plan<Policy>& made, const layer_view<T>& layer) {
  selection_result result;
  result.heads = made.heads;
  result.tokens = made.shape.tokens;
  const index_t rows = made.shape.batch * made.heads;
  std::vector<position_t> positions(static_cast<std::size_t>(rows * made.capacity), -7);
  std::vector<position_t> lengths(static_cast<std::size_t>(rows), -7);
  const kept_tokens kept{{positions.data(), {made.shape.batch, made.heads, made.capacity}},
                         {lengths.data(), {made.shape.batch, made.heads}}};
  const selection_call<T, Policy> call{made, layer, kept};
  if constexpr (std::convertible_to<decltype(mine(call)), status>) {
    result.outcome = mine(call);
    if (!result.outcome.ok()) return result;
  } else {
    mine(call);
  }
  result.outcome = check_kept(kept, made.shape.batch, made.shape.kv_heads, made.shape.tokens);
  if (!result.outcome.ok()) return result;
  result.outcome = check_kept_sequences(kept, layer);
  if (result.outcome.ok()) read_kept(kept, result);
  return result;
}

[[nodiscard]] inline std::string row_text(index_t row, index_t heads) {
  return "row " + std::to_string(row % heads) + " of " + std::to_string(heads) + ", sequence " +
         std::to_string(row / heads);
}

/// The first row in which kept sets differ, and how; empty where none does.
[[nodiscard]] inline std::string compare_sets(const selection_result& expected, const selection_result& given,
                                              const std::vector<double>& scores) {
  for (std::size_t row = 0; row < expected.kept.size(); ++row) {
    const auto& a = expected.kept[row];
    const auto& b = given.kept[row];
    if (a == b) continue;
    std::string text = row_text(static_cast<index_t>(row), expected.heads);
    if (a.size() != b.size()) {
      return text + " keeps " + std::to_string(b.size()) + " tokens instead of " + std::to_string(a.size());
    }
    const auto at = std::mismatch(a.begin(), a.end(), b.begin());
    text += ": slot " + std::to_string(at.first - a.begin()) + " holds position " + std::to_string(*at.second) +
            " instead of " + std::to_string(*at.first);
    if (!scores.empty()) {
      const auto score_at = [&](position_t n) {
        return number_text(scores[row * static_cast<std::size_t>(expected.tokens) + static_cast<std::size_t>(n)]);
      };
      text += " (scores " + score_at(*at.second) + " and " + score_at(*at.first) + ")";
    }
    return text;
  }
  return {};
}

/// Rows over sequences as rows over the token axis, padding included. [batch, heads, tokens]
template <element T>
[[nodiscard]] std::vector<double> on_token_axis(const selection_result& result, const layer_view<T>& layer,
                                                const std::vector<double>& rows) {
  std::vector<double> placed(rows.size(), std::numeric_limits<double>::quiet_NaN());
  for (std::size_t row = 0; row < result.kept.size(); ++row) {
    const auto b = static_cast<index_t>(row) / result.heads;
    const index_t head = static_cast<index_t>(row) % result.heads;
    const sequence_span span = sequence(layer, b, head * layer.key.extent(1) / result.heads);
    for (index_t n = 0; n < span.length; ++n) {
      placed[row * static_cast<std::size_t>(result.tokens) + static_cast<std::size_t>(span.begin + n)] =
          rows[row * static_cast<std::size_t>(result.tokens) + static_cast<std::size_t>(n)];
    }
  }
  return placed;
}

/// What the reference keeps when it is given scores: rows on the token axis.
template <score_rows Rows, class Policy, element T>
[[nodiscard]] selection_result select_given(const Policy& policy, const layer_view<T>& layer,
                                            const std::vector<double>& scores, index_t heads) {
  using given = given_scores<Rows, double>;
  if (layer.key.extent(2) == 0) {  // nothing to choose from
    selection_result nothing;
    nothing.heads = heads;
    nothing.kept.resize(static_cast<std::size_t>(layer.key.extent(0) * heads));
    return nothing;
  }
  reference_backend reference;
  const eviction_policy<given, mean, no_pool, decltype(policy.budget)> selection{
      .score = given{{scores.data(), {layer.key.extent(0), heads, layer.key.extent(2)}}},
      .window = policy.window,
      .temporal = {},
      .spatial = {},
      .group = policy.group == group_reduce::none ? group_reduce::none : group_reduce::max,
      .rescoring = {},
      .budget = policy.budget,
      .protect = {.sink = policy.protect.sink, .recent = policy.recent()},
      .granularity = policy.granularity};
  return run_selection(reference, selection, layer, false);
}

/// How far rounding may move smoothed scores: by what the smoother makes of the errors, or by how far it moves when all
/// scores move, whatever is more; and by the rounding of sums over its reach.
template <class Policy>
void smooth_errors(const Policy& policy, const arithmetic& unit, const row_context& context,
                   std::span<const double> score, std::span<const double> error, std::span<double> smoothed,
                   std::span<double> smoothed_error) {
  std::vector<double> moved(score.size()), out(score.size());
  policy.spatial(score, smoothed, context);
  policy.spatial(error, smoothed_error, context);
  for (const double sign : {1.0, -1.0}) {
    for (std::size_t n = 0; n < score.size(); ++n) moved[n] = score[n] + sign * error[n];
    policy.spatial(std::span<const double>(moved), std::span<double>(out), context);
    for (std::size_t n = 0; n < score.size(); ++n) {
      smoothed_error[n] = std::max(smoothed_error[n], std::fabs(out[n] - smoothed[n]));
    }
  }
  // A running sum over the row may round at the scale of all that passed through it.
  double largest = 0;
  for (const double value : score) {
    if (std::isfinite(value)) largest = std::max(largest, std::fabs(value));
  }
  index_t reach = static_cast<index_t>(score.size());
  if constexpr (requires { policy.spatial.reach(context); }) {
    const token_reach tokens = policy.spatial.reach(context);
    reach = tokens.last - tokens.first + 1;
  }
  const double own = reach > widest_direct_reach ? unit.gamma(static_cast<index_t>(score.size())) * largest : 0.0;
  for (std::size_t n = 0; n < score.size(); ++n) {
    smoothed_error[n] += own + unit.gamma(std::min<index_t>(reach, 256) + 4) * std::fabs(smoothed[n]) + unit.least;
  }
}

/// Two sets of one row may differ by tokens whose scores lie within their bounds of each other. Counts them; a sentence
/// where they do not.
[[nodiscard]] inline std::string compare_near_ties(const std::vector<position_t>& wanted,
                                                   const std::vector<position_t>& given, const double* score,
                                                   const double* error, tally& counts) {
  std::vector<position_t> lost, won;
  std::set_difference(wanted.begin(), wanted.end(), given.begin(), given.end(), std::back_inserter(lost));
  std::set_difference(given.begin(), given.end(), wanted.begin(), wanted.end(), std::back_inserter(won));
  if (lost.empty()) return {};
  const auto least = [&](position_t n) { return score[n] - error[n]; };
  const auto most = [&](position_t n) { return score[n] + error[n]; };
  const position_t best =
      *std::max_element(lost.begin(), lost.end(), [&](auto a, auto b) { return least(a) < least(b); });
  const position_t worst = *std::min_element(won.begin(), won.end(), [&](auto a, auto b) { return most(a) < most(b); });
  if (!(least(best) > most(worst))) {
    counts.near_ties += static_cast<index_t>(lost.size());
    return {};
  }
  char text[256];
  std::snprintf(
      text, sizeof text,
      "position %d (score %.9g) is missing, position %d (%.9g) is kept instead: rounding moves them by %.3g and "
      "%.3g at most",
      static_cast<int>(best), score[best], static_cast<int>(worst), score[worst], error[best], error[worst]);
  return text;
}

}  // namespace detail

/// Compares what is kept: by two backends, or by a backend and a kernel `mine(const selection_call<T, Policy>&)`, for
/// T = float, half, bfloat16 as far as it can be called, or for the types that are named
/// (`compare_selection<float>(...)`); it may return a status.
///
/// 1. What `mine` keeps is a kept set: ascending, unique, tokens of the sequence.
/// 2. Of a backend: with its own scores given to the reference, the reference keeps the same tokens, position by
/// position.
///    This is the exact part: ties to the smaller index, NaN last, budgets, protected tokens. And the same set comes
///    without details, where a backend may prune.
/// 3. Of a backend: its scores and smoothed scores lie within what rounding may do (`bound_scores`).
/// 4. By the reference's scores, a head's set may differ only by tokens that lie within their bounds of each other;
/// they
///    are counted (`near_ties`). Heads whose number of tokens depends on scores, and came out otherwise, are counted,
///    too: there, 2 and 3 decide.
///
/// Steps 3 and 4 are left out for a policy with a rescorer, step 4 for chunks and pages.
template <element... Elements, class Reference, class Mine, class Policy>
requires tensor_backend<std::remove_cvref_t<Reference>>
[[nodiscard]] report compare_selection(Reference&& reference, Mine&& mine, const Policy& policy,
                                       const options& how = {}) {
  using score_t = std::remove_cvref_t<decltype(policy.score)>;
  using rescoring_t = std::remove_cvref_t<decltype(policy.rescoring)>;
  using kernel = detail::takes_elements<std::remove_reference_t<Mine>, detail::selection_calls<Policy>, Elements...>;
  constexpr bool is_backend = tensor_backend<std::remove_cvref_t<Mine>>;
  problem_space space = detail::layer_space(needs_window<score_t>() ? policy.window : 1, needs_values<score_t>(),
                                            needs_metric(policy.score));
  space.types = kernel::types;
  static_assert(
      kernel::any,
      "a kernel that selects is a backend, or is called with a selection_call<T, Policy>");
  const arithmetic of_reference = detail::arithmetic_of<Reference>(options{});
  const arithmetic of_mine = detail::arithmetic_of<Mine>(how);
  return run_cases("selection", space, how, [&](const problem& p, tally& counts, bool explain) -> std::string {
    return with_element<kernel::template of>(p.type, [&]<class T>(std::type_identity<T>) -> std::string {
      const layer_data<T> data(p);
      const layer_view<T>& layer = data.view();
      const Policy fitted = fit_policy(policy, p);
      const detail::selection_result expected = detail::run_selection(reference, fitted, layer, true);
      detail::selection_result given;
      if constexpr (is_backend) {
        given = detail::run_selection(mine, fitted, layer, true);
      } else if (expected.outcome.ok()) {
        plan<Policy> made;
        given.outcome = make_plan(reference, fitted, shape_of(layer), made);
        if (given.outcome.ok()) given = detail::call_selection(mine, made, layer);
      } else {
        given.outcome = expected.outcome;
      }
      if (!expected.outcome.ok() && !given.outcome.ok()) {
        ++counts.refused;
        return {};
      }
      if (expected.outcome.ok() != given.outcome.ok()) {
        return std::string(expected.outcome.ok() ? "" : "not refused, but by the reference: ") +
               (expected.outcome.ok() ? given.outcome : expected.outcome).message();
      }
      counts.sets_compared += static_cast<index_t>(given.kept.size());
      if constexpr (is_backend) {
        const detail::selection_result pruned = detail::run_selection(mine, fitted, layer, false);
        if (!pruned.outcome.ok()) return std::string("refused without details: ") + pruned.outcome.message();
        std::string wrong = detail::compare_sets(given, pruned, {});
        if (!wrong.empty()) return "without details, " + wrong;
        if constexpr (!rescores<rescoring_t> || !rescores_after_budget<rescoring_t>()) {
          const std::vector<double> own = detail::on_token_axis(given, layer, given.smoothed);
          const detail::selection_result exact =
              fitted.group == group_reduce::none
                  ? detail::select_given<score_rows::query_heads>(fitted, layer, own, given.heads)
                  : detail::select_given<score_rows::kv_heads>(fitted, layer, own, given.heads);
          if (!exact.outcome.ok())
            return std::string("the reference does not take its scores: ") + exact.outcome.message();
          wrong = detail::compare_sets(exact, given, own);
          if (!wrong.empty()) return "on its own scores, " + wrong;
        }
      }
      if constexpr (!rescores<rescoring_t>) {
        const auto request = make_score_request(fitted, shape_of(layer));
        // Where heads share a set, the scores of all were folded into one: nothing here says by how much they may
        // differ.
        if (fitted.granularity.shared) return {};
        bounded_scores bounds = detail::bounds_of(request, layer, of_mine, expected.score);
        if (of_reference.unit > 0x1p-40) {
          const bounded_scores more = detail::bounds_of(request, layer, of_reference, expected.score);
          for (std::size_t i = 0; i < bounds.error.size(); ++i) bounds.error[i] += more.error[i];
        }
        std::vector<double> smoothed(expected.score.size(), std::numeric_limits<double>::quiet_NaN());
        std::vector<double> smoothed_error(smoothed.size(), 0.0);
        for (std::size_t row = 0; row < expected.kept.size(); ++row) {
          const auto head = static_cast<index_t>(row) % expected.heads;
          const sequence_span span =
              sequence(layer, static_cast<index_t>(row) / expected.heads, head * layer.key.extent(1) / expected.heads);
          const auto past = static_cast<std::size_t>(request.past_of(span.length));
          const std::size_t first = row * static_cast<std::size_t>(expected.tokens);
          // A drift that rounds to another window is no mistake: the window is that of `mine`, where it shows it.
          const row_context context{.drift = is_backend ? given.drift[row] : expected.drift[row],
                                    .sequence = static_cast<index_t>(row) / expected.heads};
          detail::smooth_errors(fitted, of_mine, context, std::span(expected.score).subspan(first, past),
                                std::span<const double>(bounds.error).subspan(first, past),
                                std::span(smoothed).subspan(first, past),
                                std::span(smoothed_error).subspan(first, past));
        }
        if constexpr (is_backend) {
          std::string wrong =
              detail::compare_scores("score", request, layer, expected.score, bounds.error, given.score, counts);
          if (!wrong.empty()) {
            return explain ? wrong + detail::explain_scores(request, layer, expected.score, given.score, bounds.error)
                           : wrong;
          }
          wrong = detail::compare_scores("smoothed score", request, layer, smoothed, smoothed_error, given.smoothed,
                                         counts);
          if (!wrong.empty()) return wrong;
        }
        const std::vector<double> scores = detail::on_token_axis(expected, layer, smoothed);
        const std::vector<double> errors = detail::on_token_axis(expected, layer, smoothed_error);
        for (std::size_t row = 0; row < expected.kept.size() && fitted.granularity.tokens == 1; ++row) {
          if (is_backend && expected.drift[row] != given.drift[row]) continue;
          if (expected.kept[row].size() != given.kept[row].size()) {
            bool depends_on_scores = true;
            if constexpr (requires { fitted.budget.deciding_keys(budget_problem{}); }) {
              depends_on_scores =
                  fitted.budget.deciding_keys(budget_problem{.heads = 2, .length = 4, .candidates = 4}) > 0;
            }
            if (!depends_on_scores) return detail::compare_sets(expected, given, scores);
            ++counts.other_budgets;
            continue;
          }
          const std::size_t first = row * static_cast<std::size_t>(expected.tokens);
          std::string wrong = detail::compare_near_ties(expected.kept[row], given.kept[row], scores.data() + first,
                                                        errors.data() + first, counts);
          if (!wrong.empty()) return detail::row_text(static_cast<index_t>(row), expected.heads) + ": " + wrong;
        }
      }
      return {};
    });
  });
}

}  // namespace restkv::parity
