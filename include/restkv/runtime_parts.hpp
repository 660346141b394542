// SPDX-License-Identifier: Apache-2.0
/// @file
/// Policy parts chosen at run time: for programs that read their policy from a file. Each holds one of the parts of its
/// kind and behaves exactly like it; one instantiation of `select` then serves all of them. A device can call the
/// smoothers; of budgets it wants a known type.
#pragma once

#include <restkv/budget/budget_table.hpp>
#include <restkv/budget/duo_attention.hpp>
#include <restkv/budget/head_kv.hpp>
#include <restkv/policy.hpp>
#include <restkv/smoothing/following_pool.hpp>
#include <restkv/smoothing/segment_pool.hpp>

#include <type_traits>
#include <variant>

namespace restkv {

namespace detail {

/// std::visit for one choice of parts that never throws, which a device can call.
template <std::size_t Index = 0, class Visit, class... Parts>
RESTKV_HD constexpr auto visit_choice(const Visit& visit, const std::variant<Parts...>& choice) noexcept {
  if constexpr (Index + 1 < sizeof...(Parts)) {
    if (choice.index() != Index) return visit_choice<Index + 1>(visit, choice);
  }
  return visit(*std::get_if<Index>(&choice));
}

/// `part.check()` where the part has one.
template <class... Parts>
[[nodiscard]] status check_choice(const std::variant<Parts...>& choice) noexcept {
  return std::visit(
      [](const auto& part) -> status {
        if constexpr (requires { part.check(); }) return part.check();
        return {};
      },
      choice);
}

}  // namespace detail

/// A temporal smoother.
struct any_temporal {
  std::variant<mean, sum, ema, last, maximum, root_sum_square> choice{};  ///< the part it behaves like

  ///@{
  /// See `linear_temporal_smoother` and `streaming_temporal_smoother`; as the choice. Weights are 0 where it has none.
  static constexpr bool monotone = true;

  [[nodiscard]] RESTKV_HD constexpr bool linear() const noexcept {
    return detail::visit_choice([](const auto& part) { return is_linear(part); }, choice);
  }
  [[nodiscard]] RESTKV_HD constexpr bool averages() const noexcept {
    return detail::visit_choice([](const auto& part) { return is_average(part); }, choice);
  }
  [[nodiscard]] RESTKV_HD double weight(int i, int count) const noexcept {
    return detail::visit_choice(
        [&](const auto& part) -> double {
          if constexpr (requires { part.weight(i, count); }) return part.weight(i, count);
          return 0.0;
        },
        choice);
  }
  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real fold(Real running, Real value, bool first) const noexcept {
    return detail::visit_choice(
        [&](const auto& part) -> Real {
          if constexpr (requires { part.fold(running, value, first); }) return part.fold(running, value, first);
          return running;
        },
        choice);
  }
  template <std::floating_point Real>
  [[nodiscard]] RESTKV_HD Real operator()(std::span<const Real> rows) const noexcept {
    return detail::visit_choice([&](const auto& part) -> Real { return part(rows); }, choice);
  }
  [[nodiscard]] status check() const noexcept { return detail::check_choice(choice); }
  ///@}
};

/// A spatial smoother. `needs_drift` holds for the type; the drift is computed only when the choice asks for it.
struct any_spatial {
  /// The part it behaves like.
  std::variant<no_pool, average_pool, max_pool, adaptive_window, following_pool, segment_pool> choice{};

  ///@{
  /// See `spatial_smoother` and `parted_spatial_smoother`; as the choice.
  static constexpr bool needs_drift = true;

  [[nodiscard]] constexpr bool uses_drift() const noexcept { return std::holds_alternative<adaptive_window>(choice); }
  template <std::floating_point Real>
  void operator()(std::span<const Real> in, std::span<Real> out, const row_context& row) const noexcept {
    std::visit([&](const auto& part) { part(in, out, row); }, choice);
  }
  [[nodiscard]] RESTKV_HD token_reach reach(const row_context& row) const noexcept {
    return detail::visit_choice([&](const auto& part) -> token_reach { return part.reach(row); }, choice);
  }
  [[nodiscard]] RESTKV_HD index_t parts(index_t length, const row_context& row) const noexcept {
    return detail::visit_choice([&](const auto& part) -> index_t { return part.parts(length, row); }, choice);
  }
  template <std::floating_point Real>
  RESTKV_HD void smooth_part(index_t n, std::span<const Real> in, std::span<Real> out,
                             const row_context& row) const noexcept {
    detail::visit_choice([&](const auto& part) { part.smooth_part(n, in, out, row); }, choice);
  }
  [[nodiscard]] status check() const noexcept { return detail::check_choice(choice); }
  [[nodiscard]] status check(const problem_shape& shape) const noexcept {
    return std::visit(
        [&](const auto& part) -> status {
          if constexpr (requires { part.check(shape); }) return part.check(shape);
          return {};
        },
        choice);
  }
  ///@}
};

/// A budget allocator.
struct any_budget {
  std::variant<uniform, pyramid, ada_kv, head_kv, budget_table, duo_attention> choice{};  ///< the part it behaves like

  ///@{
  /// See `budget_allocator` and `pooled_budget_allocator`; as the choice.
  [[nodiscard]] index_t tokens_per_head(const budget_problem& problem) const noexcept {
    return std::visit([&](const auto& part) -> index_t { return part.tokens_per_head(problem); }, choice);
  }
  [[nodiscard]] index_t most_per_head(const budget_problem& problem) const noexcept {
    return std::visit([&](const auto& part) -> index_t { return part.most_per_head(problem); }, choice);
  }
  [[nodiscard]] index_t deciding_keys(const budget_problem& problem) const noexcept {
    return std::visit([&](const auto& part) -> index_t { return part.deciding_keys(problem); }, choice);
  }
  template <std::unsigned_integral Key>
  void allocate(const budget_problem& problem, tensor_view<const Key, 2> keys, std::span<index_t> counts,
                std::span<double> scratch) const noexcept {
    std::visit([&](const auto& part) { part.allocate(problem, keys, counts, scratch); }, choice);
  }
  [[nodiscard]] bool pools() const noexcept {
    const auto* const pooled = std::get_if<ada_kv>(&choice);
    return pooled != nullptr && pooled->pools();
  }
  [[nodiscard]] index_t pooled_keys(const budget_problem& problem) const noexcept {
    const auto* const pooled = std::get_if<ada_kv>(&choice);
    return pooled != nullptr ? pooled->pooled_keys(problem) : 0;
  }
  template <std::unsigned_integral Key, class Count>
  void count_pooled(const budget_problem& problem, tensor_view<const Key, 2> keys, std::span<double> scratch,
                    const Count& count) const noexcept {
    if (const auto* const pooled = std::get_if<ada_kv>(&choice)) pooled->count_pooled(problem, keys, scratch, count);
  }
  void share_pool(const budget_problem& problem, std::span<index_t> counts, std::span<double> scratch) const noexcept {
    if (const auto* const pooled = std::get_if<ada_kv>(&choice)) pooled->share_pool(problem, counts, scratch);
  }
  [[nodiscard]] index_t chosen_in_layer(const budget_problem& problem) const noexcept {
    return std::visit([&](const auto& part) -> index_t { return restkv::chosen_in_layer(part, problem); }, choice);
  }
  [[nodiscard]] status check(const budget_problem& problem) const noexcept {
    return std::visit([&](const auto& part) { return check_problem(part, problem); }, choice);
  }
  [[nodiscard]] status check() const noexcept { return detail::check_choice(choice); }
  ///@}
};

static_assert(linear_temporal_smoother<any_temporal> && std::is_trivially_copyable_v<any_temporal>);
static_assert(monotone_spatial_smoother<any_spatial> && std::is_trivially_copyable_v<any_spatial>);
static_assert(budget_allocator<any_budget> && std::is_trivially_copyable_v<any_budget>);

}  // namespace restkv
