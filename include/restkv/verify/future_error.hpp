// SPDX-License-Identifier: Apache-2.0
/// @file
/// `future_error`: what a kept set costs the queries that come after the prompt, which a compressed cache really meets.
#pragma once

#include <restkv/verify/output_error.hpp>

#include <vector>

namespace restkv {

/// A kept set that owns its positions. Movable.
class owned_kept_tokens {
 public:
  owned_kept_tokens() = default;
  /// Room for `capacity` positions a head; all lengths are 0.
  owned_kept_tokens(index_t batch, index_t heads, index_t capacity)
      : batch_(batch),
        heads_(heads),
        capacity_(capacity),
        positions_(static_cast<std::size_t>(batch * heads * capacity)),
        lengths_(static_cast<std::size_t>(batch * heads)) {}

  /// To fill in or read. Valid as long as this object lives and is not assigned to.
  [[nodiscard]] kept_tokens kept() noexcept {
    return {{positions_.data(), {batch_, heads_, capacity_}}, {lengths_.data(), {batch_, heads_}}};
  }
  /// To be read. Valid as long as this object lives and is not assigned to.
  [[nodiscard]] const_kept_tokens kept() const noexcept {
    return {{positions_.data(), {batch_, heads_, capacity_}}, {lengths_.data(), {batch_, heads_}}};
  }
  /// The same, to be read.
  operator const_kept_tokens() const noexcept { return kept(); }  // NOLINT(google-explicit-constructor)

 private:
  index_t batch_ = 0;
  index_t heads_ = 0;
  index_t capacity_ = 0;
  std::vector<position_t> positions_;
  std::vector<position_t> lengths_;
};

/// The kept set of a prompt of `tokens` tokens, plus the positions [tokens, tokens + more) for every head: tokens that
/// came after the eviction are all there. `kept` must have passed `check_kept` for `tokens`.
[[nodiscard]] inline owned_kept_tokens append_tokens(const const_kept_tokens& kept, index_t tokens, index_t more) {
  owned_kept_tokens extended(kept.batch(), kept.heads(), kept.capacity() + more);
  const kept_tokens to = extended.kept();
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      const index_t length = kept.lengths(b, h);
      for (index_t i = 0; i < length; ++i) to.positions(b, h, i) = kept.positions(b, h, i);
      for (index_t i = 0; i < more; ++i) to.positions(b, h, length + i) = static_cast<position_t>(tokens + i);
      to.lengths(b, h) = static_cast<position_t>(length + more);
    }
  }
  return extended;
}

/// The tokens that a model wrote after the prompt, as its full cache holds them. Queries and keys are after RoPE.
template <element T>
struct future_view {
  tensor_view<const T, 4> query{};  ///< [batch, query_heads, more, head_dim]
  tensor_view<const T, 4> key{};    ///< [batch, kv_heads, more, head_dim]
  tensor_view<const T, 4> value{};  ///< [batch, kv_heads, more, head_dim]
};

namespace detail {

/// A prompt's layer with the tokens that came after it behind its own, and their queries. Owns the lists of chunks.
template <element T>
struct layer_with_future {
  std::vector<tensor_view<const T, 4>> keys;
  std::vector<tensor_view<const T, 4>> values;
  layer_view<T> view;  ///< prompt.lengths as they were; without a keep_mask

  [[nodiscard]] status join(const layer_view<T>& prompt, const future_view<T>& future) {
    const auto ll = [](index_t n) { return static_cast<long long>(n); };
    RESTKV_RETURN_IF_FAILED(check_view("future.query", future.query));
    RESTKV_RETURN_IF_FAILED(check_view("future.key", future.key));
    RESTKV_RETURN_IF_FAILED(check_view("future.value", future.value));
    const index_t tokens = prompt.key.extent(2);
    const index_t more = future.key.extent(2);
    if (future.query.extent(2) != more) {
      return status::error(errc::shape_mismatch,
                           "the future has %lld queries and %lld keys: one each a token is needed",
                           ll(future.query.extent(2)), ll(more));
    }
    if (tokens > std::numeric_limits<position_t>::max() - more) {
      return status::error(errc::invalid_argument, "%lld tokens and %lld future ones pass the longest axis, %lld",
                           ll(tokens), ll(more), ll(std::numeric_limits<position_t>::max()));
    }
    const auto joined = [](const chunked_tensor_view<const T>& cache, const tensor_view<const T, 4>& last) {
      std::vector<tensor_view<const T, 4>> chunks;
      for (index_t i = 0; i < cache.chunks(); ++i) chunks.push_back(cache.chunk(i));
      chunks.push_back(last);
      return chunks;
    };
    keys = joined(prompt.key, future.key);
    values = joined(prompt.value, future.value);
    view = prompt;
    view.query = future.query;
    view.key = {keys.data(), static_cast<index_t>(keys.size())};
    view.value = {values.data(), static_cast<index_t>(values.size())};
    view.keep_mask = {};
    return {};
  }
};

}  // namespace detail

/// `output_error` of the `more` queries of `future` against the cache of `prompt` followed by the future tokens, of
/// which `kept` was chosen for the prompt and none of the future ones is evicted. prompt.query is not looked at.
///
/// Errors: those of `output_error`; a prompt whose sequences are shorter than the token axis and padded on the right
/// (errc::unsupported: the future tokens would not follow them).
template <tensor_backend Backend, element T>
[[nodiscard]] status future_error(Backend& backend, const const_kept_tokens& kept, const layer_view<T>& prompt,
                                  const future_view<T>& future, output_errors& out) {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  const index_t tokens = prompt.key.extent(2);
  const index_t more = future.key.extent(2);
  RESTKV_RETURN_IF_FAILED(check_layer(prompt, shape_of(prompt), 0, false, true, false));
  RESTKV_RETURN_IF_FAILED(check_kept(kept, prompt.key.extent(0), prompt.key.extent(1), tokens));
  detail::layer_with_future<T> whole;
  RESTKV_RETURN_IF_FAILED(whole.join(prompt, future));
  std::vector<std::int32_t> lengths;
  if (prompt.head_lengths.data != nullptr) {
    return status::error(errc::unsupported,
                         "the prompt's heads have lengths of their own: future tokens cannot follow all of them");
  }
  if (prompt.lengths.data != nullptr) {
    for (index_t b = 0; b < prompt.lengths.extent(0); ++b) {
      const index_t length = prompt.lengths(b);
      if (prompt.pad == padding::right && length < tokens) {
        return status::error(errc::unsupported,
                             "sequence %lld has %lld of %lld tokens and is padded on the right: future tokens cannot "
                             "follow it",
                             ll(b), ll(length), ll(tokens));
      }
      lengths.push_back(static_cast<std::int32_t>(length + more));
    }
    whole.view.lengths = {lengths.data(), {prompt.lengths.extent(0)}};
  }
  return output_error(backend, append_tokens(kept, tokens, more), whole.view, out);
}

#if RESTKV_EXCEPTIONS

/// `future_error` that throws `restkv::error`.
template <tensor_backend Backend, element T>
[[nodiscard]] output_errors future_error(Backend& backend, const const_kept_tokens& kept, const layer_view<T>& prompt,
                                         const future_view<T>& future) {
  output_errors errors;
  throw_if_failed(future_error(backend, kept, prompt, future, errors));
  return errors;
}

#endif

}  // namespace restkv
