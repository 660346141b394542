// SPDX-License-Identifier: Apache-2.0
/// @file
/// `segment_pool`: importance carried from a token to the end of the segment it stands in.
#pragma once

#include <restkv/core/layer.hpp>
#include <restkv/smoothing/spatial.hpp>

#include <cstdint>

namespace restkv {

/// The maximum over a token and those before it in its segment:
///
///     out[n] = max over i = b .. n of in[i],   b the last token up to n that begins a segment
///
/// `following_pool` with a width that follows the text: a number's digits, the rest of a sentence. `key_links` finds
/// where segments begin, from the keys of the prompt alone; sentences of a tokenizer, or the chunks of a retrieval
/// system, may be given instead. A NaN spreads to the end of its segment. Cost: one comparison a token.
struct segment_pool {
  /// [batch, at least tokens]: not 0 where a token begins a segment, tokens counted from the first one of a sequence,
  /// which always begins one. Lies where the scores are computed, and outlives the selection.
  tensor_view<const std::uint8_t, 2> begins{};

  ///@{
  /// See `monotone_spatial_smoother` and `parted_spatial_smoother`. A part is a segment, numbered by its first token;
  /// the parts of other tokens are empty.
  template <std::floating_point Real>
  void operator()(std::span<const Real> in, std::span<Real> out, const row_context& row) const noexcept {
    const auto length = static_cast<index_t>(in.size());
    for (index_t n = 0; n < length; ++n) smooth_part(n, in, out, row);
  }
  /// More tokens than certified pruning follows, whatever the segments: the row is scored whole.
  [[nodiscard]] RESTKV_HD constexpr token_reach reach(const row_context&) const noexcept {
    return {-widest_direct_reach, 0};
  }
  [[nodiscard]] RESTKV_HD constexpr index_t parts(index_t length, const row_context&) const noexcept { return length; }
  template <std::floating_point Real>
  RESTKV_HD void smooth_part(index_t part, std::span<const Real> in, std::span<Real> out,
                             const row_context& row) const noexcept {
    const auto length = static_cast<index_t>(in.size());
    if (part != 0 && begins(row.sequence, part) == 0) return;
    Real largest = in[static_cast<std::size_t>(part)];
    for (index_t n = part; n < length && (n == part || begins(row.sequence, n) == 0); ++n) {
      largest = detail::larger(largest, in[static_cast<std::size_t>(n)]);
      out[static_cast<std::size_t>(n)] = largest;
    }
  }
  ///@}

  /// Fails where there are no segments, or not those of every sequence and token of a plan.
  [[nodiscard]] status check(const problem_shape& shape) const noexcept {
    if (begins.data == nullptr) {
      return status::error(errc::missing_input, "segment_pool has no segments: begins is empty (see key_links)");
    }
    if (begins.extent(0) != shape.batch) {
      return status::error(errc::shape_mismatch, "segment_pool.begins has %lld sequences, the plan needs %lld",
                           static_cast<long long>(begins.extent(0)), static_cast<long long>(shape.batch));
    }
    if (begins.extent(1) < shape.tokens) {
      return status::error(errc::shape_mismatch, "segment_pool.begins has %lld tokens, the plan needs at least %lld",
                           static_cast<long long>(begins.extent(1)), static_cast<long long>(shape.tokens));
    }
    return {};
  }
};

}  // namespace restkv
