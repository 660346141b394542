// SPDX-License-Identifier: Apache-2.0
// Counts calls of operator new, of any thread, and makes one of them fail. Replaces the operators: for one source of a
// program.
#pragma once

#include <malloc.h>
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace restkv_test {

inline std::atomic<bool> counting_allocations{false};
inline std::atomic<long> allocations{0};
inline std::atomic<long> failing_allocation{-1};  ///< the number of the one that fails, from 0
inline std::atomic<long> held_bytes{0};           ///< by what was allocated while counting, less what was freed
inline std::atomic<long> most_held_bytes{0};

inline void* allocate_or_null(std::size_t bytes, std::size_t alignment) noexcept {
  if (counting_allocations && allocations++ == failing_allocation) return nullptr;
  constexpr std::size_t most = std::size_t(1) << 40;
  if (bytes > most) return nullptr;  // the address sanitizer would end the program
  void* const memory =
      std::aligned_alloc(alignment, (std::max<std::size_t>(bytes, 1) + alignment - 1) / alignment * alignment);
  if (counting_allocations && memory != nullptr) {
    held_bytes += static_cast<long>(malloc_usable_size(memory));
    most_held_bytes = std::max<long>(most_held_bytes, held_bytes);
  }
  return memory;
}

inline void release(void* memory) noexcept {
  if (counting_allocations && memory != nullptr) held_bytes -= static_cast<long>(malloc_usable_size(memory));
  std::free(memory);
}

inline void* allocate(std::size_t bytes, std::size_t alignment) {
  void* const memory = allocate_or_null(bytes, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

/// Counts while it lives.
struct allocation_count {
  allocation_count() {
    allocations = held_bytes = most_held_bytes = 0;
    counting_allocations = true;
  }
  allocation_count(const allocation_count&) = delete;
  allocation_count& operator=(const allocation_count&) = delete;
  ~allocation_count() { counting_allocations = false; }
};

/// Calls of operator new while `body` runs.
template <class Body>
long allocations_of(const Body& body) {
  const allocation_count counting;
  body();
  return allocations;
}

/// The most bytes that `body` held at a time.
template <class Body>
long most_bytes_of(const Body& body) {
  const allocation_count counting;
  body();
  return most_held_bytes;
}

/// Runs `body` with its allocation number `failing` failing: true when that was reached.
template <class Body>
bool run_with_failing_allocation(long failing, const Body& body) {
  failing_allocation = failing;
  const long made = allocations_of(body);
  failing_allocation = -1;
  return made > failing;
}

}  // namespace restkv_test

// Not inlined: GCC would take the malloc and free inside for a pair that does not match.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  return restkv_test::allocate(bytes, alignof(std::max_align_t));
}
[[gnu::noinline]] void* operator new[](std::size_t bytes) {
  return restkv_test::allocate(bytes, alignof(std::max_align_t));
}
[[gnu::noinline]] void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return restkv_test::allocate(bytes, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return restkv_test::allocate(bytes, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return restkv_test::allocate_or_null(bytes, alignof(std::max_align_t));
}
[[gnu::noinline]] void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept {
  return restkv_test::allocate_or_null(bytes, alignof(std::max_align_t));
}
[[gnu::noinline]] void* operator new(std::size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return restkv_test::allocate_or_null(bytes, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void* operator new[](std::size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return restkv_test::allocate_or_null(bytes, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { restkv_test::release(memory); }
[[gnu::noinline]] void operator delete[](void* memory) noexcept { restkv_test::release(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { restkv_test::release(memory); }
[[gnu::noinline]] void operator delete[](void* memory, std::size_t) noexcept { restkv_test::release(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept { restkv_test::release(memory); }
[[gnu::noinline]] void operator delete[](void* memory, std::align_val_t) noexcept { restkv_test::release(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  restkv_test::release(memory);
}
[[gnu::noinline]] void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept {
  restkv_test::release(memory);
}
[[gnu::noinline]] void operator delete(void* memory, const std::nothrow_t&) noexcept { restkv_test::release(memory); }
[[gnu::noinline]] void operator delete[](void* memory, const std::nothrow_t&) noexcept { restkv_test::release(memory); }
