// SPDX-License-Identifier: Apache-2.0
// A layer of Llama-3-8B's shape in device memory, filled there: at 64 sequences of 16K tokens it would not fit a host.
#pragma once

#include <restkv/backend/cuda/device_memory.cuh>
#include <restkv/core/counter_random.hpp>
#include <restkv/core/layer.hpp>

#include <cmath>
#include <vector>

namespace restkv_bench {

using restkv::index_t;

/// A standard normal number of a counter (Box and Muller).
__device__ inline float normal_of(std::uint64_t seed, index_t i) {
  const float radius = sqrtf(-2.0f * logf(fmaxf(restkv::uniform_of<float>(restkv::counter_bits(seed, i, 0, 0, 0)), 1e-7f)));
  return radius * cospif(2.0f * restkv::uniform_of<float>(restkv::counter_bits(seed, i, 1, 0, 0)));
}

/// Attention as in trained models: queries of a KV head share a direction, keys have a part along it whose size is
/// heavy-tailed. Token n of the cache, or query n; see attention_problem.hpp for the same on the host.
template <class T>
__global__ void fill_rows(T* out, index_t rows, index_t rows_per_head, index_t head_dim, std::uint64_t seed, float along,
                          float across, bool heavy_tail) {
  const index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * head_dim) return;
  const index_t row = i / head_dim;
  const index_t head = row / rows_per_head;
  const float direction = normal_of(17, head * head_dim + i % head_dim);
  float pull = along;
  if (heavy_tail) pull *= -logf(fmaxf(restkv::uniform_of<float>(restkv::counter_bits(seed + 1, row, 0, 0, 0)), 1e-7f));
  out[i] = restkv::narrow<T>(fmaf(pull, direction, across * normal_of(seed, i)));
}

/// Llama-3-8B: 32 query heads, 8 KV heads, 128 channels; the last 32 queries.
template <class T>
class gpu_problem {
 public:
  static constexpr index_t query_heads = 32;
  static constexpr index_t kv_heads = 8;
  static constexpr index_t head_dim = 128;
  static constexpr index_t window = 32;

  gpu_problem(index_t batch, index_t tokens) : batch_(batch), tokens_(tokens) {
    throw_if_failed(query_.allocate(batch * query_heads * window * head_dim));
    throw_if_failed(key_.allocate(batch * kv_heads * tokens * head_dim));
    throw_if_failed(value_.allocate(key_.size()));
    fill(query_, query_heads / kv_heads * window, 1, 0.8f, 0.6f, false);
    fill(key_, tokens, 2, 0.11f, 1.0f, true);
    fill(value_, tokens, 4, 0.0f, 1.0f, false);
    view.query = {query_.data(), {batch, query_heads, window, head_dim}};
    view.key = device_view<const T, 4>(key_.data(), {batch, kv_heads, tokens, head_dim});
    view.value = device_view<const T, 4>(value_.data(), {batch, kv_heads, tokens, head_dim});
    attach_metric();
    throw_if_failed(restkv::cuda_status("filling the layer", cudaDeviceSynchronize()));
  }

  /// Bytes of K and V.
  [[nodiscard]] index_t cache_bytes() const { return 2 * key_.size() * static_cast<index_t>(sizeof(T)); }
  [[nodiscard]] index_t batch() const { return batch_; }
  [[nodiscard]] index_t tokens() const { return tokens_; }
  [[nodiscard]] const T* key() const { return key_.data(); }
  [[nodiscard]] const T* value() const { return value_.data(); }
  [[nodiscard]] const T* query() const { return query_.data(); }

  restkv::layer_view<T, restkv::memory_space::device> view;

 private:
  template <class U, std::size_t Rank>
  using device_view = restkv::tensor_view<U, Rank, restkv::memory_space::device>;

  void fill(restkv::device_buffer<T>& memory, index_t rows_per_head, std::uint64_t seed, float along, float across,
            bool heavy_tail) {
    const auto blocks = static_cast<unsigned>((memory.size() + 255) / 256);
    fill_rows<<<blocks, 256>>>(memory.data(), memory.size() / head_dim, rows_per_head, head_dim, seed, along, across,
                               heavy_tail);
    throw_if_failed(restkv::cuda_status("filling the layer", cudaGetLastError()));
  }
  /// A lower triangular factor and its Gram matrix, as a W_O of random numbers has them.
  void attach_metric() {
    std::vector<float> factor(static_cast<std::size_t>(query_heads * head_dim * head_dim));
    std::vector<double> gram(factor.size());
    std::vector<float> spectrum(static_cast<std::size_t>(query_heads * head_dim), 1.0f);
    for (index_t h = 0; h < query_heads; ++h) {
      float* const l = factor.data() + h * head_dim * head_dim;
      for (index_t r = 0; r < head_dim; ++r) {
        for (index_t c = 0; c <= r; ++c) {
          const float noise = restkv::uniform_of<float>(restkv::counter_bits(5, h, r, c, 0)) - 0.5f;
          l[r * head_dim + c] = r == c ? 1.0f + noise : noise / std::sqrt(static_cast<float>(head_dim));
        }
      }
      double* const g = gram.data() + h * head_dim * head_dim;
      for (index_t r = 0; r < head_dim; ++r) {
        for (index_t c = 0; c < head_dim; ++c) {
          for (index_t k = 0; k <= std::min(r, c); ++k) {
            g[r * head_dim + c] += static_cast<double>(l[r * head_dim + k]) * static_cast<double>(l[c * head_dim + k]);
          }
        }
      }
    }
    throw_if_failed(gram_.assign(gram));
    throw_if_failed(factor_.assign(factor));
    throw_if_failed(spectrum_.assign(spectrum));
    view.metric.gram = {gram_.data(), {query_heads, head_dim, head_dim}};
    view.metric.factor = {factor_.data(), {query_heads, head_dim, head_dim}};
    view.metric.spectrum = {spectrum_.data(), {query_heads, head_dim}};
  }

  index_t batch_;
  index_t tokens_;
  restkv::device_buffer<T> query_;
  restkv::device_buffer<T> key_;
  restkv::device_buffer<T> value_;
  restkv::device_buffer<double> gram_;
  restkv::device_buffer<float> factor_;
  restkv::device_buffer<float> spectrum_;
};

}  // namespace restkv_bench
