// SPDX-License-Identifier: Apache-2.0
/// @file
/// Key channels that a cache can do without (ThinK): their scores, the choice, and keys and queries without the others.
#pragma once

#include <restkv/cache/gather.hpp>
#include <restkv/core/layer.hpp>

#include <cmath>
#include <cstdint>
#include <limits>

namespace restkv {

/// Channels of `head_dim` that stay when the part `ratio` of them, rounded down, is dropped: head_dim - int(head_dim *
/// ratio), as ThinK counts. A ratio outside [0, 1) drops none.
[[nodiscard]] constexpr index_t kept_channels(index_t head_dim, double ratio) noexcept {
  if (!(ratio > 0 && ratio < 1)) return head_dim;
  return head_dim - static_cast<index_t>(static_cast<double>(head_dim) * ratio);
}

/// What each key channel adds to the logits of the observation window:
///
///     scores(b, h, c) = mean over the window's queries and the group's heads of q_c^2 * mean over the tokens of k_c^2
///
/// (Xu et al., ThinK, arXiv 2407.21018, equation 4, squared, with the mean over grouped heads of kvpress). The product
/// is the squared Frobenius norm of what zeroing channel c alone takes from the logits, up to a factor common to a
/// head.
///
/// layer: query and key; values are not looked at. window: its last queries, fewer where a sequence has fewer. scores:
/// [batch, kv_heads, head_dim], written. In double; NaN where a query or key is. A head without tokens scores 0.
///
/// Errors, before anything is written: a layer that does not fit itself, a window below 1, scores of another shape or
/// that overlap themselves. Cost: one read of the keys, and of window * group queries a head.
template <element T, parallel_loop ParallelFor = serial_for>
[[nodiscard]] status score_channels(const layer_view<T>& layer, index_t window, const tensor_view<double, 3>& scores,
                                    const ParallelFor& parallel_for = {}) {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  const problem_shape shape = shape_of(layer);
  if (window < 1) {
    return status::error(errc::invalid_argument, "the window is %lld queries, at least %d is needed", ll(window), 1);
  }
  if (layer.key.missing()) return status::error(errc::missing_input, "the layer has no key");
  if (layer.query.data == nullptr) {
    return status::error(errc::missing_input, "%lld queries are to be observed and the layer has no query", ll(window));
  }
  RESTKV_RETURN_IF_FAILED(check_groups(shape.query_heads, shape.kv_heads));
  RESTKV_RETURN_IF_FAILED(check_layer(layer, shape, 1, true, false, false));
  RESTKV_RETURN_IF_FAILED(detail::check_view("scores", scores));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("scores", "sequences", scores.extent(0), "key", shape.batch));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("scores", "heads", scores.extent(1), "key", shape.kv_heads));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("scores", "channels", scores.extent(2), "key", shape.head_dim));
  RESTKV_RETURN_IF_FAILED(detail::check_distinct("scores", scores));
  parallel_for(shape.batch * shape.kv_heads, [&](index_t task) {
    const index_t b = task / shape.kv_heads;
    const index_t h = task % shape.kv_heads;
    const sequence_span span = sequence(layer, b, h);
    const index_t rows = std::min({window, layer.query.extent(2), shortest_head(layer, b)});
    for (index_t c = 0; c < shape.head_dim; ++c) scores(b, h, c) = 0;
    if (rows == 0) return;
    index_t token = span.begin;
    while (token < span.begin + span.length) {
      const auto part = layer.key.from_token(token);
      const index_t count = std::min(part.extent(2), span.begin + span.length - token);
      for (index_t n = 0; n < count; ++n) {
        for (index_t c = 0; c < shape.head_dim; ++c) {
          const double x = widen<double>(part(b, h, n, c));
          scores(b, h, c) += x * x / static_cast<double>(span.length);
        }
      }
      token += count;
    }
    for (index_t c = 0; c < shape.head_dim; ++c) {
      double squares = 0;
      for (index_t g = 0; g < shape.group(); ++g) {
        const auto queries = window_queries(layer, b, h * shape.group() + g, rows);
        for (index_t i = 0; i < rows; ++i) {
          const double x = widen<double>(queries(i, c));
          squares += x * x;
        }
      }
      scores(b, h, c) *= squares / static_cast<double>(rows * shape.group());
    }
  });
  return {};
}

/// The channels with the highest scores: channels(b, h, 0 .. kept - 1), ascending, where kept is the extent of the last
/// axis (`kept_channels`). Ties to the smaller channel, NaN lowest.
///
/// scores: [batch, kv_heads, head_dim]; channels: [batch, kv_heads, kept], written. Errors: other sequences or heads,
/// more channels kept than there are, channels that overlap themselves. Cost: head_dim^2 comparisons a head.
[[nodiscard]] inline status select_channels(const tensor_view<const double, 3>& scores,
                                            const tensor_view<position_t, 3>& channels) noexcept {
  RESTKV_RETURN_IF_FAILED(detail::check_view("scores", scores));
  RESTKV_RETURN_IF_FAILED(detail::check_view("channels", channels));
  RESTKV_RETURN_IF_FAILED(
      detail::check_equal("channels", "sequences", channels.extent(0), "scores", scores.extent(0)));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("channels", "heads", channels.extent(1), "scores", scores.extent(1)));
  if (channels.extent(2) > scores.extent(2)) {
    return status::error(errc::invalid_argument, "%lld channels are to be kept, scores has %lld",
                         static_cast<long long>(channels.extent(2)), static_cast<long long>(scores.extent(2)));
  }
  RESTKV_RETURN_IF_FAILED(detail::check_distinct("channels", channels));
  const auto value = [&](index_t b, index_t h, index_t c) {
    const double score = scores(b, h, c);
    return std::isnan(score) ? -std::numeric_limits<double>::infinity() : score;
  };
  for (index_t b = 0; b < scores.extent(0); ++b) {
    for (index_t h = 0; h < scores.extent(1); ++h) {
      index_t slot = 0;
      for (index_t c = 0; c < scores.extent(2); ++c) {
        index_t better = 0;
        for (index_t other = 0; other < scores.extent(2); ++other) {
          better += value(b, h, other) > value(b, h, c) || (value(b, h, other) == value(b, h, c) && other < c) ? 1 : 0;
        }
        if (better < channels.extent(2)) channels(b, h, slot++) = static_cast<position_t>(c);
      }
    }
  }
  return {};
}

/// Leaves out the other channels: out(b, h, n, i) = source(b, h, n, channels(b, h / group, i)), bit by bit, where group
/// is the number of source heads for each head of `channels`: 1 for keys, the query heads of a KV head for queries.
///
/// The product of a query and a key gathered like this is that of the whole query with a key whose other channels are
/// 0; attention still divides by the root of the whole head_dim. Keys that are to stay whole, such as the last ones
/// (KVCache-Factory keeps 32), are simply not in `source`: slice it, keep them in an array of their own, and multiply
/// them with the whole query.
///
/// source: [batch, heads, tokens, head_dim]; channels: [batch, kv_heads, kept], each within [0, head_dim); out:
/// [batch, heads, tokens, kept]. Elements of any trivially copyable type: quantised codes of per-channel scales, too.
///
/// Errors, before anything is written: shapes that do not fit, a channel out of range, an output that overlaps itself,
/// the source or the channels (errc::aliasing). Cost: one read and one write of what stays.
template <class T, class U, parallel_loop ParallelFor = serial_for>
  requires(detail::copyable_bytes<T> && std::is_same_v<std::remove_const_t<U>, T>)
[[nodiscard]] status gather_channels(const tensor_view<const position_t, 3>& channels, const tensor_view<U, 4>& source,
                                     const tensor_view<T, 4>& out, const ParallelFor& parallel_for = {}) {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(detail::check_view("channels", channels));
  RESTKV_RETURN_IF_FAILED(detail::check_view("source", source));
  RESTKV_RETURN_IF_FAILED(detail::check_view("out", out));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("channels", "sequences", channels.extent(0), "source", source.extent(0)));
  if (channels.extent(1) < 1 || source.extent(1) % channels.extent(1) != 0) {
    return status::error(errc::shape_mismatch, "source has %lld heads, channels has %lld: a multiple is needed",
                         ll(source.extent(1)), ll(channels.extent(1)));
  }
  RESTKV_RETURN_IF_FAILED(detail::check_equal("out", "sequences", out.extent(0), "source", source.extent(0)));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("out", "heads", out.extent(1), "source", source.extent(1)));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("out", "tokens", out.extent(2), "source", source.extent(2)));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("out", "channels", out.extent(3), "channels", channels.extent(2)));
  for (index_t b = 0; b < channels.extent(0); ++b) {
    for (index_t h = 0; h < channels.extent(1); ++h) {
      for (index_t i = 0; i < channels.extent(2); ++i) {
        if (channels(b, h, i) >= 0 && channels(b, h, i) < source.extent(3)) continue;
        return status::error(errc::invalid_argument, "channel %lld of head %lld is %lld, source has %lld channels",
                             ll(i), ll(h), ll(channels(b, h, i)), ll(source.extent(3)));
      }
    }
  }
  RESTKV_RETURN_IF_FAILED(detail::check_distinct("out", out));
  RESTKV_RETURN_IF_FAILED(detail::check_disjoint("out", touched_bytes(out), "source", touched_bytes(source)));
  RESTKV_RETURN_IF_FAILED(detail::check_disjoint("out", touched_bytes(out), "channels", touched_bytes(channels)));
  const index_t group = source.extent(1) / channels.extent(1);
  parallel_for(source.extent(0) * source.extent(1), [&](index_t task) {
    const index_t b = task / source.extent(1);
    const index_t h = task % source.extent(1);
    for (index_t n = 0; n < source.extent(2); ++n) {
      for (index_t i = 0; i < channels.extent(2); ++i) {
        const index_t from = source.offset(b, h, n, index_t{channels(b, h / group, i)});
        std::memcpy(static_cast<void*>(out.data + out.offset(b, h, n, i)),
                    static_cast<const void*>(source.data + from), sizeof(T));
      }
    }
  });
  return {};
}

}  // namespace restkv
