// SPDX-License-Identifier: Apache-2.0
/// @file
/// The systems that `thrust_backend` runs on: where their memory is, their execution policy and their temporary memory.
///
/// A host system compiles with any C++20 compiler (`-DTHRUST_DEVICE_SYSTEM=THRUST_DEVICE_SYSTEM_CPP`); policies are
/// named explicitly, so that one translation unit may use several. Under nvcc there is `thrust_cuda` alone.
#pragma once

#include <restkv/core/status.hpp>
#include <restkv/core/tensor_view.hpp>

#include <exception>
#include <new>
#include <type_traits>
#include <utility>

#include <thrust/for_each.h>
#include <thrust/iterator/counting_iterator.h>
#include <thrust/system/system_error.h>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <thrust/system/cuda/error.h>
#include <thrust/system/cuda/execution_policy.h>
#else
#include <thrust/system/cpp/execution_policy.h>
#if defined(_OPENMP)
#include <thrust/system/omp/execution_policy.h>
#endif
#if defined(RESTKV_THRUST_TBB)
#include <thrust/system/tbb/execution_policy.h>
#endif
#endif

namespace restkv {

///@{
/// Where `thrust_backend` runs: the host's first thread, OpenMP (`-fopenmp`), oneTBB (`-DRESTKV_THRUST_TBB`), a CUDA
/// stream (nvcc).
struct thrust_cpp {};
struct thrust_omp {};
struct thrust_tbb {};
struct thrust_cuda {};
///@}

/// What the Thrust backend is made of.
namespace on_thrust {

/// Calls f(i) for i in [0, n), in any order.
template <class Policy, class F>
void loop(const Policy& policy, index_t n, const F& f) {
  if (n > 0) ::thrust::for_each_n(policy, ::thrust::counting_iterator<index_t>(0), n, f);
}

/// Memory of the host, as `new` gives it.
class host_memory {
 public:
  static constexpr memory_space space = memory_space::host;

  /// Throws std::bad_alloc.
  [[nodiscard]] static void* allocate(std::size_t bytes) { return ::operator new(bytes); }
  static void release(void* memory, std::size_t) noexcept { ::operator delete(memory); }
};

/// An instance of a system: `space`, `policy()`, and temporary memory by `allocate` and `release`.
template <class System>
class instance;

#if defined(__CUDACC__)

/// Temporary memory in the order of a stream: neither call waits for the device, so both may be captured in a graph.
class stream_allocator {
 public:
  using value_type = char;

  explicit stream_allocator(cudaStream_t stream) noexcept : stream_(stream) {}
  /// Throws std::bad_alloc, and thrust::system_error for any other failure.
  [[nodiscard]] char* allocate(std::ptrdiff_t bytes) const {
    void* memory = nullptr;
    if (bytes == 0) return nullptr;
    const cudaError_t failure = cudaMallocAsync(&memory, static_cast<std::size_t>(bytes), stream_);
    if (failure == cudaErrorMemoryAllocation) throw std::bad_alloc();
    if (failure != cudaSuccess) throw ::thrust::system_error(failure, ::thrust::cuda_category(), "cudaMallocAsync");
    return static_cast<char*>(memory);
  }
  void deallocate(char* memory, std::size_t) const noexcept {
    if (memory != nullptr) static_cast<void>(cudaFreeAsync(memory, stream_));
  }

 private:
  cudaStream_t stream_;
};

/// A CUDA stream.
template <>
class instance<thrust_cuda> {
 public:
  static constexpr memory_space space = memory_space::device;

  explicit instance(cudaStream_t stream = nullptr) noexcept : stream_(stream), memory_(stream) {}
  [[nodiscard]] auto policy() const { return ::thrust::cuda::par_nosync(memory_).on(stream_); }
  [[nodiscard]] void* allocate(std::size_t bytes) const { return memory_.allocate(static_cast<std::ptrdiff_t>(bytes)); }
  void release(void* memory, std::size_t bytes) const noexcept {
    memory_.deallocate(static_cast<char*>(memory), bytes);
  }

 private:
  cudaStream_t stream_;
  mutable stream_allocator memory_;
};

#else

/// The calling thread.
template <>
class instance<thrust_cpp> : public host_memory {
 public:
  [[nodiscard]] static const auto& policy() noexcept { return ::thrust::cpp::par; }
};

#if defined(_OPENMP)
/// As many threads as OpenMP gives.
template <>
class instance<thrust_omp> : public host_memory {
 public:
  [[nodiscard]] static const auto& policy() noexcept { return ::thrust::omp::par; }
};
#endif

#if defined(RESTKV_THRUST_TBB)
/// As many threads as oneTBB gives.
template <>
class instance<thrust_tbb> : public host_memory {
 public:
  [[nodiscard]] static const auto& policy() noexcept { return ::thrust::tbb::par; }
};
#endif

#endif

/// `count` elements of temporary memory of a system, not initialised. Throws std::bad_alloc.
template <class System, class T>
class temporary {
 public:
  temporary(const instance<System>& system, index_t count)
      : system_(system),
        bytes_(static_cast<std::size_t>(count) * sizeof(T)),
        data_(static_cast<T*>(system.allocate(bytes_))) {
    static_assert(std::is_trivially_copyable_v<T>);
  }
  temporary(const temporary&) = delete;
  temporary& operator=(const temporary&) = delete;
  ~temporary() { system_.release(data_, bytes_); }

  [[nodiscard]] T* data() const noexcept { return data_; }

 private:
  const instance<System>& system_;
  std::size_t bytes_;
  T* data_;
};

/// The status of what `work()` returns or throws: Thrust reports failures by exceptions.
template <class Work>
[[nodiscard]] status guarded(const Work& work) noexcept {
  try {
    if constexpr (std::is_same_v<decltype(work()), status>) {
      return work();
    } else {
      work();
      return {};
    }
  } catch (const std::bad_alloc& failure) {
    return status::error(errc::out_of_memory, "Thrust found no memory: %s", failure.what());
  } catch (const ::thrust::system_error& failure) {
    return status::error(errc::device_failure, "Thrust failed: %s (error %d)", failure.what(), failure.code().value());
  } catch (const std::exception& failure) {
    return status::error(errc::device_failure, "Thrust failed: %s", failure.what());
  }
}

}  // namespace on_thrust

}  // namespace restkv
