// SPDX-License-Identifier: Apache-2.0
/// @file
/// Where the segments of a text begin, from the keys of its tokens: `add_key_links`, `find_segments`.
#pragma once

#include <restkv/core/dtype.hpp>
#include <restkv/core/layer.hpp>
#include <restkv/core/status.hpp>
#include <restkv/core/tensor_view.hpp>
#include <restkv/score/head_score.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

namespace restkv {

/// Doubles of scratch that `add_key_links` needs.
[[nodiscard]] constexpr index_t key_links_scratch(index_t head_dim) noexcept { return 3 * head_dim; }

/// Doubles of scratch that `find_segments` needs.
[[nodiscard]] constexpr index_t segments_scratch(index_t tokens) noexcept { return tokens; }

namespace detail {

/// links[n] += weight cos(k_n - m, k_n-1 - m), m the mean of the head's keys.
template <element T>
void add_links_of_head(const head_view<T>& head, double weight, std::span<double> scratch,
                       const tensor_view<double, 1>& links) noexcept {
  const auto channels = static_cast<std::size_t>(head.head_dim());
  const std::span<double> mean = scratch.first(channels);
  std::span<double> current = scratch.subspan(channels, channels);
  std::span<double> previous = scratch.subspan(2 * channels, channels);
  std::fill(mean.begin(), mean.end(), 0.0);
  for (index_t n = 0; n < head.length(); ++n) {
    head.key(n, current);
    for (std::size_t c = 0; c < channels; ++c) mean[c] += current[c];
  }
  for (double& channel : mean) channel /= static_cast<double>(head.length());
  double norm_before = 0;
  for (index_t n = 0; n < head.length(); ++n) {
    head.key(n, current);
    double norm = 0;
    double product = 0;
    for (std::size_t c = 0; c < channels; ++c) {
      current[c] -= mean[c];
      norm += current[c] * current[c];
      product += current[c] * previous[c];
    }
    const double cosine = product / std::sqrt(norm * norm_before);  // NaN for n = 0
    if (n > 0 && std::isfinite(cosine)) links(n) += weight * cosine;
    norm_before = norm;
    std::swap(current, previous);
  }
}

}  // namespace detail

/// Adds to links how alike the keys of neighbouring tokens are, the mean over the KV heads of the layer:
///
///     links[b, n] += (1 / kv_heads) sum over h of cos(k[b, h, n] - m[b, h], k[b, h, n-1] - m[b, h]),   1 <= n < length
///
/// with m the mean key of the head. Keys change little within a number, a name or a phrase, and most where a sentence
/// or another subject begins; the turn that RoPE gives neighbours is the same for all. The measure is this project's:
/// of a single KV head it is noisy, of a layer it already finds most sentences, summed over several layers nearly all
/// of them.
///
/// links: [batch, at least tokens], zeros before the first layer; tokens count from a sequence's first one. Keys that
/// are not finite, or equal to the mean, add nothing. scratch: key_links_scratch(head_dim) doubles. Fails, before
/// anything is written, on extents that do not fit and on layers some tokens of which were evicted (`head_lengths`):
/// their neighbours are not those of the text. Allocates nothing. Cost: two reads of the keys.
template <element T>
[[nodiscard]] status add_key_links(const layer_view<T>& layer, const tensor_view<double, 2>& links,
                                   std::span<double> scratch) noexcept {
  problem_shape shape = shape_of(layer);
  shape.query_heads = shape.kv_heads;  // queries do not matter, and need not be there
  RESTKV_RETURN_IF_FAILED(check_layer(layer, shape, 0, false, false, false));
  if (layer.head_lengths.data != nullptr) {
    return status::error(errc::invalid_argument,
                         "key links are of a whole prompt: the layer has lengths of its heads, so tokens were evicted");
  }
  if (links.data == nullptr) return status::error(errc::missing_input, "key links have no memory");
  if (links.extent(0) != shape.batch || links.extent(1) < shape.tokens) {
    return status::error(errc::shape_mismatch, "key links are of %lld x %lld tokens, the layer has %lld x %lld",
                         static_cast<long long>(links.extent(0)), static_cast<long long>(links.extent(1)),
                         static_cast<long long>(shape.batch), static_cast<long long>(shape.tokens));
  }
  const index_t needed = key_links_scratch(shape.head_dim);
  if (static_cast<index_t>(scratch.size()) < needed) {
    return status::error(errc::workspace_too_small, "key links need %lld doubles of scratch, there are %zu",
                         static_cast<long long>(needed), scratch.size());
  }
  for (index_t b = 0; b < shape.batch; ++b) {
    for (index_t h = 0; h < shape.kv_heads; ++h) {
      detail::add_links_of_head(head_view(layer, shape, b, h), 1.0 / static_cast<double>(shape.kv_heads), scratch,
                                links[b]);
    }
  }
  return {};
}

/// Cuts each sequence at its weakest links: begins[b, n] = 1 for n = 0 and for the floor(share (length - 1)) tokens n
/// whose links are smallest, 0 for others. Ties go to the smaller n; links that are not finite count as strongest.
///
/// links: [batch, tokens], of `add_key_links`; lengths: [batch], tokens of each sequence, none for as many as there are
/// links. begins: [batch, tokens]; share within [0, 1]. scratch: segments_scratch(tokens) doubles. Fails, before
/// anything is written, on what does not fit. Allocates nothing. Cost: linear in the tokens.
[[nodiscard]] inline status find_segments(const tensor_view<const double, 2>& links, std::span<const index_t> lengths,
                                          const tensor_view<std::uint8_t, 2>& begins, std::span<double> scratch,
                                          double share = 0.1) noexcept {
  const index_t batch = links.extent(0), tokens = links.extent(1);
  const auto ll = [](auto count) { return static_cast<long long>(count); };
  if (!(share >= 0 && share <= 1)) {
    return status::error(errc::invalid_argument, "the share of links to cut is %g, must be within [0, 1]", share);
  }
  if (links.data == nullptr || begins.data == nullptr) {
    return status::error(errc::missing_input, "segments need links and a place for what begins one");
  }
  if (begins.extent(0) != batch || begins.extent(1) != tokens) {
    return status::error(errc::shape_mismatch, "begins is of %lld x %lld tokens, there are links of %lld x %lld",
                         ll(begins.extent(0)), ll(begins.extent(1)), ll(batch), ll(tokens));
  }
  if (!lengths.empty() && static_cast<index_t>(lengths.size()) != batch) {
    return status::error(errc::shape_mismatch, "there are %zu lengths and links of %lld sequences", lengths.size(),
                         ll(batch));
  }
  for (std::size_t b = 0; b < lengths.size(); ++b) {
    if (lengths[b] >= 0 && lengths[b] <= tokens) continue;
    return status::error(errc::invalid_argument, "sequence %zu has %lld tokens, there are links of %lld", b,
                         ll(lengths[b]), ll(tokens));
  }
  if (static_cast<index_t>(scratch.size()) < segments_scratch(tokens)) {
    return status::error(errc::workspace_too_small, "segments need %lld doubles of scratch, there are %zu",
                         ll(segments_scratch(tokens)), scratch.size());
  }
  for (index_t b = 0; b < batch; ++b) {
    const index_t length = lengths.empty() ? tokens : lengths[static_cast<std::size_t>(b)];
    for (index_t n = 0; n < tokens; ++n) begins(b, n) = n == 0 && length > 0 ? 1 : 0;
    const auto strength = [&](index_t n) {
      const double link = links(b, n);
      return std::isfinite(link) ? link : HUGE_VAL;
    };
    const auto cuts = static_cast<index_t>(share * static_cast<double>(std::max<index_t>(0, length - 1)));
    if (cuts == 0) continue;
    for (index_t n = 1; n < length; ++n) scratch[static_cast<std::size_t>(n - 1)] = strength(n);
    const auto sorted = scratch.first(static_cast<std::size_t>(length - 1));
    const auto last = sorted.begin() + (cuts - 1);
    std::nth_element(sorted.begin(), last, sorted.end());
    const double threshold = *last;
    auto equal = cuts - std::count_if(sorted.begin(), last + 1, [&](double link) { return link < threshold; });
    for (index_t n = 1; n < length; ++n) {
      const double link = strength(n);
      if (link < threshold || (link == threshold && equal-- > 0)) begins(b, n) = 1;
    }
  }
  return {};
}

}  // namespace restkv
