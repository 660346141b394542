// SPDX-License-Identifier: Apache-2.0
/// @file
/// Policy parts chosen at run time: for programs that read their policy from a file. Each holds one of the parts of its
/// kind and behaves exactly like it; one instantiation of `select` then serves all of them. On the host: a device backend
/// wants parts of known types.
#pragma once

#include <restkv/budget/budget_table.hpp>
#include <restkv/budget/duo_attention.hpp>
#include <restkv/budget/head_kv.hpp>
#include <restkv/policy.hpp>

#include <type_traits>
#include <variant>

namespace restkv {

namespace detail {

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

  [[nodiscard]] constexpr bool linear() const noexcept {
    return std::visit([](const auto& part) { return is_linear(part); }, choice);
  }
  [[nodiscard]] constexpr bool averages() const noexcept {
    return std::visit([](const auto& part) { return is_average(part); }, choice);
  }
  [[nodiscard]] double weight(int i, int count) const noexcept {
    return std::visit(
        [&](const auto& part) -> double {
          if constexpr (requires { part.weight(i, count); }) return part.weight(i, count);
          return 0.0;
        },
        choice);
  }
  template <std::floating_point Real>
  [[nodiscard]] Real fold(Real running, Real value, bool first) const noexcept {
    return std::visit(
        [&](const auto& part) -> Real {
          if constexpr (requires { part.fold(running, value, first); }) return part.fold(running, value, first);
          return running;
        },
        choice);
  }
  template <std::floating_point Real>
  [[nodiscard]] Real operator()(std::span<const Real> rows) const noexcept {
    return std::visit([&](const auto& part) -> Real { return part(rows); }, choice);
  }
  [[nodiscard]] status check() const noexcept { return detail::check_choice(choice); }
  ///@}
};

/// A spatial smoother. `needs_drift` holds for the type; the drift is computed only when the choice asks for it.
struct any_spatial {
  std::variant<no_pool, average_pool, max_pool, adaptive_window> choice{};  ///< the part it behaves like

  ///@{
  /// See `spatial_smoother` and `parted_spatial_smoother`; as the choice.
  static constexpr bool needs_drift = true;

  [[nodiscard]] constexpr bool uses_drift() const noexcept { return std::holds_alternative<adaptive_window>(choice); }
  template <std::floating_point Real>
  void operator()(std::span<const Real> in, std::span<Real> out, const row_context& row) const noexcept {
    std::visit([&](const auto& part) { part(in, out, row); }, choice);
  }
  [[nodiscard]] token_reach reach(const row_context& row) const noexcept {
    return std::visit([&](const auto& part) -> token_reach { return part.reach(row); }, choice);
  }
  [[nodiscard]] index_t parts(index_t length, const row_context& row) const noexcept {
    return std::visit([&](const auto& part) -> index_t { return part.parts(length, row); }, choice);
  }
  template <std::floating_point Real>
  void smooth_part(index_t n, std::span<const Real> in, std::span<Real> out, const row_context& row) const noexcept {
    std::visit([&](const auto& part) { part.smooth_part(n, in, out, row); }, choice);
  }
  [[nodiscard]] status check() const noexcept { return detail::check_choice(choice); }
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
