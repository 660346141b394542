// SPDX-License-Identifier: Apache-2.0
// One block for each query head of each sequence; the logits of one query at a time in shared memory.
#include "my_kernel.h"

#include <cuda_runtime.h>

namespace {

constexpr int threads = 256;

/// The maximum or sum over the block of one number a thread; the same for all.
template <class Combine>
__device__ float over_block(float value, float* warps, const Combine& combine) {
  for (int step = 16; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, step));
  __syncthreads();  // `warps` may still be read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = warps[threadIdx.x % (threads / 32)];
  for (int step = threads / 64; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

__global__ void __launch_bounds__(threads) score_tokens(my_attention p) {
  extern __shared__ float shared[];
  float* const logits = shared;            // [tokens]
  float* const warps = shared + p.tokens;  // [threads / 32]
  const int64_t b = blockIdx.y;
  const int64_t h = blockIdx.x;
  const int64_t past = p.tokens - p.window;
  const float* const query = p.query + b * p.query_strides[0] + h * p.query_strides[1];
  const float* const key = p.key + b * p.key_strides[0] + h / (p.query_heads / p.kv_heads) * p.key_strides[1];
  float* const scores = p.scores + (b * p.query_heads + h) * p.tokens;
  const float scale = rsqrtf(static_cast<float>(p.head_dim));
  for (int64_t i = 0; i < p.window; ++i) {
    const float* const q = query + (p.rows - p.window + i) * p.query_strides[2];
    const int64_t visible = past + i + 1;
    float largest = -3.402823466e38f;
    for (int64_t n = threadIdx.x; n < visible; n += threads) {
      const float* const k = key + n * p.key_strides[2];
      float dot = 0;
      for (int64_t c = 0; c < p.head_dim; ++c) dot = fmaf(q[c], k[c], dot);
      logits[n] = dot * scale;
      largest = fmaxf(largest, logits[n]);
    }
    largest = over_block(largest, warps, [](float x, float y) { return fmaxf(x, y); });
    float sum = 0;
    for (int64_t n = threadIdx.x; n < visible; n += threads) sum += logits[n] = expf(logits[n] - largest);
    sum = over_block(sum, warps, [](float x, float y) { return x + y; });
    for (int64_t n = threadIdx.x; n < past; n += threads) {
      scores[n] = (i == 0 ? 0.0f : scores[n]) + logits[n] / (sum * static_cast<float>(p.window));
    }
    __syncthreads();
  }
}

}  // namespace

extern "C" int my_attention_scores(const my_attention* problem) {
  if (problem->batch == 0 || problem->window == 0) return 0;
  const dim3 blocks(static_cast<unsigned>(problem->query_heads), static_cast<unsigned>(problem->batch));
  const std::size_t shared = static_cast<std::size_t>(problem->tokens + threads / 32) * sizeof(float);
  score_tokens<<<blocks, threads, shared>>>(*problem);
  const cudaError_t launched = cudaGetLastError();
  return static_cast<int>(launched != cudaSuccess ? launched : cudaDeviceSynchronize());
}
