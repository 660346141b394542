// SPDX-License-Identifier: Apache-2.0
// The cost of choosing on a GPU, beside its floors: one read of K and V, the window's Q K^T by cuBLAS, and the speed of a
// copy. bench/run_gpu makes the whole table.
//
// Times are the device's, by events around each pass; the second-level cache is flushed before it. "of copy" is the
// bytes that must be moved at least, over the time, as a part of the bandwidth that a copy of 1 GiB reached in this run.
#include "gpu_problem.cuh"

#include <restkv/backend/cuda/backend.cuh>
#include <restkv/presets.hpp>
#include <restkv/select.hpp>

#include <benchmark/benchmark.h>
#include <cub/device/device_segmented_radix_sort.cuh>
#include <cublas_v2.h>

#include <functional>
#include <memory>
#include <string>

namespace {

using restkv::cuda_status;
using restkv::device_buffer;
using restkv::index_t;
using restkv::memory_space;
using restkv::throw_if_failed;
using element_type = restkv::bfloat16;
using problem = restkv_bench::gpu_problem<element_type>;

constexpr index_t budget = 1024;

void check(const char* action, cudaError_t error) { throw_if_failed(cuda_status(action, error)); }

/// Whatever ran before is out of the second-level cache.
void flush_cache() {
  static device_buffer<unsigned char> memory;
  if (memory.size() == 0) throw_if_failed(memory.allocate(index_t{256} << 20));
  check("flush of the cache", cudaMemsetAsync(memory.data(), 0, static_cast<std::size_t>(memory.size())));
}

/// Runs `pass` once for each iteration, and takes the device's time.
void time_passes(benchmark::State& state, const std::function<void()>& pass) {
  static cudaEvent_t begin = nullptr;
  static cudaEvent_t end = nullptr;
  if (begin == nullptr) {
    check("an event", cudaEventCreate(&begin));
    check("an event", cudaEventCreate(&end));
  }
  pass();
  check("the first pass", cudaDeviceSynchronize());
  for (auto _ : state) {
    flush_cache();
    check("an event", cudaEventRecord(begin));
    pass();
    check("an event", cudaEventRecord(end));
    check("a pass", cudaEventSynchronize(end));
    float milliseconds = 0;
    check("an event", cudaEventElapsedTime(&milliseconds, begin, end));
    state.SetIterationTime(static_cast<double>(milliseconds) * 1e-3);
  }
}

/// Bytes a second of a copy of 1 GiB, read and write together; measured once, the best of 20.
double copy_bandwidth() {
  static double best = 0;
  if (best > 0) return best;
  constexpr index_t bytes = index_t{1} << 30;
  device_buffer<unsigned char> from;
  device_buffer<unsigned char> to;
  throw_if_failed(from.allocate(bytes));
  throw_if_failed(to.allocate(bytes));
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  check("an event", cudaEventCreate(&begin));
  check("an event", cudaEventCreate(&end));
  for (int i = 0; i < 20; ++i) {
    check("an event", cudaEventRecord(begin));
    check("a copy", cudaMemcpyAsync(to.data(), from.data(), static_cast<std::size_t>(bytes), cudaMemcpyDeviceToDevice));
    check("an event", cudaEventRecord(end));
    check("a copy", cudaEventSynchronize(end));
    float milliseconds = 0;
    check("an event", cudaEventElapsedTime(&milliseconds, begin, end));
    best = std::max(best, 2.0 * static_cast<double>(bytes) / (static_cast<double>(milliseconds) * 1e-3));
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return best;
}

/// The counters of a row that must move `bytes` a pass.
void count_bytes(benchmark::State& state, double bytes) {
  state.counters["bytes"] = bytes;
  state.counters["of_copy"] = benchmark::Counter(bytes / copy_bandwidth(), benchmark::Counter::kIsIterationInvariantRate);
}

/// The problem of the row before is kept: rows of one size follow each other.
const problem& problem_of(const benchmark::State& state) {
  static std::unique_ptr<problem> made;
  if (made == nullptr || made->batch() != state.range(0) || made->tokens() != state.range(1)) {
    made.reset();
    made = std::make_unique<problem>(state.range(0), state.range(1));
  }
  return *made;
}

__global__ void __launch_bounds__(256) sum_words(const uint4* data, index_t count, unsigned* out) {
  unsigned sum = 0;
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const uint4 word = data[i];
    sum += word.x + word.y + word.z + word.w;
  }
  if (sum == 0x12345678u) *out = sum;  // so that nothing is optimised away
}

void read_row(benchmark::State& state) {
  const problem& layer = problem_of(state);
  static device_buffer<unsigned> out;
  if (out.size() == 0) throw_if_failed(out.allocate(1));
  time_passes(state, [&] {
    for (const element_type* data : {layer.key(), layer.value()}) {
      sum_words<<<2048, 256>>>(reinterpret_cast<const uint4*>(data), layer.cache_bytes() / 32, out.data());
    }
  });
  count_bytes(state, static_cast<double>(layer.cache_bytes()));
}

void product_row(benchmark::State& state) {
  const problem& layer = problem_of(state);
  constexpr int lanes = static_cast<int>(problem::query_heads / problem::kv_heads * problem::window);
  constexpr int d = static_cast<int>(problem::head_dim);
  const int tokens = static_cast<int>(layer.tokens());
  const int heads = static_cast<int>(layer.batch() * problem::kv_heads);
  device_buffer<float> logits;
  throw_if_failed(logits.allocate(index_t{heads} * lanes * tokens));
  cublasHandle_t handle = nullptr;
  if (cublasCreate(&handle) != CUBLAS_STATUS_SUCCESS) return state.SkipWithError("cuBLAS could not be started");
  const float one = 1;
  const float zero = 0;
  bool fine = true;
  time_passes(state, [&] {
    fine = fine && cublasGemmStridedBatchedEx(
                       handle, CUBLAS_OP_T, CUBLAS_OP_N, tokens, lanes, d, &one, layer.key(), CUDA_R_16BF, d,
                       static_cast<long long>(tokens) * d, layer.query(), CUDA_R_16BF, d,
                       static_cast<long long>(lanes) * d, &zero, logits.data(), CUDA_R_32F, tokens,
                       static_cast<long long>(lanes) * tokens, heads, CUBLAS_COMPUTE_32F,
                       CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS;
  });
  cublasDestroy(handle);
  if (!fine) state.SkipWithError("cuBLAS refused the product");
  count_bytes(state, static_cast<double>(layer.cache_bytes()) / 2);
}

template <class Policy>
void select_row(benchmark::State& state, const Policy& policy) {
  const problem& layer = problem_of(state);
  restkv::cuda_backend backend(nullptr);
  const auto plan = restkv::make_plan(backend, policy, restkv::shape_of(layer.view));
  device_buffer<unsigned char> memory;
  throw_if_failed(memory.allocate(static_cast<index_t>(plan.workspace_bytes)));
  restkv::device_kept_tokens kept;
  time_passes(state, [&] {
    throw_if_failed(restkv::select(backend, plan, layer.view,
                                   restkv::workspace(memory.data(), plan.workspace_bytes), kept));
  });
  state.counters["workspace"] = static_cast<double>(plan.workspace_bytes);
  count_bytes(state, static_cast<double>(layer.cache_bytes()));
}

__global__ void fill_keys(std::uint32_t* keys, index_t count) {
  const index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) keys[i] = restkv::order_key(restkv_bench::normal_of(3, i));
}

/// Rows of keys, as a selection ranks them.
struct key_rows {
  device_buffer<std::uint32_t> keys;
  device_buffer<restkv::bulk_span> spans;
  restkv::bulk_rows rows;

  key_rows(index_t count, index_t length) {
    throw_if_failed(keys.allocate(count * length));
    fill_keys<<<static_cast<unsigned>((count * length + 255) / 256), 256>>>(keys.data(), count * length);
    const auto units = static_cast<restkv::position_t>(length);
    const std::vector<restkv::bulk_span> one{{.length = units, .past = units, .end = units, .candidates = units}};
    throw_if_failed(spans.assign(one));
    rows = {.spans = spans.data(), .count = count, .rows_per_span = count, .stride = length};
  }
};

void top_k_row(benchmark::State& state) {
  const index_t count = state.range(0);
  const index_t length = state.range(1);
  const key_rows data(count, length);
  restkv::cuda_backend backend(nullptr);
  using scratch_t = restkv::cuda_backend::top_k_scratch;
  restkv::workspace counting;
  const restkv::bulk_shape shape{count, length};
  { scratch_t sized(backend, shape, counting); }
  device_buffer<unsigned char> memory;
  throw_if_failed(memory.allocate(static_cast<index_t>(counting.required_bytes())));
  restkv::workspace space(memory.data(), counting.required_bytes());
  scratch_t scratch(backend, shape, space);
  device_buffer<index_t> wanted;
  throw_if_failed(wanted.assign(std::vector<index_t>(static_cast<std::size_t>(count), budget)));
  device_buffer<restkv::top_k_pivot<std::uint32_t>> pivots;
  throw_if_failed(pivots.allocate(count));
  device_buffer<restkv::position_t> positions;
  device_buffer<restkv::position_t> lengths;
  throw_if_failed(positions.allocate(count * budget));
  throw_if_failed(lengths.allocate(count));
  time_passes(state, [&] {
    throw_if_failed(backend.find_pivots(scratch, data.keys.data(), data.rows, 1, wanted.data(), pivots.data()));
    throw_if_failed(backend.write_chosen(scratch, data.keys.data(), data.rows, pivots.data(),
                                         {positions.data(), lengths.data(), budget, 1}));
  });
  count_bytes(state, 4.0 * static_cast<double>(count * length));
}

/// What one writes without this library: sort every row, and take the first.
void top_k_by_sorting_row(benchmark::State& state) {
  const index_t count = state.range(0);
  const index_t length = state.range(1);
  const key_rows data(count, length);
  std::vector<index_t> begin(static_cast<std::size_t>(count + 1));
  for (std::size_t i = 0; i < begin.size(); ++i) begin[i] = static_cast<index_t>(i) * length;
  device_buffer<index_t> offsets;
  throw_if_failed(offsets.assign(begin));
  device_buffer<std::uint32_t> sorted;
  device_buffer<int> values;
  device_buffer<int> sorted_values;
  throw_if_failed(sorted.allocate(count * length));
  throw_if_failed(values.allocate(count * length));
  throw_if_failed(sorted_values.allocate(count * length));
  std::size_t bytes = 0;
  const auto sort = [&](void* memory) {
    check("a sort", cub::DeviceSegmentedRadixSort::SortPairsDescending(
                        memory, bytes, data.keys.data(), sorted.data(), values.data(), sorted_values.data(),
                        count * length, count, offsets.data(), offsets.data() + 1));
  };
  sort(nullptr);
  device_buffer<unsigned char> memory;
  throw_if_failed(memory.allocate(static_cast<index_t>(bytes)));
  time_passes(state, [&] { sort(memory.data()); });
  count_bytes(state, 4.0 * static_cast<double>(count * length));
}

constexpr index_t most_cache_bytes = index_t{36} << 30;

void register_rows() {
  const auto add = [](const std::string& name, const char* first, index_t n, index_t tokens, auto body) {
    benchmark::RegisterBenchmark(name.c_str(), body)
        ->ArgNames({first, "tokens"})
        ->Args({n, tokens})
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
  };
  auto after = restkv::presets::standard(budget);
  after.score.order = restkv::query_order::after;
  const auto before = restkv::presets::standard(budget);
  const auto snap_kv = restkv::presets::snap_kv(budget);
  for (index_t tokens = 4096; tokens <= index_t{1} << 20; tokens *= 4) {
    for (const index_t batch : {index_t{1}, index_t{8}, index_t{64}}) {
      if (batch * tokens * problem::kv_heads * problem::head_dim * 4 > most_cache_bytes) continue;
      add("floor/read_k_and_v", "batch", batch, tokens, read_row);
      if (batch * tokens <= index_t{1} << 20) add("floor/product_by_cublas", "batch", batch, tokens, product_row);
      add("select/snap_kv", "batch", batch, tokens, [=](benchmark::State& s) { select_row(s, snap_kv); });
      add("select/rest_kv_after", "batch", batch, tokens, [=](benchmark::State& s) { select_row(s, after); });
      add("select/rest_kv_before", "batch", batch, tokens, [=](benchmark::State& s) { select_row(s, before); });
    }
  }
  // The size that the targets are stated for.
  add("floor/read_k_and_v", "batch", 1, 131072, read_row);
  add("floor/product_by_cublas", "batch", 1, 131072, product_row);
  add("select/snap_kv", "batch", 1, 131072, [=](benchmark::State& s) { select_row(s, snap_kv); });
  add("select/rest_kv_after", "batch", 1, 131072, [=](benchmark::State& s) { select_row(s, after); });
  add("select/rest_kv_before", "batch", 1, 131072, [=](benchmark::State& s) { select_row(s, before); });
  for (const index_t rows : {index_t{8}, index_t{64}, index_t{256}, index_t{1024}}) {
    for (const index_t tokens : {index_t{16384}, index_t{131072}, index_t{1} << 20}) {
      if (rows * tokens > index_t{1} << 28) continue;
      add("top_k/radix", "rows", rows, tokens, top_k_row);
      add("top_k/cub_segmented_sort", "rows", rows, tokens, top_k_by_sorting_row);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("no GPU was found: nothing was measured");
    return 77;
  }
  cudaDeviceProp properties{};
  check("the device's properties", cudaGetDeviceProperties(&properties, 0));
  benchmark::AddCustomContext("device", properties.name);
  register_rows();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("copy_bandwidth_GB_per_s", std::to_string(copy_bandwidth() * 1e-9));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
