// SPDX-License-Identifier: Apache-2.0
/// @file
/// `thrust_backend<System>`: the primitives of a backend on any Thrust system, the host's or a GPU.
#pragma once

#include <restkv/backend/thrust/scoring.cuh>
#include <restkv/backend/thrust/top_k.cuh>

#include <algorithm>
#include <array>
#include <span>

namespace restkv {

/// What may be tuned without changing a kept set.
struct thrust_tuning {
  /// Floats that a stage of scoring works on together; the host calls the algorithms again for each such slab.
  index_t slab_floats = index_t(1) << 24;
};

namespace on_thrust {

/// Writes a few values, which ride in the function object: nothing is copied from pageable memory. For each value.
template <class T>
struct write_values {
  static constexpr std::size_t room = 512 / sizeof(T);

  std::array<T, room> values;
  T* to;

  RESTKV_HD void operator()(index_t i) const noexcept { to[i] = values[static_cast<std::size_t>(i)]; }
};

/// A caller's function object that need not be copied. For each index.
template <class Body>
struct call_body {
  const Body* body;

  void operator()(index_t i) const { (*body)(i); }
};

}  // namespace on_thrust

/// Scores and selection as Thrust algorithms over whole batches: `thrust_cpp`, `thrust_omp` and `thrust_tbb` on the
/// host, `thrust_cuda` (nvcc) on a stream. Models `tensor_backend` and `bulk_backend`.
///
/// Sums are made in double, in an order that depends on no thread count, so scores have the same bits on any number of
/// threads. Each logit is computed twice; extra memory: a slab (`thrust_tuning`), a double a query head and token, and
/// what Thrust's own algorithms take for a while (a failure to get it is `errc::out_of_memory`).
///
/// On `thrust_cuda` all tensors, the metric and W_O among them, lie in the device's memory and are one chunk each;
/// scores of whole heads run on the CPU only. Nothing waits for the device; temporary memory is taken and given back in
/// the stream's order.
template <class System>
class thrust_backend {
 public:
  using score_type = float;                                                  ///< all scores are float
  static constexpr memory_space space = on_thrust::instance<System>::space;  ///< of all tensors

  /// The arguments of the system: none, or a CUDA stream.
  template <class... Args>
  requires std::constructible_from<on_thrust::instance<System>, Args...>
  explicit thrust_backend(Args... args) : system_(args...) {}
  /// With a tuning.
  template <class... Args>
  requires std::constructible_from<on_thrust::instance<System>, Args...>
  explicit thrust_backend(const thrust_tuning& tuning, Args... args) : system_(args...), tuning_(tuning) {
    tuning_.slab_floats = std::max<index_t>(tuning_.slab_floats, 1);
  }

  /// As constructed.
  [[nodiscard]] const thrust_tuning& tuning() const noexcept { return tuning_; }

  /// Runs body(0) .. body(n - 1), each once, and returns when all are done.
  template <class Body>
  requires(space == memory_space::host) void parallel_for(index_t n, const Body& body) const {
    on_thrust::loop(system_.policy(), n, on_thrust::call_body<Body>{&body});
  }

  /// Working memory of a request; see `tensor_backend`.
  template <class Request>
  class scratch : public on_thrust::scratch<Request, space> {
   public:
    /// Counts where the workspace counts.
    scratch(const thrust_backend& backend, const Request& request, workspace& from)
        : on_thrust::scratch<Request, space>(request, backend.tuning().slab_floats, from) {}
  };

  /// See `tensor_backend`.
  template <class Request, element T>
  status token_scores(const Request& request, const layer_view<T, space>& layer, scratch<Request>& scratch,
                      tensor_view<float, 3, space> out) const {
    if constexpr (on_thrust::needs_of<Request>::whole_heads) {
      static_assert(space == memory_space::host, "scores of whole heads run on the CPU only");
      return on_thrust::guarded([&] { score_whole_heads(request, layer, scratch, out); });
    } else {
      on_thrust::problem<T, space> p;
      RESTKV_RETURN_IF_FAILED(prepare(request, layer, scratch, p));
      if (p.heads() == 0 || p.tokens == 0) return {};
      return on_thrust::guarded(
          [&] { on_thrust::scoring<System, Request, T, space>(system_, request, p, scratch).run(out); });
    }
  }

  /// See `tensor_backend`.
  template <class Request, element T>
  status window_drift(const Request& request, const layer_view<T, space>& layer, std::span<const index_t> most_attended,
                      scratch<Request>& scratch, tensor_view<double, 2, space> out) const {
    if constexpr (!on_thrust::needs_of<Request>::window) {
      return on_thrust::guarded([&] { on_thrust::loop(system_.policy(), out.size(), on_thrust::clear_drift{out.data}); });
    } else {
      on_thrust::problem<T, space> p;
      RESTKV_RETURN_IF_FAILED(prepare(request, layer, scratch, p));
      p.perturbation = {};
      RESTKV_RETURN_IF_FAILED(upload(scratch.most_attended, most_attended));
      if (p.heads() == 0) return {};
      return on_thrust::guarded([&] {
        if (p.tokens == 0) return on_thrust::loop(system_.policy(), out.size(), on_thrust::clear_drift{out.data});
        on_thrust::measure_drift(system_, p, scratch.slab(),
                                 scratch.parts_at_once(on_thrust::drift_memory::bytes_of_row(p.tokens)),
                                 scratch.most_attended, scratch.balance, out);
      });
    }
  }

  /// See `bulk_backend`.
  template <class F>
  status for_each(index_t n, const F& body) const {
    static_assert(std::is_trivially_copyable_v<F>);
    return on_thrust::guarded([&] { on_thrust::loop(system_.policy(), n, body); });
  }

  /// See `bulk_backend`.
  template <class T>
  status upload(T* to, std::span<const std::type_identity_t<T>> values) const {
    return on_thrust::guarded([&] {
      on_thrust::write_values<T> piece{};
      while (!values.empty()) {
        const auto part = values.first(std::min(values.size(), piece.room));
        std::copy(part.begin(), part.end(), piece.values.begin());
        piece.to = to;
        on_thrust::loop(system_.policy(), static_cast<index_t>(part.size()), piece);
        to += part.size();
        values = values.subspan(part.size());
      }
    });
  }

  /// See `bulk_backend`.
  class top_k_scratch : public on_thrust::top_k_memory {
   public:
    /// Counts where the workspace counts.
    top_k_scratch(const thrust_backend&, const bulk_shape& shape, workspace& from)
        : on_thrust::top_k_memory(shape, from) {}
  };

  ///@{
  /// See `bulk_backend`.
  status find_pivots(top_k_scratch& scratch, const std::uint32_t* keys, const bulk_rows& rows, index_t rows_per_segment,
                     const index_t* wanted, top_k_pivot<std::uint32_t>* pivots) const {
    return on_thrust::guarded(
        [&] { on_thrust::find_pivots(system_, scratch, keys, rows, rows_per_segment, wanted, pivots); });
  }
  status count_chosen(top_k_scratch& scratch, const std::uint32_t* keys, const bulk_rows& rows,
                      index_t rows_per_segment, const top_k_pivot<std::uint32_t>* pivots, index_t* counts) const {
    return on_thrust::guarded(
        [&] { on_thrust::count_chosen(system_, scratch, keys, rows, rows_per_segment, pivots, counts); });
  }
  status write_chosen(top_k_scratch& scratch, const std::uint32_t* keys, const bulk_rows& rows,
                      const top_k_pivot<std::uint32_t>* pivots, const bulk_kept& kept) const {
    return on_thrust::guarded([&] { on_thrust::write_chosen(system_, scratch, keys, rows, pivots, kept); });
  }
  ///@}

 private:
  /// The layer as functors see it, and its table of heads in the scratch.
  template <class Request, element T>
  [[nodiscard]] status prepare(const Request& request, const layer_view<T, space>& layer, scratch<Request>& scratch,
                               on_thrust::problem<T, space>& p) const {
    if constexpr (space == memory_space::device) {
      static_assert(!std::is_same_v<T, double>, "double is not supported on a GPU");
      const index_t chunks = std::max(layer.key.chunks(), layer.value.chunks());
      if (chunks > 1) {
        return status::error(errc::unsupported, "a cache of %lld chunks: on a device it must be one",
                             static_cast<long long>(chunks));
      }
      if (!layer.key.missing()) p.key = layer.key.chunk(0);
      if (!layer.value.missing()) p.value = layer.value.chunk(0);
    } else {
      p.key = layer.key;
      p.value = layer.value;
    }
    p.query = layer.query;
    p.projection = layer.projection;
    if (needs_metric(request.score)) p.factor = layer.metric.factor;
    p.spans = scratch.spans;
    p.batch = request.shape.batch;
    p.query_heads = request.shape.query_heads;
    p.group = request.shape.group();
    p.head_dim = request.shape.head_dim;
    p.tokens = layer.key.extent(2);
    p.lanes = std::min(on_thrust::lanes_of(request), p.tokens);
    p.root_of_channels = std::sqrt(static_cast<double>(p.head_dim));
    p.perturbation = perturbation_of(request.score);
    std::array<on_thrust::head_span, 32> spans;
    std::size_t count = 0;
    on_thrust::head_span* to = scratch.spans;
    const auto flush = [&]() -> status {
      const std::size_t taken = std::exchange(count, 0);
      const status outcome = upload(to, std::span<const on_thrust::head_span>(spans.data(), taken));
      to += taken;
      return outcome;
    };
    for (index_t b = 0; b < request.shape.batch; ++b) {
      for (index_t h = 0; h < request.shape.kv_heads; ++h) {
        const sequence_span span = sequence(layer, b, h);
        const index_t window = on_thrust::needs_of<Request>::window ? request.window_of(span.length) : 0;
        spans[count++] = {span.begin, span.length, window, request.past_of(span.length),
                          window > 0 ? first_window_row(layer, b, window) : 0};
        if (count == spans.size()) RESTKV_RETURN_IF_FAILED(flush());
      }
    }
    return flush();
  }

  /// A head score's rows, as many at a time as their scratch memory holds.
  template <class Request, element T>
  void score_whole_heads(const Request& request, const layer_view<T>& layer, scratch<Request>& scratch,
                         const tensor_view<float, 3>& out) const {
    const index_t rows = request.shape.batch * request.heads();
    const index_t of_row = on_thrust::scratch_of_row(request);
    const index_t at_once = std::min(rows, scratch.parts_at_once(of_row * static_cast<index_t>(sizeof(float))));
    for (index_t first = 0; first < rows; first += at_once) {
      const index_t count = std::min(at_once, rows - first);
      workspace from = scratch.slab();
      auto* const memory = from.template take<float>(count * of_row);
      on_thrust::loop(system_.policy(), count,
                      on_thrust::score_heads<Request, T>{&request, &layer, first, memory, out});
    }
  }

  on_thrust::instance<System> system_;
  thrust_tuning tuning_;
};

}  // namespace restkv
