// SPDX-License-Identifier: Apache-2.0
/// @file
/// `kernel_backend<Executor>`: the primitives of a backend as kernels, on whatever runs them.
#pragma once

#include <restkv/backend/bulk.hpp>
#include <restkv/kernel/attention_scores.hpp>
#include <restkv/kernel/bulk_loops.hpp>
#include <restkv/kernel/choose_top_k.hpp>
#include <restkv/kernel/drift_select.hpp>

#include <concepts>
#include <span>
#include <utility>

namespace restkv {

/// What may be tuned without changing a kept set, given the same scores.
struct kernel_tuning {
  kernel::attention_tuning attention{};  ///< of scores; sums are made in another order, so they move by rounding
  kernel::radix_tuning top_k{};          ///< of the selection
  bool pruning = true;  ///< score exactly only tokens that a bound does not rule out, where the policy admits it
  index_t least_pruned_tokens = 8192;  ///< of a plan: shorter sequences are scored whole, which takes fewer launches
};

/// Models `tensor_backend`, `bulk_backend` and `bounding_backend`. Executor: `kernel::stream_executor` (`cuda_backend`),
/// or `kernel::host_executor` (`host_kernel_backend`), which runs the very same kernel bodies on the CPU.
///
/// Tensors lie in the executor's memory, in one chunk or a few. Nothing allocates, waits or reads back, so calls can be
/// captured in a CUDA graph. Scores of whole heads do not run on it (errc::unsupported). A launch that fails is
/// reported by the call that made it, as errc::device_failure; what was launched before it runs.
template <class Executor>
class kernel_backend {
 public:
  using executor_type = Executor;                         ///< what runs the kernels
  using score_type = float;                               ///< all scores are float
  static constexpr memory_space space = Executor::space;  ///< of all tensors

  /// The arguments of the executor: a stream, or a seed and a recorder of conflicts.
  template <class... Arguments>
  requires std::constructible_from<Executor, Arguments...>
  explicit kernel_backend(Arguments&&... arguments) : executor_(std::forward<Arguments>(arguments)...) {}
  /// An executor, and how it is to be used.
  kernel_backend(const Executor& executor, const kernel_tuning& tuning) : executor_(executor), tuning_(tuning) {}

  /// As constructed.
  [[nodiscard]] const kernel_tuning& tuning() const noexcept { return tuning_; }
  /// What runs the kernels, for kernels of your own between the backend's.
  [[nodiscard]] Executor& executor() noexcept { return executor_; }

  /// Runs body(0) .. body(n - 1), each once, and returns when all are done.
  template <class Body>
  void parallel_for(index_t n, const Body& body) const requires(space == memory_space::host) {
    for (index_t i = 0; i < n; ++i) body(i);
  }

  /// Working memory of a request; see `tensor_backend`.
  template <class Request>
  class scratch : public kernel::attention_scratch<Request> {
    using base = kernel::attention_scratch<Request>;

   public:
    /// Counts where the workspace counts.
    scratch(const kernel_backend& backend, const Request& request, workspace& from)
        : base(request, backend.tuning().attention, from, backend.bounds_pay(request)) {}
    /// See `tensor_backend`. [batch, query_heads]
    [[nodiscard]] tensor_view<double, 2, space> drift() const noexcept {
      const auto view = base::drift();
      return {view.data, view.extents, view.strides};
    }
  };

  /// See `tensor_backend`.
  template <class Request, element T>
  [[nodiscard]] status token_scores(const Request& request, const layer_view<T, space>& layer,
                                    scratch<Request>& scratch, tensor_view<float, 3, space> out) {
    return token_scores_of(layer, request, layer, scratch, out);
  }

  /// Bounds need no product with W_O's factor and, in the order `before`, no product with each query's output. In the
  /// order `after` without W_O they would cost what the scores cost.
  template <class Request>
  [[nodiscard]] bool bounds_pay(const Request& request) const noexcept {
    if constexpr (bounded_by_distance<Request>()) {
      return tuning_.pruning && request.shape.tokens >= tuning_.least_pruned_tokens &&
             (order_of(request.score) == query_order::before || needs_metric(request.score));
    } else {
      return false;
    }
  }

  /// See `bounding_backend`.
  template <class Request, element T>
  [[nodiscard]] status score_bounds(const Request& request, const layer_view<T, space>& layer,
                                    scratch<Request>& scratch, tensor_view<float, 3, space> out) {
    return score_bounds_of(layer, request, layer, scratch, out);
  }

  /// See `bounding_backend`.
  template <class Request, element T>
  [[nodiscard]] status exact_scores(const Request& request, const layer_view<T, space>& layer,
                                    scratch<Request>& scratch, tensor_view<token_state, 3, space> states,
                                    tensor_view<float, 3, space> out) {
    return exact_scores_of(layer, request, layer, scratch, states, out);
  }

  /// See `tensor_backend`.
  template <class Request, element T>
  [[nodiscard]] status window_drift(const Request& request, const layer_view<T, space>& layer,
                                    std::span<const index_t> most_attended, scratch<Request>& scratch,
                                    tensor_view<double, 2, space> out) {
    return window_drift_of(layer, request, layer, most_attended, scratch, out);
  }

  /// See `bulk_backend`.
  template <class Body>
  [[nodiscard]] status for_each(index_t n, const Body& body) {
    static_assert(std::is_trivially_copyable_v<Body>);
    kernel::for_each(executor_, n, body);
    return outcome("a loop");
  }

  /// See `bulk_backend`. Values ride in the parameters of kernels, 2 KB a launch.
  template <class T>
  [[nodiscard]] status upload(T* to, std::span<const std::type_identity_t<T>> values) {
    kernel::upload(executor_, to, values);
    return outcome("an upload");
  }

  /// See `bulk_backend`.
  class top_k_scratch : public kernel::top_k_memory {
   public:
    /// Counts where the workspace counts.
    top_k_scratch(const kernel_backend& backend, const bulk_shape& shape, workspace& from)
        : kernel::top_k_memory(backend.tuning().top_k, shape, from) {}
  };

  ///@{
  /// See `bulk_backend`.
  [[nodiscard]] status find_pivots(top_k_scratch& scratch, const std::uint32_t* keys, const bulk_rows& rows,
                                   index_t rows_per_segment, const index_t* wanted,
                                   top_k_pivot<std::uint32_t>* pivots) {
    kernel::find_pivots(executor_, scratch, keys, rows, rows_per_segment, wanted, pivots);
    return outcome("the pivots of a top-k");
  }
  [[nodiscard]] status count_chosen(top_k_scratch& scratch, const std::uint32_t* keys, const bulk_rows& rows,
                                    index_t rows_per_segment, const top_k_pivot<std::uint32_t>* pivots,
                                    index_t* counts) {
    kernel::count_chosen(executor_, scratch, keys, rows, rows_per_segment, pivots, counts);
    return outcome("the counts of a top-k");
  }
  [[nodiscard]] status write_chosen(top_k_scratch& scratch, const std::uint32_t* keys, const bulk_rows& rows,
                                    const top_k_pivot<std::uint32_t>* pivots, const bulk_kept& kept) {
    kernel::write_chosen(executor_, scratch, keys, rows, pivots, kept);
    return outcome("the positions of a top-k");
  }
  ///@}

  /// What became of the launches since the last call; `action` begins the message of a failure.
  [[nodiscard]] status outcome([[maybe_unused]] const char* action) {
    if constexpr (requires { executor_.take_status(action); }) {
      return executor_.take_status(action);
    } else {
      return {};
    }
  }

 protected:
  ///@{
  /// The primitives, with keys and values of `caches`: the layer itself, or what else the kernels read.
  template <class Caches, class Request, element T>
  [[nodiscard]] status token_scores_of(const Caches& caches, const Request& request, const layer_view<T, space>& layer,
                                       scratch<Request>& scratch, const tensor_view<float, 3, space>& out) {
    RESTKV_RETURN_IF_FAILED(kernel::token_scores(executor_, request, layer, caches, metric_of(layer), scratch, out));
    return outcome("scores of tokens");
  }
  template <class Caches, class Request, element T>
  [[nodiscard]] status score_bounds_of(const Caches& caches, const Request& request, const layer_view<T, space>& layer,
                                       scratch<Request>& scratch, const tensor_view<float, 3, space>& out) {
    const auto& spectrum = layer.metric.spectrum;
    RESTKV_RETURN_IF_FAILED(kernel::score_bounds(executor_, request, layer, caches, metric_of(layer),
                                                 {spectrum.data, spectrum.stride(0)}, scratch, out));
    return outcome("bounds on the scores of tokens");
  }
  template <class Caches, class Request, element T>
  [[nodiscard]] status exact_scores_of(const Caches& caches, const Request& request, const layer_view<T, space>& layer,
                                       scratch<Request>& scratch, const tensor_view<token_state, 3, space>& states,
                                       const tensor_view<float, 3, space>& out) {
    RESTKV_RETURN_IF_FAILED(
        kernel::exact_scores(executor_, request, layer, caches, metric_of(layer), scratch, states, out));
    return outcome("scores of some tokens");
  }
  template <class Caches, class Request, element T>
  [[nodiscard]] status window_drift_of(const Caches& caches, const Request& request, const layer_view<T, space>& layer,
                                       std::span<const index_t> most_attended, scratch<Request>& scratch,
                                       const tensor_view<double, 2, space>& out) {
    RESTKV_RETURN_IF_FAILED(kernel::window_drift(executor_, request, layer, caches, most_attended, scratch, out));
    return outcome("the drift of a window");
  }
  ///@}

 private:
  template <element T>
  [[nodiscard]] static kernel::metric_source metric_of(const layer_view<T, space>& layer) noexcept {
    const auto& factor = layer.metric.factor;
    return {factor.data, {factor.stride(0), factor.stride(1), factor.stride(2)}};
  }

  Executor executor_;
  kernel_tuning tuning_;
};

}  // namespace restkv
