// SPDX-License-Identifier: Apache-2.0
/// @file
/// Window attention of a slab of queries: logits, the largest two of each query, and what turns a logit into a share.
///
/// The largest logit is kept apart from the sum of the others all the way, so that 1 - a and a / (1 - a) lose no digits
/// even when one token holds all but 1e-9 of the attention.
#pragma once

#include <restkv/backend/thrust/problem.cuh>
#include <restkv/backend/thrust/systems.cuh>

namespace restkv::on_thrust {

/// Items of a row that one functor reduces. Sums are made of these in order, whatever the number of threads.
inline constexpr index_t items_of_part = 256;

/// Parts of a row of `length` items.
[[nodiscard]] RESTKV_HD constexpr index_t parts_of(index_t length) noexcept {
  return (length + items_of_part - 1) / items_of_part;
}

/// One query's softmax: a[n] = exp(z_n - second) scale for all tokens but the top one, a[top] = 1 / (1 + rest).
struct lane_state {
  float second = 0;  ///< largest logit of all tokens but the top one
  float reserved = 0;
  index_t top = -1;  ///< the first token with the largest logit
  double scale = 0;  ///< see above
  double rest = 0;   ///< sum over the others of exp(z_n - z_top), not below least_rest; 0 where there are none

  [[nodiscard]] RESTKV_HD double share(float logit, index_t n) const noexcept {
    if (n == top) return 1.0 / (1.0 + rest);
    return std::exp(static_cast<double>(logit) - static_cast<double>(second)) * scale;
  }
  /// 1 - a. Only the top token can hold more than half, so only there would the subtraction lose digits.
  [[nodiscard]] RESTKV_HD double rest_of(double share, index_t n) const noexcept {
    return n == top ? rest / (1.0 + rest) : 1.0 - share;
  }
  /// a / (1 - a), at most 1 / least_rest.
  [[nodiscard]] RESTKV_HD double odds(double share, index_t n) const noexcept {
    if (n != top) return share / (1.0 - share);
    return 1.0 / (rest > least_rest ? rest : least_rest);
  }
};

/// The largest two values of a row, and where the larger lies.
struct peak {
  float largest = -std::numeric_limits<float>::infinity();
  float second = -std::numeric_limits<float>::infinity();
  index_t top = -1;
};

/// The peak of both; among equal values the smaller index is the top. Associative and commutative.
struct join_peaks {
  [[nodiscard]] RESTKV_HD peak operator()(const peak& a, const peak& b) const noexcept {
    if (a.top < 0) return b;
    if (b.top < 0) return a;
    const bool first = a.largest > b.largest || (a.largest == b.largest && a.top < b.top);
    const peak& upper = first ? a : b;
    const peak& lower = first ? b : a;
    return {upper.largest, lower.largest > upper.second ? lower.largest : upper.second, upper.top};
  }
};

/// partial[row][part] = the join of value_of(item) over a part of a row, items counted through the rows. For each
/// (row, part).
template <class ValueOf, class Value, class Join>
struct reduce_part {
  ValueOf value_of;
  Join join;
  index_t length;
  Value* partial;  ///< [rows, parts_of(length)]

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t parts = parts_of(length);
    const index_t first = item % parts * items_of_part;
    const index_t end = first + items_of_part < length ? first + items_of_part : length;
    Value value{};
    for (index_t n = first; n < end; ++n) value = join(value, value_of(item / parts * length + n));
    partial[item] = value;
  }
};

/// out[row] = the join of a row's parts, in order. For each row.
template <class Value, class Join>
struct join_parts {
  Join join;
  index_t parts;
  const Value* partial;  ///< [rows, parts]
  Value* out;

  RESTKV_HD void operator()(index_t row) const noexcept {
    Value value{};
    for (index_t i = 0; i < parts; ++i) value = join(value, partial[row * parts + i]);
    out[row] = value;
  }
};

/// out[row] = the join of value_of(row * length + n) over n, by parts. A reduction by key would have the host wait for
/// the number of keys, and add in an order of its own.
template <class Policy, class ValueOf, class Value, class Join>
void reduce_rows(const Policy& policy, index_t rows, index_t length, const ValueOf& value_of, Value* partial,
                 Value* out, const Join& join) {
  loop(policy, rows * parts_of(length), reduce_part<ValueOf, Value, Join>{value_of, join, length, partial});
  loop(policy, rows, join_parts<Value, Join>{join, parts_of(length), partial, out});
}

/// logits[row][n] of a slab. For each (row, n).
template <class Problem>
struct fill_logits {
  Problem p;
  lane_slab slab;
  float* logits;  ///< [rows, tokens]

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t row = item / p.tokens;
    const index_t n = item % p.tokens;
    const head_span& span = p.span_of(slab.head_of(row));
    const index_t lane = slab.lane_of(row);
    if (lane >= span.window || n >= Problem::seen_by(span, lane)) return;
    logits[item] = p.logit(slab.head_of(row), lane, n);
  }
};

/// The peak of one logit; nothing where the query does not see the token.
template <class Problem>
struct peak_of_logit {
  Problem p;
  lane_slab slab;
  const float* logits;

  [[nodiscard]] RESTKV_HD peak operator()(index_t item) const noexcept {
    const index_t row = item / p.tokens;
    const index_t n = item % p.tokens;
    const head_span& span = p.span_of(slab.head_of(row));
    const index_t lane = slab.lane_of(row);
    if (lane >= span.window || n >= Problem::seen_by(span, lane)) return {};
    return {logits[item], -std::numeric_limits<float>::infinity(), n};
  }
};

/// sums[row][part] = sum of exp(z_n - second) over a part of a row, the top token left out. For each (row, part).
template <class Problem>
struct sum_exponentials {
  Problem p;
  lane_slab slab;
  const float* logits;
  const peak* peaks;
  double* sums;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t parts = parts_of(p.tokens);
    const index_t row = item / parts;
    const index_t first = item % parts * items_of_part;
    const head_span& span = p.span_of(slab.head_of(row));
    const index_t lane = slab.lane_of(row);
    double sum = 0;
    if (lane < span.window) {
      const index_t seen = Problem::seen_by(span, lane);
      const index_t end = first + items_of_part < seen ? first + items_of_part : seen;
      const peak at = peaks[row];
      for (index_t n = first; n < end; ++n) {
        if (n == at.top) continue;
        sum += std::exp(static_cast<double>(logits[row * p.tokens + n]) - static_cast<double>(at.second));
      }
    }
    sums[item] = sum;
  }
};

/// states[(head - first_head) * stride + lane - first_lane] from peaks and sums. For each row.
template <class Problem>
struct finish_softmax {
  Problem p;
  lane_slab slab;
  const peak* peaks;
  const double* sums;
  lane_state* states;
  index_t stride;

  RESTKV_HD void operator()(index_t row) const noexcept {
    const peak at = peaks[row];
    lane_state state;
    state.top = at.top;
    state.second = at.second;
    double others = 0;
    const index_t parts = parts_of(p.tokens);
    for (index_t i = 0; i < parts; ++i) others += sums[row * parts + i];
    if (others > 0) {
      const double fall = std::exp(static_cast<double>(at.second) - static_cast<double>(at.largest));
      const double least = least_rest / others;
      const double part = fall > least ? fall : least;
      state.rest = others * part;
      state.scale = part / (1.0 + state.rest);
    }
    states[row / slab.lanes * stride + row % slab.lanes] = state;
  }
};

/// Memory of a slab of queries.
struct lane_memory {
  float* logits = nullptr;  ///< [rows, tokens]
  peak* peaks = nullptr;    ///< [rows]
  peak* partial = nullptr;  ///< [rows, parts_of(tokens)]
  double* sums = nullptr;   ///< [rows, parts_of(tokens)]

  /// Bytes of a row, alignment of the pieces not included.
  [[nodiscard]] static constexpr index_t bytes_of_row(index_t tokens) noexcept {
    return tokens * static_cast<index_t>(sizeof(float)) + static_cast<index_t>(sizeof(peak)) +
           parts_of(tokens) * static_cast<index_t>(sizeof(peak) + sizeof(double));
  }
  lane_memory(index_t rows, index_t tokens, workspace& space) noexcept
      : logits(space.take<float>(rows * tokens)),
        peaks(space.take<peak>(rows)),
        partial(space.take<peak>(rows * parts_of(tokens))),
        sums(space.take<double>(rows * parts_of(tokens))) {}
};

/// Logits and states of a slab; state of (head, lane) at states[(head - first_head) * stride + lane - first_lane].
template <class System, class Problem>
void observe(const instance<System>& system, const Problem& p, const lane_slab& slab, const lane_memory& memory,
             lane_state* states, index_t stride) {
  const auto& policy = system.policy();
  const index_t rows = slab.rows();
  loop(policy, rows * p.tokens, fill_logits<Problem>{p, slab, memory.logits});
  reduce_rows(policy, rows, p.tokens, peak_of_logit<Problem>{p, slab, memory.logits}, memory.partial, memory.peaks,
              join_peaks{});
  loop(policy, rows * parts_of(p.tokens), sum_exponentials<Problem>{p, slab, memory.logits, memory.peaks, memory.sums});
  loop(policy, rows, finish_softmax<Problem>{p, slab, memory.peaks, memory.sums, states, stride});
}

}  // namespace restkv::on_thrust
