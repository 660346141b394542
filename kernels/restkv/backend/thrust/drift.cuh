// SPDX-License-Identifier: Apache-2.0
/// @file
/// The drift of attention over the window: mean positions of each query's most attended tokens, by a stable sort.
#pragma once

#include <restkv/backend/thrust/softmax.cuh>
#include <restkv/selection/order_key.hpp>

#include <cstdint>

#include <thrust/functional.h>
#include <thrust/sort.h>

namespace restkv::on_thrust {

/// A row's number above a key turned round: ascending order is by row, then by key from the largest.
[[nodiscard]] RESTKV_HD constexpr std::uint64_t descending(index_t row, std::uint32_t key) noexcept {
  return static_cast<std::uint64_t>(row) << 32 | static_cast<std::uint32_t>(~key);
}

/// The logits of a slab as keys to sort, and their tokens; what a query does not see comes behind what it sees, what
/// lies behind the sequence last. For each (row, n).
template <class Problem>
struct fill_sort_keys {
  Problem p;
  lane_slab slab;
  std::uint64_t* keys;  ///< [rows, tokens]
  position_t* tokens;   ///< [rows, tokens]

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t row = item / p.tokens;
    const index_t n = item % p.tokens;
    const index_t head = slab.head_of(row);
    const index_t lane = slab.lane_of(row);
    const head_span& span = p.span_of(head);
    std::uint32_t key = excluded_key;
    if (lane < span.window && n < span.length) {
      const bool seen = n < Problem::seen_by(span, lane);
      key = order_key(seen ? p.logit(head, lane, n) : std::numeric_limits<float>::lowest());
    }
    keys[item] = descending(row, key);
    tokens[item] = static_cast<position_t>(n);
  }
};

/// The position at a place of a sorted row where it is among the most attended, else 0.
template <class Problem>
struct attended_position {
  Problem p;
  lane_slab slab;
  const index_t* most_attended;  ///< [batch]
  const position_t* tokens;

  [[nodiscard]] RESTKV_HD index_t operator()(index_t item) const noexcept {
    const index_t head = slab.head_of(item / p.tokens);
    const index_t length = p.span_of(head).length;
    const index_t most = most_attended[head / p.query_heads];
    return item % p.tokens < (most < length ? most : length) ? static_cast<index_t>(tokens[item]) : 0;
  }
};

/// balance[head] += positions of the front half's queries less those of the rear half's. For each head of the slab.
template <class Problem>
struct add_positions {
  Problem p;
  lane_slab slab;
  const index_t* sums;  ///< [rows]
  index_t* balance;     ///< [heads]

  RESTKV_HD void operator()(index_t i) const noexcept {
    const index_t head = slab.first_head + i;
    const index_t pairs = p.span_of(head).window / 2;
    index_t balance_here = slab.first_lane == 0 ? 0 : balance[head];
    for (index_t j = 0; j < slab.lanes; ++j) {
      const index_t lane = slab.first_lane + j;
      const index_t sum = sums[i * slab.lanes + j];
      if (lane < pairs) balance_here += sum;
      if (lane >= pairs && lane < 2 * pairs) balance_here -= sum;
    }
    balance[head] = balance_here;
  }
};

/// out(b, h) = balance / (pairs * tokens that count). For each head.
template <class Problem, memory_space Space>
struct finish_drift {
  Problem p;
  const index_t* most_attended;
  const index_t* balance;
  tensor_view<double, 2, Space> out;

  RESTKV_HD void operator()(index_t head) const noexcept {
    const index_t b = head / p.query_heads;
    const head_span& span = p.span_of(head);
    const index_t pairs = span.window / 2;
    const index_t count = most_attended[b] < span.length ? most_attended[b] : span.length;
    const bool measured = pairs > 0 && count > 0;
    out.data[out.offset(b, head % p.query_heads)] =
        measured ? static_cast<double>(balance[head]) / static_cast<double>(pairs * count) : 0.0;
  }
};

/// Memory of a slab of queries.
struct drift_memory {
  std::uint64_t* keys = nullptr;
  position_t* tokens = nullptr;
  index_t* sums = nullptr;
  index_t* partial = nullptr;

  drift_memory(index_t rows, index_t length, workspace& space) noexcept
      : keys(space.take<std::uint64_t>(rows * length)),
        tokens(space.take<position_t>(rows * length)),
        sums(space.take<index_t>(rows)),
        partial(space.take<index_t>(rows * parts_of(length))) {}
  /// Bytes of a row, alignment not included.
  [[nodiscard]] static constexpr index_t bytes_of_row(index_t length) noexcept {
    return length * static_cast<index_t>(sizeof(std::uint64_t) + sizeof(position_t)) +
           (1 + parts_of(length)) * static_cast<index_t>(sizeof(index_t));
  }
};

/// The drift of every query head, `rows` queries at a time. Exact: whole numbers up to the last division.
template <class System, class Problem, memory_space Space>
void measure_drift(const instance<System>& system, const Problem& p, const workspace& slab_space, index_t rows,
                   const index_t* most_attended, index_t* balance, const tensor_view<double, 2, Space>& out) {
  const auto& policy = system.policy();
  for_slabs(p.heads(), p.lanes, rows, [&](const lane_slab& slab) {
    workspace space = slab_space;
    const drift_memory memory(slab.rows(), p.tokens, space);
    const index_t items = slab.rows() * p.tokens;
    loop(policy, items, fill_sort_keys<Problem>{p, slab, memory.keys, memory.tokens});
    ::thrust::stable_sort_by_key(policy, memory.keys, memory.keys + items, memory.tokens);
    reduce_rows(policy, slab.rows(), p.tokens, attended_position<Problem>{p, slab, most_attended, memory.tokens},
                memory.partial, memory.sums, ::thrust::plus<index_t>());
    loop(policy, slab.heads, add_positions<Problem>{p, slab, memory.sums, balance});
  });
  loop(policy, p.heads(), finish_drift<Problem, Space>{p, most_attended, balance, out});
}

/// No drift, where there is nothing to measure. Not a member of the backend: nvcc's stubs could not name it there.
struct clear_drift {
  double* drift;

  RESTKV_HD void operator()(index_t i) const noexcept { drift[i] = 0.0; }
};

}  // namespace restkv::on_thrust
