// SPDX-License-Identifier: Apache-2.0
/// @file
/// `kv_zip`: the attention that a replay of the prompt pays to it, chunk by chunk, as an array for `given_scores`.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/core/layer.hpp>
#include <restkv/core/workspace.hpp>
#include <restkv/score/la_prox.hpp>
#include <restkv/score/snap_kv.hpp>
#include <restkv/smoothing/temporal.hpp>

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace restkv {

/// A part of the prompt: tokens [begin, begin + length) of each sequence, clipped to its length.
struct kv_zip_chunk {
  index_t begin = 0;    ///< first token
  index_t length = 0;   ///< tokens
  index_t sink = 4;     ///< first tokens of the prompt, which every replay sees
};

/// What the model computed when it was asked to repeat a chunk: queries and keys of the request and of the chunk's text
/// once more, all after RoPE at the positions behind the prompt.
template <element T>
struct kv_zip_replay {
  tensor_view<const T, 4> query{};            ///< [batch, query_heads, rows, head_dim]
  tensor_view<const T, 4> key{};              ///< [batch, kv_heads, rows, head_dim]
  tensor_view<const T, 4> value{};            ///< [batch, kv_heads, rows, head_dim]; read for KVzip+
  /// ||h|| of the hidden state behind each query: given, the scores are KVzip+. [batch, rows]
  tensor_view<const float, 2> hidden_norm{};
};

/// The largest of a window's rows, each divided by a norm: a temporal smoother. A row whose norm is not a positive
/// number counts 0.
struct scaled_maximum {
  const float* norms = nullptr;  ///< of the window's rows, oldest first
  index_t step = 1;              ///< from one norm to the next

  ///@{
  /// See `temporal_smoother`.
  template <std::floating_point Real>
  [[nodiscard]] constexpr Real operator()(std::span<const Real> rows) const noexcept {
    Real largest = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const auto norm = static_cast<Real>(norms == nullptr ? 1.0f : norms[static_cast<index_t>(i) * step]);
      const Real scaled = norm > 0 ? rows[i] / norm : Real(0);
      if (scaled > largest || scaled != scaled) largest = scaled;
    }
    return largest;
  }
  ///@}
};

namespace detail {

/// Replayed queries that are taken at a time: their attention rows are kept until the largest is known.
inline constexpr index_t replayed_at_once = 64;

/// One chunk's replay. The constructor carves the memory, with a counting workspace as with a real one.
template <class Backend, class Score, element T>
class kv_zip_run {
 public:
  kv_zip_run(Backend& backend, const layer_view<T>& layer, const kv_zip_chunk& chunk, const kv_zip_replay<T>& replay,
             workspace& space) noexcept
      : backend_(backend), layer_(layer), chunk_(chunk), replay_(replay),
        request_{.score = {}, .temporal = {}, .window = std::min(replayed_at_once, replay.query.extent(2)),
                 .group = group_reduce::max, .shape = shape()},
        keys_(space.take<part>(parts())),
        values_(with_values ? space.take<part>(parts()) : nullptr),
        out_(space.take<real>(request_.shape.kv_heads, request_.shape.tokens),
             {1, request_.shape.kv_heads, request_.shape.tokens}),
        scratch_(backend, request_, space) {}

  /// Checks everything, then fills the chunk's scores.
  [[nodiscard]] status run(const tensor_view<float, 3>& scores) {
    for (const bool write : {false, true}) {
      for (index_t b = 0; b < layer_.key.extent(0); ++b) {
        const sequence_span span = sequence(layer_, b, 0);
        const index_t sinks = std::clamp<index_t>(chunk_.sink, 0, span.length);
        const index_t begin = std::clamp(chunk_.begin, sinks, span.length);
        const index_t count = std::clamp<index_t>(chunk_.begin + chunk_.length - begin, 0, span.length - begin);
        for (index_t end = request_.window; count > 0;) {
          RESTKV_RETURN_IF_FAILED(replay(b, span, sinks, begin, count, end, write));
          if (write) {
            for (index_t h = 0; h < request_.shape.kv_heads; ++h) {
              for (index_t n = 0; n < count; ++n) {
                float& score = scores(b, h, span.begin + begin + n);
                const auto seen = static_cast<float>(out_(0, h, sinks + n));
                score = end == request_.window || seen > score || seen != seen ? seen : score;
              }
            }
          }
          if (end == replay_.query.extent(2) || !write) break;
          end = std::min(end + request_.window, replay_.query.extent(2));  // rows twice do a maximum no harm
        }
      }
    }
    return {};
  }

 private:
  using real = typename Backend::score_type;
  using part = tensor_view<const T, 4>;
  using request = score_request<Score, scaled_maximum>;
  static constexpr bool with_values = restkv::needs_values<Score>();

  [[nodiscard]] problem_shape shape() const noexcept {
    problem_shape made = shape_of(layer_);
    made.batch = 1;
    made.query_heads = replay_.query.extent(1);
    made.tokens = std::min(chunk_.sink, made.tokens) + std::min(chunk_.length, made.tokens) + replay_.query.extent(2);
    return made;
  }
  [[nodiscard]] index_t parts() const noexcept {
    return 2 * std::max(layer_.key.chunks(), with_values ? layer_.value.chunks() : 0) + 1;
  }

  /// The pieces of tokens [begin, begin + count) on the token axis, of one sequence.
  static index_t cut(const chunked_tensor_view<const T>& cache, index_t batch, index_t begin, index_t count,
                     part* pieces) noexcept {
    index_t written = 0;
    while (count > 0) {
      const part rest = cache.from_token(begin);
      const index_t taken = std::min(count, rest.extent(2));
      pieces[written++] = rest.slice(2, 0, taken).slice(0, batch, 1);
      begin += taken;
      count -= taken;
    }
    return written;
  }

  /// Rows [end - window, end) of the replay against sinks, chunk and the replay up to them.
  [[nodiscard]] status replay(index_t b, const sequence_span& span, index_t sinks, index_t begin, index_t count,
                              index_t end, bool compute) {
    layer_view<T> part_of_layer;
    part_of_layer.query = replay_.query.slice(0, b, 1).slice(2, end - request_.window, request_.window);
    const auto join = [&](const chunked_tensor_view<const T>& cache, const part& replayed, part* pieces) {
      index_t written = cut(cache, b, span.begin, sinks, pieces);
      written += cut(cache, b, span.begin + begin, count, pieces + written);
      pieces[written++] = replayed.slice(0, b, 1).slice(2, 0, end);
      return chunked_tensor_view<const T>(pieces, written);
    };
    part_of_layer.key = join(layer_.key, replay_.key, keys_);
    if (with_values) part_of_layer.value = join(layer_.value, replay_.value, values_);
    part_of_layer.metric = layer_.metric;
    if (!compute) {
      return check_layer(part_of_layer, request_.shape, request_.window, true, with_values,
                         needs_metric(request_.score));
    }
    if (replay_.hidden_norm.data != nullptr) {
      request_.temporal = {&replay_.hidden_norm(b, end - request_.window), replay_.hidden_norm.stride(1)};
    }
    return backend_.token_scores(request_, part_of_layer, scratch_, out_);
  }

  Backend& backend_;
  const layer_view<T>& layer_;
  const kv_zip_chunk& chunk_;
  const kv_zip_replay<T>& replay_;
  request request_;
  part* keys_;
  part* values_;
  tensor_view<real, 3> out_;
  typename Backend::template scratch<request> scratch_;
};

/// What a layer, a chunk and a replay must be for each other; the rest is `check_layer`'s.
template <element T>
[[nodiscard]] status check_kv_zip(const layer_view<T>& layer, const kv_zip_chunk& chunk,
                                  const kv_zip_replay<T>& replay) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  if (chunk.begin < 0 || chunk.length < 0 || chunk.sink < 0) {
    return status::error(errc::invalid_argument,
                         "the chunk begins at %lld, has %lld tokens and %lld sinks: none may be negative",
                         ll(chunk.begin), ll(chunk.length), ll(chunk.sink));
  }
  if (layer.key.missing()) return status::error(errc::missing_input, "the layer has no key");
  if (layer.head_lengths.data != nullptr) {
    return status::error(errc::unsupported, "kv_zip scores a prompt: its heads may not have lengths of their own");
  }
  const index_t rows = replay.query.extent(2);
  if (rows < 1) return status::error(errc::invalid_argument, "the replay has %lld rows, must be at least 1", ll(rows));
  const auto check_part = [&](const char* name, const auto& part, std::size_t axis) -> status {
    if (part.data == nullptr) return status::error(errc::missing_input, "the replay has no %s", name);
    if (part.extent(0) != layer.key.extent(0)) {
      return status::error(errc::shape_mismatch, "the replay's %s has %lld sequences, the layer %lld", name,
                           ll(part.extent(0)), ll(layer.key.extent(0)));
    }
    if (part.extent(axis) == rows) return detail::check_view(name, part);
    return status::error(errc::shape_mismatch, "the replay's %s has %lld rows, its query %lld", name,
                         ll(part.extent(axis)), ll(rows));
  };
  RESTKV_RETURN_IF_FAILED(check_part("query", replay.query, 2));
  RESTKV_RETURN_IF_FAILED(check_part("key", replay.key, 2));
  RESTKV_RETURN_IF_FAILED(check_groups(replay.query.extent(1), layer.key.extent(1)));
  const bool plus = replay.hidden_norm.data != nullptr;
  RESTKV_RETURN_IF_FAILED(check_layer(layer, shape_of(layer), 0, false, plus, false));
  if (!plus) return {};
  RESTKV_RETURN_IF_FAILED(check_part("hidden_norm", replay.hidden_norm, 1));
  return check_part("value", replay.value, 2);
}

/// Calls body(a run of the score that the replay asks for).
template <class Backend, element T, class Body>
[[nodiscard]] status with_kv_zip_run(Backend& backend, const layer_view<T>& layer, const kv_zip_chunk& chunk,
                                     const kv_zip_replay<T>& replay, workspace& space, const Body& body) {
  RESTKV_RETURN_IF_FAILED(check_kv_zip(layer, chunk, replay));
  if (replay.hidden_norm.data != nullptr) {
    kv_zip_run<Backend, la_prox, T> run(backend, layer, chunk, replay, space);
    RESTKV_RETURN_IF_FAILED(space.check());
    return body(run);
  }
  kv_zip_run<Backend, snap_kv, T> run(backend, layer, chunk, replay, space);
  RESTKV_RETURN_IF_FAILED(space.check());
  return body(run);
}

}  // namespace detail

/// Bytes of workspace that `kv_zip` needs for a chunk; chunks and replays that are no longer need no more.
template <tensor_backend Backend, element T>
[[nodiscard]] status kv_zip_bytes(Backend& backend, const layer_view<T>& layer, const kv_zip_chunk& chunk,
                                  const kv_zip_replay<T>& replay, std::size_t& bytes) {
  workspace counting;
  RESTKV_RETURN_IF_FAILED(
      detail::with_kv_zip_run(backend, layer, chunk, replay, counting, [](const auto&) { return status(); }));
  bytes = counting.required_bytes();
  return {};
}

/// KVzip (arXiv 2505.23416): what a token is worth is the most attention that any query pays it while the model repeats
/// the prompt. The prompt is repeated in chunks (of 2048 tokens in the paper); a chunk's queries see the sinks, the
/// chunk and the replay up to themselves, and score[n] = max over the KV head's query heads h and the replayed queries
/// t of A[h, t, n]. With `hidden_norm` it is KVzip+: A[h, t, n] ||W[h] v[n]|| / ||h_t||.
///
/// layer: the prompt's cache, with `lengths` where sequences are padded; for KVzip+ with its metric (see
/// `output_metric`). scores: [batch, kv_heads, tokens], beside the layer's token axis; those of the chunk's tokens are
/// written. Rank them by `given_scores` once all chunks are done, sinks protected; the published policy lets all heads
/// of all layers compete.
///
/// A damaged key gets no attention, a NaN in a value is a NaN of its token. Fails, before anything is written, on what
/// does not fit. Allocates nothing with `eigen_backend`. Cost: window attention, (sink + length + rows) rows d
/// multiply-adds for each query head, and for KVzip+ d^2 / 2 a token and 64 rows.
template <tensor_backend Backend, element T>
[[nodiscard]] status kv_zip(Backend& backend, const layer_view<T>& layer, const kv_zip_chunk& chunk,
                            const kv_zip_replay<T>& replay, const tensor_view<float, 3>& scores, workspace space) {
  RESTKV_RETURN_IF_FAILED(detail::check_kv_zip(layer, chunk, replay));
  if (space.counting()) return status::error(errc::workspace_too_small, "kv_zip was given a workspace without memory");
  const index_t wanted[] = {layer.key.extent(0), layer.key.extent(1), layer.key.extent(2)};
  const char* const axes[] = {"sequences", "heads", "tokens"};
  for (std::size_t axis = 0; axis < 3; ++axis) {
    if (scores.extent(axis) >= wanted[axis] && (scores.data != nullptr || scores.size() == 0)) continue;
    return status::error(errc::shape_mismatch, "scores has room for %lld %s, the layer has %lld",
                         static_cast<long long>(scores.data == nullptr ? 0 : scores.extent(axis)), axes[axis],
                         static_cast<long long>(wanted[axis]));
  }
  return detail::with_kv_zip_run(backend, layer, chunk, replay, space, [&](auto& run) { return run.run(scores); });
}

}  // namespace restkv
