// SPDX-License-Identifier: Apache-2.0
/// @file
/// `quantised_kernel_backend`: scores of keys and values that lie in memory as codes with scales, without a copy of
/// them.
#pragma once

#include <restkv/backend/kernel_backend.hpp>
#include <restkv/kernel/coded_rows.hpp>

namespace restkv {

/// A `kernel_backend` whose keys and values are those of two quantised caches: int8, 4 or 2 bits or e4m3, with
/// parameters of any groups (`quantised_view`). Kernels turn codes into numbers of the layer's type as they read a
/// tile, rounded as `dequantise` rounds them: scores, bounds and drift are bit by bit those of the dequantised tensors,
/// at a quarter to a half of the bytes.
///
/// `select` and `model_selection::add_layer` take it with `layer(...)` of the layer at hand; plans are made with it or
/// with the backend that it was made from. One object a layer; it is a view. What reads keys and values besides the
/// backend's primitives, rescorers and the verifier, does not go with it.
template <class Executor, element Scale>
class quantised_kernel_backend : public kernel_backend<Executor> {
  using base = kernel_backend<Executor>;

 public:
  static constexpr memory_space space = Executor::space;  ///< of all tensors
  using cache_type = quantised_view<const Scale, space>;  ///< of keys and of values

  /// For planning alone.
  explicit quantised_kernel_backend(const base& backend) : base(backend) {}
  /// key, value: [batch, kv_heads, tokens, head_dim] each, in the executor's memory. A score that needs no values goes
  /// without them.
  quantised_kernel_backend(const base& backend, const cache_type& key, const cache_type& value)
      : base(backend), caches_{key, value} {}

  /// The layer with keys and values of the caches' shapes, whose elements nobody may read.
  template <element T>
  [[nodiscard]] layer_view<T, space> layer(const layer_view<T, space>& rest) const noexcept {
    layer_view<T, space> made = rest;
    made.key = shape_of_cache<T>(caches_.key);
    if (caches_.value.codes.data != nullptr) made.value = shape_of_cache<T>(caches_.value);
    return made;
  }

  ///@{
  /// See `kernel_backend`. Fail, besides, on caches that are not consistent or not of the layer's shape.
  template <class Request>
  using scratch = typename base::template scratch<Request>;

  template <class Request, element T>
  [[nodiscard]] status token_scores(const Request& request, const layer_view<T, space>& layer,
                                    scratch<Request>& scratch, tensor_view<float, 3, space> out) {
    RESTKV_RETURN_IF_FAILED(check(layer, needs_values<decltype(request.score)>()));
    return this->token_scores_of(caches_, request, layer, scratch, out);
  }
  template <class Request, element T>
  [[nodiscard]] status score_bounds(const Request& request, const layer_view<T, space>& layer,
                                    scratch<Request>& scratch, tensor_view<float, 3, space> out) {
    RESTKV_RETURN_IF_FAILED(check(layer, needs_values<decltype(request.score)>()));
    return this->score_bounds_of(caches_, request, layer, scratch, out);
  }
  template <class Request, element T>
  [[nodiscard]] status exact_scores(const Request& request, const layer_view<T, space>& layer,
                                    scratch<Request>& scratch, tensor_view<token_state, 3, space> states,
                                    tensor_view<float, 3, space> out) {
    return this->exact_scores_of(caches_, request, layer, scratch, states, out);
  }
  template <class Request, element T>
  [[nodiscard]] status window_drift(const Request& request, const layer_view<T, space>& layer,
                                    std::span<const index_t> most_attended, scratch<Request>& scratch,
                                    tensor_view<double, 2, space> out) {
    RESTKV_RETURN_IF_FAILED(check(layer, false));
    return this->window_drift_of(caches_, request, layer, most_attended, scratch, out);
  }
  ///@}

 private:
  template <element T>
  [[nodiscard]] static tensor_view<const T, 4, space> shape_of_cache(const cache_type& cache) noexcept {
    static constexpr T nothing = narrow<T>(std::numeric_limits<float>::quiet_NaN());
    return {&nothing, {cache.batch(), cache.heads(), cache.tokens, cache.channels}, {0, 0, 0, 0}};
  }
  template <element T>
  [[nodiscard]] status check(const layer_view<T, space>& layer, bool with_values) const noexcept {
    RESTKV_RETURN_IF_FAILED(check_cache("key", caches_.key, layer.key));
    return with_values ? check_cache("value", caches_.value, layer.value) : status{};
  }
  template <class Shape>
  [[nodiscard]] static status check_cache(const char* name, const cache_type& cache, const Shape& shape) noexcept {
    RESTKV_RETURN_IF_FAILED(cache.check());
    constexpr const char* axes[] = {"sequences", "heads", "tokens", "channels"};
    const index_t extents[] = {cache.batch(), cache.heads(), cache.tokens, cache.channels};
    for (std::size_t axis = 0; axis < 4; ++axis) {
      RESTKV_RETURN_IF_FAILED(detail::check_equal(name, axes[axis], extents[axis], "the layer", shape.extent(axis)));
    }
    return {};
  }

  kernel::coded_caches<Scale, space> caches_;
};

}  // namespace restkv
