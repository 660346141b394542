// SPDX-License-Identifier: Apache-2.0
/// @file
/// The tokens that certified pruning wants scored, as a list a row.
#pragma once

#include <restkv/kernel/attention_problem.hpp>

namespace restkv::kernel {

/// counts[row] = 0. For each row, before `list_wanted`.
struct begin_lists {
  index_t* counts;

  RESTKV_HD void operator()(index_t row) const noexcept { counts[row] = 0; }
};

/// Appends the tokens of a piece of a row that are marked `wanted` to the row's list and marks them `scored`. Pieces
/// append in any order: what a token scores does not depend on its place. Blocks: [batch, rows, pieces].
struct list_wanted {
  static constexpr int threads = 256;
  struct shared {
    collective_memory<index_t, threads> collective;
    index_t base;
  };

  const head_span* spans;  ///< [batch, kv_heads]
  index_t window;
  index_t kv_heads;
  index_t rows;    ///< of a sequence
  index_t pieces;  ///< of the longest past
  token_state* states;
  index_t state_strides[3];  ///< of batch, row, token
  position_t* listed;        ///< [batch * rows, stride]
  index_t* counts;           ///< [batch * rows]
  index_t stride;

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const index_t row = block / pieces;  // [batch, rows]
    const index_t b = row / rows;
    const index_t first = block % pieces * threads;
    const index_t length = spans[b * kv_heads + row % rows * kv_heads / rows].length;
    const index_t past = length < window ? 0 : length - window;
    if (first >= past) return;
    token_state* const of_row = states + b * state_strides[0] + row % rows * state_strides[1];
    auto mine = group.template locals<index_t, 1>();
    auto wanted = group.template locals<bool, 1>();
    group.for_each_thread([&](int t) {
      wanted(t)[0] = first + t < past && group.read(of_row[(first + t) * state_strides[2]]) == token_state::wanted;
      mine(t)[0] = wanted(t)[0] ? 1 : 0;
    });
    const index_t count = group.exclusive_sum(mine, memory.collective);
    if (count == 0) return;
    group.for_each(1, [&](index_t) { group.write(memory.base, group.add(counts[row], count)); });
    group.sync();
    group.for_each_thread([&](int t) {
      if (!wanted(t)[0]) return;
      group.write(listed[row * stride + group.read(memory.base) + mine(t)[0]], static_cast<position_t>(first + t));
      group.write(of_row[(first + t) * state_strides[2]], token_state::scored);
    });
  }
};

}  // namespace restkv::kernel
