// SPDX-License-Identifier: Apache-2.0
/// @file
/// What a kernel body is written against: a group of threads that work in phases.
///
/// A kernel is a trivially copyable struct of pointers and sizes:
///
///     struct my_kernel {
///       static constexpr int threads = 256;            // of a block
///       struct shared { float sums[256]; };            // shared memory of a block
///       template <class Group>
///       RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const;
///     };
///
/// The body is a sequence of phases, each ended by `group.sync()`. Within a phase, work items are independent: what one
/// writes no other reads or writes, except by `add`. Shared and global memory that several items touch is accessed by
/// `read`, `write` and `add`, so that the recorder of the host group sees it; input that no kernel writes may be read
/// directly. What a thread keeps over phases lies in `locals`.
///
/// | member | does |
/// |---|---|
/// | `for_each(n, f)` | f(i) for i in [0, n), item i on thread i % threads |
/// | `for_each_thread(f)` | f(t) for every thread of the block |
/// | `for_each_warp(f)` | f(w) for every warp; inside, only `mma` members and `read`/`write` by one item |
/// | `sync()` | ends a phase |
/// | `read(x)`, `write(x, v)` | an access to memory that other items touch |
/// | `add(x, v)` | atomic; returns the value before; integers only, so the order does not matter |
/// | `locals<T, N>()` | N values of T per thread: `auto mine = group.template locals<float, 4>(); mine(t)[0]` |
/// | `exclusive_sum(mine, memory)` | mine(t)[0] becomes the sum over threads before t; returns the total; ends phases |
/// | `accumulators<T, N>()` | N tiles of 16 x 16 float sums per warp, zero: `auto sums = group.template accumulators<T,
/// 4>()` | | `clear(tile)` | a tile becomes zero | | `mma(tile, a, as, b, bs)` | tile += A B, `a` = A [16, 16] and `b`
/// = B [16, 16] row-major in shared memory | | `mma_transposed(...)` | the same, with `b` = B^T [16, 16] | |
/// `scale(tile, x)` | every sum of a tile times x | | `store(tile, to, stride)` | writes a tile to shared memory,
/// row-major | | `load_16_bytes(from)` | an array of elements from global memory, aligned to 16 bytes | | `to_float(x)`
/// | an element as float, exactly, by the machine's instruction | | `sine_cosine(x)` | sine and cosine of a finite
/// double: `{sine, cosine}` | | `copy_16_bytes(to, from)` | elements from global to shared memory, both aligned to 16
/// bytes | | `reduce(mine, op, memory)` | op over mine(t)[0] of all threads, in a fixed order; every thread gets it;
/// ends phases |
///
/// The device group (`device_group.cuh`) is a thread block; the host group is one serial loop that runs the items of
/// each phase in a shuffled order, so that a body which depends on the order, or forgets a `sync`, gives another
/// result.
#pragma once

#include <restkv/core/tensor_view.hpp>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace restkv::kernel {

/// Threads of a warp.
inline constexpr int warp_size = 32;

/// Scratch of `exclusive_sum` and `reduce`, a member of a kernel's `shared`.
template <class T, int Threads>
struct collective_memory {
  T partial[Threads];  ///< the host group's; the device needs one entry a warp
};

/// What `sine_cosine` returns.
struct sine_and_cosine {
  double sine = 0;
  double cosine = 1;
};

/// A conflict between two work items of one phase, found by `conflict_recorder`.
struct phase_conflict {
  const void* address = nullptr;  ///< of the cell
  index_t block = 0;              ///< of the kernel
  int phase = 0;                  ///< counted from 0 in each block
  index_t first = 0;              ///< thread that touched the cell first
  index_t second = 0;             ///< the other; at least one of them wrote
};

/// Notes who touches a cell in each phase. Two threads of a block may meet in a cell only if both read or both add;
/// two blocks of a launch likewise, whatever the phase.
class conflict_recorder {
 public:
  enum class access : std::uint8_t { read, write, add };

  /// A new launch: nothing is known of any cell.
  void begin_launch() noexcept {
    cells_.clear();
    launch_cells_.clear();
  }
  /// Block `block` starts with phase 0. Its shared memory is new.
  void begin_block(index_t block) noexcept {
    block_ = block;
    phase_ = 0;
    cells_.clear();
  }
  /// The next phase.
  void end_phase() noexcept {
    ++phase_;
    cells_.clear();
  }
  /// A thread touches a cell of `bytes` bytes.
  void touch(const void* address, index_t thread, access how, bool shared_memory) {
    note(cells_, address, thread, how, phase_);
    if (!shared_memory) note(launch_cells_, address, block_ + (index_t(1) << 40), how, -1);
  }
  /// Every conflict so far, at most 16.
  [[nodiscard]] const std::vector<phase_conflict>& conflicts() const noexcept { return conflicts_; }

 private:
  static constexpr index_t several = -1;  // threads that all read, or all add
  struct cell {
    index_t owner;
    access how;
  };
  using map = std::unordered_map<const void*, cell>;
  void note(map& cells, const void* address, index_t owner, access how, int phase) {
    const auto [entry, fresh] = cells.try_emplace(address, cell{owner, how});
    if (fresh) return;
    cell& before = entry->second;
    if (before.owner == owner) {
      // Who does several things to a cell must be alone with it, as who writes it.
      if (before.how != how) before.how = access::write;
      return;
    }
    if (before.how == how && how != access::write) {
      before.owner = several;
      return;
    }
    if (conflicts_.size() < 16) conflicts_.push_back({address, block_, phase, before.owner, owner});
    before = {owner, how};
  }

  map cells_;         // of the phase
  map launch_cells_;  // global memory, of the launch
  index_t block_ = 0;
  int phase_ = 0;
  std::vector<phase_conflict> conflicts_;
};

/// A block on the host: one thread that runs the items of each phase in a shuffled order.
template <int Threads>
class host_group {
 public:
  static constexpr int threads = Threads;

  /// `recorder` may be null. `shared` is the block's shared memory.
  host_group(std::uint64_t seed, conflict_recorder* recorder, const void* shared, std::size_t shared_bytes) noexcept
      : state_(seed * 0x9e3779b97f4a7c15u + 1),
        recorder_(recorder),
        shared_(static_cast<const unsigned char*>(shared)),
        shared_bytes_(shared_bytes) {}

  template <class F>
  void for_each(index_t n, const F& f) {
    // A shuffled walk over [0, n) without memory: an odd step is coprime to a power of two.
    index_t size = 1;
    while (size < n) size *= 2;
    const auto step = static_cast<index_t>(next() % static_cast<std::uint64_t>(size)) | 1;
    auto at = static_cast<index_t>(next() % static_cast<std::uint64_t>(size));
    for (index_t i = 0; i < size; ++i, at = (at + step) & (size - 1)) {
      if (at >= n) continue;
      thread_ = at % Threads;
      f(at);
    }
  }
  template <class F>
  void for_each_thread(const F& f) {
    for_each(Threads, [&](index_t t) { f(static_cast<int>(t)); });
  }
  template <class F>
  void for_each_warp(const F& f) {
    for_each(Threads / warp_size, [&](index_t w) {
      thread_ = w * warp_size;
      f(static_cast<int>(w));
    });
  }
  void sync() {
    if (recorder_ != nullptr) recorder_->end_phase();
  }

  template <class T>
  [[nodiscard]] T read(const T& cell) const {
    note(&cell, conflict_recorder::access::read);
    return cell;
  }
  template <class T>
  void write(T& cell, const std::type_identity_t<T>& value) const {
    note(&cell, conflict_recorder::access::write);
    cell = value;
  }
  template <class T>
  T add(T& cell, std::type_identity_t<T> value) const {
    static_assert(std::is_integral_v<T>, "the order of floating sums would matter");
    note(&cell, conflict_recorder::access::add);
    const T before = cell;
    cell = static_cast<T>(cell + value);
    return before;
  }

  template <class T, int N>
  class local_values {
   public:
    local_values() : values_(Threads) {}
    [[nodiscard]] std::array<T, N>& operator()(int thread) noexcept {
      return values_[static_cast<std::size_t>(thread)];
    }

   private:
    std::vector<std::array<T, N>> values_;
  };
  template <class T, int N>
  [[nodiscard]] local_values<T, N> locals() const {
    return {};
  }

  template <class T>
  T exclusive_sum(local_values<T, 1>& mine, collective_memory<T, Threads>&) {
    T sum = 0;
    for (int t = 0; t < Threads; ++t) sum = static_cast<T>(sum + std::exchange(mine(t)[0], sum));
    sync();
    return sum;
  }
  /// The order of the device: within each warp the second half is folded onto the first until one value is left, then
  /// the warps' values in ascending order.
  template <class T, class Op>
  T reduce(local_values<T, 1>& mine, const Op& op, collective_memory<T, Threads>&) {
    T result{};
    for (int first = 0; first < Threads; first += warp_size) {
      std::array<T, warp_size> lane;
      for (int i = 0; i < warp_size; ++i) lane[static_cast<std::size_t>(i)] = mine(first + i)[0];
      for (std::size_t half = warp_size / 2; half > 0; half /= 2) {
        for (std::size_t i = 0; i < half; ++i) lane[i] = op(lane[i], lane[i + half]);
      }
      result = first == 0 ? lane[0] : op(result, lane[0]);
    }
    sync();
    return result;
  }

  /// A 16 x 16 tile of sums of products of T.
  template <class T>
  using tile_sum = std::array<float, 256>;

  template <class T, int N>
  class warp_tiles {
   public:
    warp_tiles() : tiles_(Threads / warp_size) {}
    [[nodiscard]] std::array<tile_sum<T>, N>& operator()(int warp) noexcept {
      return tiles_[static_cast<std::size_t>(warp)];
    }

   private:
    std::vector<std::array<tile_sum<T>, N>> tiles_;
  };
  template <class T, int N>
  [[nodiscard]] warp_tiles<T, N> accumulators() const {
    warp_tiles<T, N> made;
    for (int w = 0; w < Threads / warp_size; ++w) made(w) = {};
    return made;
  }
  template <class T>
  void clear(std::array<float, 256>& tile) const {
    tile = {};
  }
  /// Strides are in elements: of float a multiple of 4, of 16-bit types of 8; a and b are aligned to 32 bytes.
  template <class T>
  void mma(std::array<float, 256>& tile, const T* a, int a_stride, const T* b, int b_stride) const {
    multiply_tile<T, false>(tile, a, a_stride, b, b_stride);
  }
  template <class T>
  void mma_transposed(std::array<float, 256>& tile, const T* a, int a_stride, const T* b, int b_stride) const {
    multiply_tile<T, true>(tile, a, a_stride, b, b_stride);
  }
  template <class T>
  void scale(std::array<float, 256>& tile, float factor) const {
    for (float& sum : tile) sum *= factor;
  }
  template <class T>
  void store(const std::array<float, 256>& tile, float* to, int stride) const {
    for (int i = 0; i < 256; ++i) write(to[i / 16 * stride + i % 16], tile[static_cast<std::size_t>(i)]);
  }
  template <class T>
  [[nodiscard]] std::array<T, 16 / sizeof(T)> load_16_bytes(const T* from) const {
    std::array<T, 16 / sizeof(T)> values;
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = from[i];
    return values;
  }
  template <class T>
  [[nodiscard]] float to_float(T x) const {
    return static_cast<float>(x);
  }
  [[nodiscard]] sine_and_cosine sine_cosine(double angle) const { return {std::sin(angle), std::cos(angle)}; }
  template <class T>
  void copy_16_bytes(T* to, const T* from) const {
    for (std::size_t i = 0; i < 16 / sizeof(T); ++i) write(to[i], from[i]);
  }

 private:
  /// Sums in ascending k.
  template <class T, bool Transposed>
  void multiply_tile(std::array<float, 256>& tile, const T* a, int a_stride, const T* b, int b_stride) const {
    std::array<float, 256> left;
    std::array<float, 256> right;  // [k][column]
    for (int r = 0; r < 16; ++r) {
      for (int c = 0; c < 16; ++c) {
        left[static_cast<std::size_t>(r * 16 + c)] = static_cast<float>(read(a[r * a_stride + c]));
        const int at = Transposed ? c * 16 + r : r * 16 + c;
        right[static_cast<std::size_t>(at)] = static_cast<float>(read(b[r * b_stride + c]));
      }
    }
    for (std::size_t r = 0; r < 16; ++r) {
      for (std::size_t k = 0; k < 16; ++k) {
        for (std::size_t c = 0; c < 16; ++c) tile[r * 16 + c] += left[r * 16 + k] * right[k * 16 + c];
      }
    }
  }
  [[nodiscard]] std::uint64_t next() noexcept {  // splitmix64
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  void note(const void* address, conflict_recorder::access how) const {
    if (recorder_ == nullptr) return;
    const auto* byte = static_cast<const unsigned char*>(address);
    recorder_->touch(address, thread_, how, byte >= shared_ && byte < shared_ + shared_bytes_);
  }

  std::uint64_t state_;
  conflict_recorder* recorder_;
  const unsigned char* shared_;
  std::size_t shared_bytes_;
  index_t thread_ = 0;
};

/// Runs kernels on the calling thread, block after block in a shuffled order.
class host_executor {
 public:
  static constexpr memory_space space = memory_space::host;  ///< of what kernels read and write

  /// With a recorder, conflicts between work items are noted there.
  explicit host_executor(std::uint64_t seed = 1, conflict_recorder* recorder = nullptr) noexcept
      : seed_(seed), recorder_(recorder) {}

  /// Runs every block of a kernel.
  template <class Kernel>
  void launch(const Kernel& kernel, index_t blocks) {
    static_assert(std::is_trivially_copyable_v<Kernel>);
    if (recorder_ != nullptr) recorder_->begin_launch();
    const std::uint64_t launch_seed = ++seed_;
    host_group<1> order(launch_seed, nullptr, nullptr, 0);
    order.for_each(blocks, [&](index_t block) {
      // On the heap and of exactly its size, and filled with a pattern, as shared memory is not initialised.
      const auto memory = std::make_unique<typename Kernel::shared>();
      std::fill_n(reinterpret_cast<unsigned char*>(memory.get()), sizeof(typename Kernel::shared), std::uint8_t{0xcd});
      if (recorder_ != nullptr) recorder_->begin_block(block);
      host_group<Kernel::threads> group(launch_seed + static_cast<std::uint64_t>(block), recorder_, memory.get(),
                                        sizeof(typename Kernel::shared));
      kernel(group, *memory, block);
    });
  }

 private:
  std::uint64_t seed_;
  conflict_recorder* recorder_;
};

}  // namespace restkv::kernel
