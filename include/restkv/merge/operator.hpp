// SPDX-License-Identifier: Apache-2.0
/// @file
/// What a merge operator is: who receives a dropped token, with what weight, and what the receiver becomes.
#pragma once

#include <restkv/core/status.hpp>

#include <concepts>
#include <type_traits>

namespace restkv {

/// Which kept tokens receive a dropped one.
enum class merge_target {
  most_similar,  ///< the one whose key has the largest cosine with the dropped key; the smaller position among equals
  following,     ///< the next ones by position, `targets` of them
};

/// A dropped token beside the kept ones that receive it.
template <std::floating_point Real>
struct merge_pair {
  Real similarity = 0;         ///< cosine of the keys; 0 for `merge_target::following`
  Real dropped_norm = 0;       ///< ||v|| of the dropped token
  Real kept_norm = 0;          ///< ||v|| of the receiver; 0 for `merge_target::following`
  Real dropped_attention = 0;  ///< mean attention of the window; 0 unless the operator `needs_attention`
  Real kept_attention = 0;     ///< the same of the receivers, their mean
  index_t position = 0;        ///< of the dropped token on the token axis
  index_t batch = 0;           ///< sequence
  index_t head = 0;            ///< row of the kept set
};

/// What a receiver r becomes: own * r + other * sum of weight * dropped.
template <std::floating_point Real>
struct merge_blend {
  Real own = 1;    ///< of the receiver itself
  Real other = 0;  ///< of the weighted sum of what it received
};

/// A way to merge dropped tokens into kept ones:
///
///     static constexpr merge_target target;     // who receives
///     static constexpr bool merges_keys;        // keys as well as values
///     static constexpr bool needs_attention;    // of the window's queries
///     Real weight(const merge_pair<Real>&);     // of a dropped token; not above 0 or not finite: it stays dropped
///     merge_blend<Real> blend(index_t received, Real total);  // of a receiver, by number and weight of what it
/// received
///
/// For `merge_target::following` also `index_t targets`, 1 or more: the weight is shared evenly among them. An optional
/// `status check() const` is asked before anything is written.
template <class M>
concept merge_operator = requires(const M& merging, const merge_pair<float>& pair, index_t received, float total) {
  { M::target } -> std::convertible_to<merge_target>;
  { M::merges_keys } -> std::convertible_to<bool>;
  { M::needs_attention } -> std::convertible_to<bool>;
  { merging.weight(pair) } -> std::convertible_to<float>;
  { merging.blend(received, total) } -> std::convertible_to<merge_blend<float>>;
} && (M::target != merge_target::following || requires(const M& merging) {
  { merging.targets } -> std::convertible_to<index_t>;
});

}  // namespace restkv
