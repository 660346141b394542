// SPDX-License-Identifier: Apache-2.0
// What device_selection.hpp promises, for any backend with device memory.
#pragma once

#include "cuda/device_selection.hpp"

#include <restkv/backend/cuda/output_metric.cuh>

#include <algorithm>
#include <limits>
#include <memory>

namespace restkv_test {

using namespace restkv;

/// A copy of a layer on the device, dense whatever the host's strides were.
template <class T>
class device_layer {
 public:
  [[nodiscard]] status assign(const layer_view<T>& host) {
    const auto copy_tensor = [](const auto& source, device_buffer<T>& memory, auto& view) {
      std::vector<T> dense;
      for (index_t b = 0; b < source.extent(0); ++b) {
        for (index_t h = 0; h < source.extent(1); ++h) {
          for (index_t n = 0; n < source.extent(2); ++n) {
            for (index_t c = 0; c < source.extent(3); ++c) dense.push_back(source(b, h, n, c));
          }
        }
      }
      RESTKV_RETURN_IF_FAILED(memory.assign(dense));
      using view_t = tensor_view<const T, 4, memory_space::device>;
      view = view_t(memory.data(), {source.extent(0), source.extent(1), source.extent(2), source.extent(3)});
      return status{};
    };
    RESTKV_RETURN_IF_FAILED(copy_tensor(host.query, query_, view_.query));
    RESTKV_RETURN_IF_FAILED(copy_tensor(host.key.chunk(0), key_, view_.key));
    RESTKV_RETURN_IF_FAILED(copy_tensor(host.value.chunk(0), value_, view_.value));
    if (host.projection.data != nullptr) {
      const index_t rows = host.projection.extent(0);
      const index_t columns = host.projection.extent(1);
      std::vector<T> dense;
      for (index_t i = 0; i < rows * columns; ++i) dense.push_back(host.projection(i / columns, i % columns));
      RESTKV_RETURN_IF_FAILED(projection_.assign(dense));
      view_.projection = tensor_view<const T, 2, memory_space::device>(projection_.data(), {rows, columns});
    }
    if (!host.metric.missing()) {
      RESTKV_RETURN_IF_FAILED(metric_.assign(host.metric));
      view_.metric = metric_.view();
    }
    view_.lengths = host.lengths;
    view_.pad = host.pad;
    view_.head_lengths = host.head_lengths;
    view_.keep_mask = host.keep_mask;
    return {};
  }
  [[nodiscard]] const layer_view<T, memory_space::device>& view() const { return view_; }

 private:
  device_buffer<T> query_;
  device_buffer<T> key_;
  device_buffer<T> value_;
  device_buffer<T> projection_;
  device_output_metric metric_;
  layer_view<T, memory_space::device> view_;
};

class stream {
 public:
  stream() { made_ = cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking); }
  stream(const stream&) = delete;
  stream& operator=(const stream&) = delete;
  ~stream() {
    if (made_ == cudaSuccess) cudaStreamDestroy(stream_);
  }
  [[nodiscard]] status check() const { return cuda_status("creation of a stream", made_); }
  [[nodiscard]] cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
  cudaError_t made_;
};

/// A backend on a stream, set to prune selections of any length where it can.
template <class Backend>
[[nodiscard]] Backend backend_on(cudaStream_t stream) {
  if constexpr (requires(const Backend& made) { made.tuning().least_pruned_tokens; }) {
    auto tuning = Backend(stream).tuning();
    tuning.least_pruned_tokens = 0;
    return Backend(typename Backend::executor_type(stream), tuning);
  } else {
    return Backend(stream);
  }
}

/// Captures what `enqueue()` puts on a stream in a graph, where nothing runs yet, and launches that twice.
template <class Enqueue>
[[nodiscard]] status run_in_graph(cudaStream_t stream, const Enqueue& enqueue) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  RESTKV_RETURN_IF_FAILED(
      cuda_status("begin of a capture", cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal)));
  const status enqueued = enqueue();
  RESTKV_RETURN_IF_FAILED(cuda_status("end of a capture", cudaStreamEndCapture(stream, &graph)));
  RESTKV_RETURN_IF_FAILED(enqueued);
  RESTKV_RETURN_IF_FAILED(cuda_status("instantiation of a graph", cudaGraphInstantiate(&executable, graph)));
  status launched;
  for (int i = 0; i < 2 && launched.ok(); ++i) {
    launched = cuda_status("launch of a graph", cudaGraphLaunch(executable, stream));
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  return launched;
}

constexpr index_t guard_bytes = 4096;
constexpr unsigned char guard_value = 0x5a;

/// A selection with memory of its own: a workspace exactly as large as planned between two guards, and details.
template <class Backend, class Policy, class T>
class device_task {
 public:
  device_task(const plan<Policy>& made, const layer_view<T, memory_space::device>& layer)
      : plan_(made), layer_(layer) {}

  [[nodiscard]] status prepare(bool with_details) {
    RESTKV_RETURN_IF_FAILED(stream_.check());
    backend_ = std::make_unique<Backend>(backend_on<Backend>(stream_.get()));
    const std::vector<unsigned char> pattern(static_cast<std::size_t>(bytes() + 2 * guard_bytes), guard_value);
    RESTKV_RETURN_IF_FAILED(memory_.assign(pattern));
    const index_t rows = plan_.shape.batch * plan_.heads;
    const std::vector<float> unset(static_cast<std::size_t>(rows * plan_.shape.tokens),
                                   std::numeric_limits<float>::quiet_NaN());
    RESTKV_RETURN_IF_FAILED(score_.assign(unset));
    RESTKV_RETURN_IF_FAILED(smoothed_.assign(unset));
    RESTKV_RETURN_IF_FAILED(drift_.assign(std::vector<double>(static_cast<std::size_t>(rows))));
    details_ = {{score_.data(), {plan_.shape.batch, plan_.heads, plan_.shape.tokens}},
                {smoothed_.data(), {plan_.shape.batch, plan_.heads, plan_.shape.tokens}},
                {drift_.data(), {plan_.shape.batch, plan_.heads}}};
    with_details_ = with_details;
    return {};
  }
  [[nodiscard]] status enqueue() {
    return select(*backend_, plan_, layer_, workspace(memory_.data() + guard_bytes, static_cast<std::size_t>(bytes())),
                  kept_, with_details_ ? &details_ : nullptr);
  }
  /// The same by a graph.
  [[nodiscard]] status replay() {
    return run_in_graph(stream_.get(), [this] { return enqueue(); });
  }
  [[nodiscard]] status finish(selection_outcome<float>& outcome) {
    RESTKV_RETURN_IF_FAILED(cuda_status("synchronisation", cudaStreamSynchronize(stream_.get())));
    outcome.batch = plan_.shape.batch;
    outcome.heads = plan_.heads;
    outcome.tokens = plan_.shape.tokens;
    const index_t rows = outcome.batch * outcome.heads;
    std::vector<unsigned char> memory(static_cast<std::size_t>(memory_.size()));
    RESTKV_RETURN_IF_FAILED(memory_.copy_to(memory));
    for (index_t i = 0; i < guard_bytes; ++i) {
      for (const index_t at : {i, guard_bytes + bytes() + i}) {
        if (memory[static_cast<std::size_t>(at)] == guard_value) continue;
        return status::error(errc::device_failure, "byte %lld was written, the workspace is [%lld, %lld)",
                             static_cast<long long>(at - guard_bytes), 0LL, static_cast<long long>(bytes()));
      }
    }
    const auto on_host = [&](const auto* device) {
      return reinterpret_cast<const position_t*>(memory.data() +
                                                 (reinterpret_cast<const unsigned char*>(device) - memory_.data()));
    };
    const position_t* const lengths = rows > 0 ? on_host(kept_.lengths.data) : nullptr;
    for (index_t row = 0; row < rows; ++row) {
      const index_t count = lengths[row];
      if (count < 0 || count > plan_.capacity) {
        return status::error(errc::device_failure, "row %lld keeps %lld tokens, capacity is %lld",
                             static_cast<long long>(row), static_cast<long long>(count),
                             static_cast<long long>(plan_.capacity));
      }
      const position_t* const first = count > 0 ? on_host(kept_.positions.data) + row * plan_.capacity : nullptr;
      outcome.kept.emplace_back(first, first + count);
    }
    outcome.score.resize(static_cast<std::size_t>(score_.size()));
    outcome.smoothed.resize(static_cast<std::size_t>(smoothed_.size()));
    outcome.drift.resize(static_cast<std::size_t>(drift_.size()));
    RESTKV_RETURN_IF_FAILED(score_.copy_to(outcome.score));
    RESTKV_RETURN_IF_FAILED(smoothed_.copy_to(outcome.smoothed));
    return drift_.copy_to(outcome.drift);
  }

 private:
  [[nodiscard]] index_t bytes() const { return static_cast<index_t>(plan_.workspace_bytes); }

  const plan<Policy>& plan_;
  const layer_view<T, memory_space::device>& layer_;
  stream stream_;
  std::unique_ptr<Backend> backend_;
  device_buffer<unsigned char> memory_;
  device_buffer<float> score_;
  device_buffer<float> smoothed_;
  device_buffer<double> drift_;
  selection_details<float, memory_space::device> details_;
  device_kept_tokens kept_;
  bool with_details_ = true;
};

template <class Backend, class Policy, element T>
status run_on(const Policy& policy, const layer_view<T>& host, const device_run& how,
              selection_outcome<float>& outcome) {
  auto planner = backend_on<Backend>(nullptr);
  plan<Policy> made;
  RESTKV_RETURN_IF_FAILED(make_plan(planner, policy, shape_of(host), made));
  device_layer<T> layer;
  RESTKV_RETURN_IF_FAILED(layer.assign(host));
  std::vector<std::unique_ptr<device_task<Backend, Policy, T>>> tasks;
  for (int i = 0; i < how.streams; ++i) {
    tasks.push_back(std::make_unique<device_task<Backend, Policy, T>>(made, layer.view()));
    RESTKV_RETURN_IF_FAILED(tasks.back()->prepare(how.with_details));
  }
  for (auto& task : tasks) RESTKV_RETURN_IF_FAILED(how.in_graph ? task->replay() : task->enqueue());
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    selection_outcome<float> found;
    RESTKV_RETURN_IF_FAILED(tasks[i]->finish(found));
    if (i > 0 && found.kept != outcome.kept) {
      return status::error(errc::device_failure, "stream %zu of %zu chose another set than the first", i, tasks.size());
    }
    outcome = std::move(found);
  }
  return {};
}

}  // namespace restkv_test
