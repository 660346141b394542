// SPDX-License-Identifier: Apache-2.0
// What the tests of whole policies share: a selection with all the memory it needs, random policies and layers, and
// what every selection promises.
#pragma once

#include "support/check_error.hpp"
#include "support/random_layer.hpp"

#include <restkv/runtime_parts.hpp>
#include <restkv/select.hpp>

#include <algorithm>
#include <memory>

namespace restkv_test {

using restkv::eviction_policy;
using restkv::kept_tokens;
using restkv::layer_view;
using restkv::position_t;
using restkv::status;
using restkv::tensor_view;

/// One policy type for all combinations of parts, so that `select` is compiled once for each backend and score.
template <class Score>
using any_policy = eviction_policy<Score, restkv::any_temporal, restkv::any_spatial, restkv::any_budget>;

/// The memory that a layer's selection_details need, for the tokens of its plan.
template <class Real>
struct details_memory {
  std::vector<Real> scores, smoothed;
  std::vector<double> drifts;
  restkv::selection_details<Real> view;

  template <class Plan>
  explicit details_memory(const Plan& plan)
      : scores(static_cast<std::size_t>(plan.shape.batch * plan.heads * plan.shape.tokens + 1)),
        smoothed(scores.size()),
        drifts(static_cast<std::size_t>(plan.shape.batch * plan.heads + 1)),
        view{{scores.data(), {plan.shape.batch, plan.heads, plan.shape.tokens}},
             {smoothed.data(), {plan.shape.batch, plan.heads, plan.shape.tokens}},
             {drifts.data(), {plan.shape.batch, plan.heads}}} {}
};

/// A workspace of exactly the planned size, at any address, between guards.
class guarded_workspace {
 public:
  guarded_workspace(random_engine& random, std::size_t bytes)
      : size_(bytes),
        start_(guard + static_cast<std::size_t>(pick(random, 0, 63))),
        memory_(bytes + 2 * guard + 64, mark) {}

  [[nodiscard]] restkv::workspace space() { return {memory_.data() + start_, size_}; }
  [[nodiscard]] bool guards_stand() const {
    const auto is_mark = [](unsigned char byte) { return byte == mark; };
    const auto begin = memory_.begin() + static_cast<std::ptrdiff_t>(start_);
    return std::all_of(memory_.begin(), begin, is_mark) &&
           std::all_of(begin + static_cast<std::ptrdiff_t>(size_), memory_.end(), is_mark);
  }

 private:
  static constexpr std::size_t guard = 64;
  static constexpr unsigned char mark = 0xa5;
  std::size_t size_;
  std::size_t start_;
  std::vector<unsigned char> memory_;
};

/// One sequence as a policy must see it.
struct expected_sequence {
  restkv::sequence_span span{};
  std::vector<bool> is_protected;  ///< of each token of the sequence
  restkv::budget_problem problem{};

  template <class Policy, class T>
  expected_sequence(const restkv::plan<Policy>& plan, const layer_view<T>& layer, index_t b)
      : span(restkv::sequence(layer, b, 0)), is_protected(static_cast<std::size_t>(span.length)) {
    const Policy& policy = plan.policy;
    for (index_t n = 0; n < span.length; ++n) {
      const bool masked = layer.keep_mask.data != nullptr && layer.keep_mask(b, span.begin + n) != 0;
      is_protected[static_cast<std::size_t>(n)] =
          masked || n < policy.protect.sink || n >= span.length - policy.recent();
    }
    problem = {plan.heads, span.length, std::count(is_protected.begin(), is_protected.end(), false), plan.shape.layer,
               plan.shape.layers};
  }
  [[nodiscard]] index_t protected_tokens() const { return problem.protected_tokens(); }
};

/// The kept positions of one head, counted from the beginning of its sequence.
inline std::vector<index_t> kept_of(const kept_tokens& kept, index_t b, index_t h, index_t begin = 0) {
  std::vector<index_t> positions;
  for (index_t i = 0; i < kept.lengths(b, h); ++i) positions.push_back(kept.positions(b, h, i) - begin);
  return positions;
}

/// Everything a selection promises, whatever its policy. `smoothed` may be missing.
template <class Policy, class T, class Real>
void check_selection(const restkv::plan<Policy>& plan, const layer_view<T>& layer, const kept_tokens& kept,
                     const tensor_view<Real, 3>& smoothed) {
  REQUIRE(kept.batch() == plan.shape.batch);
  REQUIRE(kept.heads() == plan.heads);
  REQUIRE(kept.capacity() == plan.capacity);
  const status fits = restkv::check_kept(kept, plan.shape.batch, plan.shape.kv_heads, layer.key.extent(2));
  INFO(fits.message());
  REQUIRE(fits.ok());
  for (index_t b = 0; b < kept.batch(); ++b) {
    const expected_sequence expected(plan, layer, b);
    const index_t budget = plan.policy.budget.tokens_per_head(expected.problem);
    const index_t chosen = restkv::chosen_per_head(plan.policy.budget, expected.problem);
    index_t total = 0;
    for (index_t h = 0; h < kept.heads(); ++h) {
      CAPTURE(b, h, expected.span.begin, expected.span.length, budget, expected.protected_tokens());
      std::vector<bool> is_kept(expected.is_protected.size());
      for (const index_t n : kept_of(kept, b, h, expected.span.begin)) {
        REQUIRE(n >= 0);  // not in the padding
        REQUIRE(n < expected.span.length);
        is_kept[static_cast<std::size_t>(n)] = true;
      }
      total += kept.lengths(b, h);
      bool protected_kept = true;
      for (std::size_t n = 0; n < is_kept.size(); ++n) {
        protected_kept = protected_kept && (is_kept[n] || !expected.is_protected[n]);
      }
      CHECK(protected_kept);
      if (expected.span.length <= budget) CHECK(kept.lengths(b, h) == expected.span.length);
      if (smoothed.data == nullptr) continue;
      // Every kept candidate beats every dropped one; the smaller position wins ties.
      std::vector<std::pair<std::uint64_t, std::size_t>> order;
      for (std::size_t n = 0; n < is_kept.size(); ++n) {
        if (expected.is_protected[n]) continue;
        order.emplace_back(restkv::order_key(static_cast<double>(smoothed(b, h, static_cast<index_t>(n)))), n);
      }
      std::stable_sort(order.begin(), order.end(), [](const auto& x, const auto& y) { return x.first > y.first; });
      const index_t own = kept.lengths(b, h) - expected.protected_tokens();
      bool best_kept = own >= 0 && own <= std::ssize(order);
      for (index_t i = 0; best_kept && i < std::ssize(order); ++i) {
        best_kept = is_kept[order[static_cast<std::size_t>(i)].second] == (i < own);
      }
      CHECK(best_kept);
    }
    const bool keeps_all = expected.span.length <= budget;
    CAPTURE(b, budget, expected.span.length, expected.protected_tokens(), chosen);
    CHECK(total == kept.heads() * (keeps_all ? expected.span.length : expected.protected_tokens() + chosen));
  }
}

/// Layers of every kind: empty ones, padding, masks, chunks, strides.
inline layer_recipe random_recipe(random_engine& random, index_t most_tokens = 50) {
  layer_recipe recipe;
  recipe.batch = chance(random, 5) ? 0 : pick(random, 1, 3);
  recipe.kv_heads = pick(random, 1, 2);
  recipe.group = pick(random, 1, 3);
  recipe.head_dim = chance(random, 50) ? 8 : pick(random, 1, 20);
  recipe.tokens = chance(random, 10) ? pick(random, 0, 2) : pick(random, 3, most_tokens);
  recipe.query_rows = chance(random, 30) ? recipe.tokens : 16;
  recipe.hidden = pick(random, 1, 24);
  recipe.sharpness = chance(random, 20) ? 30 : 1.5;
  recipe.strided = chance(random, 50);
  recipe.chunks = pick(random, 1, 3);
  recipe.padded = chance(random, 60);
  recipe.pad = chance(random, 50) ? restkv::padding::left : restkv::padding::right;
  recipe.masked_percent = chance(random, 30) ? static_cast<int>(pick(random, 1, 15)) : 0;
  return recipe;
}

template <class Score>
any_policy<Score> random_policy(random_engine& random) {
  using restkv::group_reduce;
  any_policy<Score> policy;
  policy.window = pick(random, 1, 16);
  switch (pick(random, 0, 3)) {
    case 0: policy.temporal.choice = restkv::mean{}; break;
    case 1: policy.temporal.choice = restkv::ema{.alpha = static_cast<float>(uniform_real(random, 0.1, 1))}; break;
    case 2: policy.temporal.choice = restkv::sum{}; break;
    default: policy.temporal.choice = restkv::last{}; break;
  }
  const int width = static_cast<int>(2 * pick(random, 0, 4) + 1);
  switch (pick(random, 0, 4)) {
    case 0: policy.spatial.choice = restkv::no_pool{}; break;
    case 4: policy.spatial.choice = restkv::following_pool{.width = width}; break;
    case 1: policy.spatial.choice = restkv::average_pool{.width = width}; break;
    case 2: policy.spatial.choice = restkv::max_pool{.width = width}; break;
    default:
      policy.spatial.choice =
          restkv::adaptive_window{.min_width = width, .scale = static_cast<float>(uniform_real(random, 0.5, 20))};
      break;
  }
  constexpr group_reduce groups[] = {group_reduce::none, group_reduce::mean, group_reduce::max, group_reduce::sum,
                                     group_reduce::l2};
  policy.group = groups[pick(random, 0, 4)];
  const restkv::budget_size size = chance(random, 30) ? restkv::budget_size::keep_ratio(uniform_real(random, 0.3, 1))
                                                      : restkv::budget_size(pick(random, 1, 60));
  switch (pick(random, 0, 2)) {
    case 0: policy.budget.choice = restkv::uniform{size}; break;
    case 1:
      policy.budget.choice = restkv::pyramid{.budget = size, .beta = static_cast<float>(uniform_real(random, 1, 30))};
      break;
    default:
      policy.budget.choice = restkv::ada_kv{.budget = size,
                                            .floor = static_cast<float>(uniform_real(random, 0, 1)),
                                            .normalise = chance(random, 20)};
      break;
  }
  policy.protect = {.sink = pick(random, 0, 4), .recent = pick(random, 0, 10)};
  return policy;
}

}  // namespace restkv_test
