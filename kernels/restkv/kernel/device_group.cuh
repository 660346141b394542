// SPDX-License-Identifier: Apache-2.0
/// @file
/// The group of `group.hpp` as a thread block, and the launch of a kernel on a stream.
#pragma once

#include <restkv/core/dtype.hpp>
#include <restkv/core/status.hpp>
#include <restkv/kernel/group.hpp>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>
#include <cub/block/block_scan.cuh>

#include <type_traits>
#include <utility>

namespace restkv::kernel {

/// A thread block. See group.hpp for the meaning of each member.
template <int Threads>
class device_group {
 public:
  static constexpr int threads = Threads;

  template <class F>
  __device__ void for_each(index_t n, const F& f) {
    for (index_t i = static_cast<index_t>(threadIdx.x); i < n; i += Threads) f(i);
  }
  template <class F>
  __device__ void for_each_thread(const F& f) {
    f(static_cast<int>(threadIdx.x));
  }
  template <class F>
  __device__ void for_each_warp(const F& f) {
    f(static_cast<int>(threadIdx.x) / warp_size);
  }
  __device__ void sync() { __syncthreads(); }

  template <class T>
  [[nodiscard]] __device__ T read(const T& cell) const {
    return cell;
  }
  template <class T>
  __device__ void write(T& cell, const std::type_identity_t<T>& value) const {
    cell = value;
  }
  template <class T>
  __device__ T add(T& cell, std::type_identity_t<T> value) const {
    if constexpr (sizeof(T) == 8) {
      return static_cast<T>(
          atomicAdd(reinterpret_cast<unsigned long long*>(&cell), static_cast<unsigned long long>(value)));
    } else {
      return atomicAdd(&cell, value);
    }
  }

  template <class T, int N>
  class local_values {
   public:
    [[nodiscard]] __device__ T (&operator()(int))[N] { return values_; }

   private:
    T values_[N];
  };
  template <class T, int N>
  [[nodiscard]] __device__ local_values<T, N> locals() const {
    return {};
  }

  template <class T>
  __device__ T exclusive_sum(local_values<T, 1>& mine, collective_memory<T, Threads>& memory) {
    using scan = cub::BlockScan<T, Threads, cub::BLOCK_SCAN_WARP_SCANS>;
    static_assert(sizeof(typename scan::TempStorage) <= sizeof memory);
    T total;
    scan(reinterpret_cast<typename scan::TempStorage&>(memory)).ExclusiveSum(mine(0)[0], mine(0)[0], total);
    __syncthreads();
    return total;
  }
  template <class T, class Op>
  __device__ T reduce(local_values<T, 1>& mine, const Op& op, collective_memory<T, Threads>& memory) {
    T value = mine(0)[0];
    for (int half = warp_size / 2; half > 0; half /= 2) {
      const T other = __shfl_down_sync(0xffffffffu, value, static_cast<unsigned>(half));
      value = op(value, other);
    }
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
    if (static_cast<int>(threadIdx.x) % warp_size == 0) memory.partial[warp] = value;
    __syncthreads();
    T result = memory.partial[0];
    for (int w = 1; w < Threads / warp_size; ++w) result = op(result, memory.partial[w]);
    __syncthreads();
    return result;
  }

  /// A 16 x 16 tile of sums of products of T, spread over a warp: a tensor-core fragment for 16-bit types, row lane / 2
  /// and columns lane % 2 * 8 .. + 7 for float.
  struct float_tile {
    float sums[8];
  };
  template <class T>
  using tile_sum = std::conditional_t<sizeof(T) == 2,
                                      nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float>, float_tile>;
  template <class T>
  using operand = std::conditional_t<std::is_same_v<T, half>, __half, __nv_bfloat16>;

  template <class T, int N>
  class warp_tiles {
   public:
    [[nodiscard]] __device__ tile_sum<T> (&operator()(int))[N] { return tiles_; }

   private:
    tile_sum<T> tiles_[N];
  };
  template <class T, int N>
  [[nodiscard]] __device__ warp_tiles<T, N> accumulators() const {
    warp_tiles<T, N> made;
#pragma unroll
    for (int i = 0; i < N; ++i) clear<T>(made(0)[i]);
    return made;
  }
  template <class T>
  __device__ void clear(tile_sum<T>& tile) const {
    if constexpr (sizeof(T) == 2) {
      nvcuda::wmma::fill_fragment(tile, 0.0f);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) tile.sums[i] = 0.0f;
    }
  }
  template <class T>
  __device__ void mma(tile_sum<T>& tile, const T* a, int a_stride, const T* b, int b_stride) const {
    multiply_tile<T, false>(tile, a, a_stride, b, b_stride);
  }
  template <class T>
  __device__ void mma_transposed(tile_sum<T>& tile, const T* a, int a_stride, const T* b, int b_stride) const {
    multiply_tile<T, true>(tile, a, a_stride, b, b_stride);
  }
  template <class T>
  __device__ void scale(tile_sum<T>& tile, float factor) const {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < tile.num_elements; ++i) tile.x[i] *= factor;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) tile.sums[i] *= factor;
    }
  }
  template <class T>
  __device__ void store(const tile_sum<T>& tile, float* to, int stride) const {
    if constexpr (sizeof(T) == 2) {
      nvcuda::wmma::store_matrix_sync(to, tile, static_cast<unsigned>(stride), nvcuda::wmma::mem_row_major);
    } else {
      const int lane = static_cast<int>(threadIdx.x) % warp_size;
      float* const row = to + lane / 2 * stride + lane % 2 * 8;
#pragma unroll
      for (int i = 0; i < 8; ++i) row[i] = tile.sums[i];
    }
  }
  template <class T>
  [[nodiscard]] __device__ std::array<T, 16 / sizeof(T)> load_16_bytes(const T* from) const {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
    std::array<T, 16 / sizeof(T)> values;
    static_assert(sizeof values == sizeof bits);
    memcpy(&values, &bits, sizeof bits);
    return values;
  }
  template <class T>
  [[nodiscard]] __device__ float to_float(T x) const {
    if constexpr (std::is_same_v<T, half>) {
      return __half2float(__ushort_as_half(x.bits()));
    } else {
      return static_cast<float>(x);
    }
  }
  /// Reduced to half a turn by pi in three parts, each product exact; the library's own reduction of large angles needs
  /// local memory. As exact as the library up to angles of 2^40 or so.
  [[nodiscard]] __device__ sine_and_cosine sine_cosine(double angle) const {
    const double half_turns = rint(angle * 0.31830988618379067);
    double rest = fma(-half_turns, 3.1415926535897931, angle);
    rest = fma(-half_turns, 1.2246467991473532e-16, rest);
    rest = fma(-half_turns, -2.9947698097183397e-33, rest);
    sine_and_cosine turned;
    sincospi(rest * 0.31830988618379067, &turned.sine, &turned.cosine);
    const bool odd = half_turns - 2.0 * floor(half_turns * 0.5) != 0.0;
    return odd ? sine_and_cosine{-turned.sine, -turned.cosine} : turned;
  }
  template <class T>
  __device__ void copy_16_bytes(T* to, const T* from) const {
    *reinterpret_cast<uint4*>(to) = __ldg(reinterpret_cast<const uint4*>(from));
  }

 private:
  template <class T, bool Transposed>
  __device__ static void multiply_tile(tile_sum<T>& tile, const T* a, int a_stride, const T* b, int b_stride) {
    if constexpr (sizeof(T) == 2) {
      using namespace nvcuda::wmma;
      fragment<matrix_a, 16, 16, 16, operand<T>, row_major> left;
      fragment<matrix_b, 16, 16, 16, operand<T>, std::conditional_t<Transposed, col_major, row_major>> right;
      load_matrix_sync(left, reinterpret_cast<const operand<T>*>(a), static_cast<unsigned>(a_stride));
      load_matrix_sync(right, reinterpret_cast<const operand<T>*>(b), static_cast<unsigned>(b_stride));
      mma_sync(tile, left, right, tile);
    } else {
      const int lane = static_cast<int>(threadIdx.x) % warp_size;
      const float* const row = a + lane / 2 * a_stride;
      const int column = lane % 2 * 8;
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        const float left = row[k];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float right = Transposed ? b[(column + i) * b_stride + k] : b[k * b_stride + column + i];
          tile.sums[i] = fmaf(left, right, tile.sums[i]);
        }
      }
    }
  }
};

/// Blocks that a multiprocessor is to hold at once: the kernel's `resident_blocks`, or 1. It bounds the registers.
template <class Kernel>
[[nodiscard]] constexpr int resident_blocks_of() noexcept {
  if constexpr (requires { Kernel::resident_blocks; }) return Kernel::resident_blocks;
  return 1;
}

/// The one kernel entry: every body runs through it.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, resident_blocks_of<Kernel>())
    run_kernel(const __grid_constant__ Kernel kernel) {
  __shared__ typename Kernel::shared memory;
  device_group<Kernel::threads> group;
  kernel(group, memory, static_cast<index_t>(blockIdx.x));
}

/// Launches kernels on a stream. The first error of a launch is kept until it is taken.
class stream_executor {
 public:
  static constexpr memory_space space = memory_space::device;  ///< of what kernels read and write

  explicit stream_executor(cudaStream_t stream) noexcept : stream_(stream) {}

  /// Enqueues every block of a kernel. After a failure nothing more is launched.
  template <class Kernel>
  void launch(const Kernel& kernel, index_t blocks) {
    static_assert(std::is_trivially_copyable_v<Kernel>);
    static_assert(sizeof(Kernel) <= 4096, "the parameters of a kernel are at most 4 KB");
    static_assert(sizeof(typename Kernel::shared) <= 48 * 1024, "static shared memory is at most 48 KB");
    if (failure_ != cudaSuccess || blocks <= 0) return;
    if (blocks > most_blocks) {
      failure_ = cudaErrorInvalidConfiguration;
      return;
    }
    run_kernel<Kernel><<<static_cast<unsigned>(blocks), Kernel::threads, 0, stream_>>>(kernel);
    failure_ = cudaGetLastError();
  }
  [[nodiscard]] cudaStream_t stream() const noexcept { return stream_; }
  /// The first error of a launch since the last call.
  [[nodiscard]] cudaError_t take_failure() noexcept { return std::exchange(failure_, cudaSuccess); }
  /// The same as `errc::device_failure`, with CUDA's error and its number; `action` says what was tried.
  [[nodiscard]] status take_status(const char* action) noexcept {
    const cudaError_t error = take_failure();
    if (error == cudaSuccess) return {};
    return status::error(errc::device_failure, "%s: CUDA error %d, %s: %s", action, static_cast<int>(error),
                         cudaGetErrorName(error), cudaGetErrorString(error));
  }

 private:
  static constexpr index_t most_blocks = (index_t(1) << 31) - 1;  // of a launch

  cudaStream_t stream_;
  cudaError_t failure_ = cudaSuccess;
};

}  // namespace restkv::kernel
