// SPDX-License-Identifier: Apache-2.0
/// @file
/// The loops of a bulk backend as kernels: a function object for every index, and values that ride in the parameters.
#pragma once

#include <restkv/kernel/group.hpp>

#include <algorithm>
#include <span>
#include <type_traits>

namespace restkv::kernel {

/// body(i) for i in [0, count), one a thread. Blocks: `threads` items each.
template <class Body>
struct call_each {
  static constexpr int threads = 256;
  struct shared {};

  Body body;
  index_t count;

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared&, index_t block) const {
    group.for_each(threads, [&](index_t i) {
      if (block * threads + i < count) body(block * threads + i);
    });
  }
};

/// to[i] = values[i]. A kernel's parameters are copied when it is launched, or into a graph when it is captured, so the
/// host may change the values at once and no page is pinned. One block.
template <class T>
struct write_values {
  static_assert(std::is_trivially_copyable_v<T>);
  static constexpr int threads = 256;
  static constexpr index_t room = 2048 / static_cast<index_t>(sizeof(T));
  static_assert(room > 0);
  struct shared {};

  T values[static_cast<std::size_t>(room)];
  T* to;
  index_t count;

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared&, index_t) const {
    group.for_each(count, [&](index_t i) { group.write(to[i], values[i]); });
  }
};

/// See `bulk_backend::for_each`.
template <class Executor, class Body>
void for_each(Executor& executor, index_t count, const Body& body) {
  using each = call_each<Body>;
  if (count > 0) executor.launch(each{body, count}, (count + each::threads - 1) / each::threads);
}

/// to[i] = value_of(i) for i in [0, count), values of the host; see `write_values`.
template <class Executor, class T, class ValueOf>
void upload_table(Executor& executor, T* to, index_t count, const ValueOf& value_of) {
  using piece_t = write_values<T>;
  for (index_t first = 0; first < count; first += piece_t::room) {
    piece_t piece{};
    piece.to = to + first;
    piece.count = std::min(piece_t::room, count - first);
    for (index_t i = 0; i < piece.count; ++i) piece.values[i] = value_of(first + i);
    executor.launch(piece, 1);
  }
}

/// See `bulk_backend::upload`.
template <class Executor, class T>
void upload(Executor& executor, T* to, std::span<const T> values) {
  upload_table(executor, to, static_cast<index_t>(values.size()),
               [&](index_t i) { return values[static_cast<std::size_t>(i)]; });
}

}  // namespace restkv::kernel
