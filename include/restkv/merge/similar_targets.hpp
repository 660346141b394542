// SPDX-License-Identifier: Apache-2.0
/// @file
/// The most similar of many keys, for keys that come one after the other.
#pragma once

#include <restkv/core/vector_math.hpp>
#include <restkv/core/workspace.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace restkv::detail {

/// For each key handed in the candidate with the largest cosine, by tiles of `lanes` candidates and blocks of `block`
/// keys. The sum over channels is in order: the result does not depend on the blocks. One of it serves several heads.
template <std::floating_point Real>
class similar_targets {
 public:
  similar_targets(index_t heads, index_t capacity, index_t channels, workspace& space) noexcept
      : channels_(channels), tiles_per_head_((capacity + lanes - 1) / lanes) {
    tiles_ = space.take<Real>(heads, tiles_per_head_, lanes, channels);
    keys_ = space.take<Real>(heads, block, channels);
    states_ = space.take<state>(heads);
  }

  /// Candidates [first, last) of a head, to be given with `set`.
  void begin(index_t head, index_t first, index_t last) const noexcept {
    states_[head] = {first, last, 0, {}, {}};
    const index_t count = (last - first + lanes - 1) / lanes * lanes * channels_;
    std::fill(tile(head, 0), tile(head, 0) + count, Real(0));
  }

  /// The key of a candidate.
  void set(index_t head, index_t candidate, const Real* key) const noexcept {
    const index_t i = candidate - states_[head].first;
    const Real scale = inverse(key);
    Real* const to = tile(head, i / lanes) + i % lanes;
    for (index_t c = 0; c < channels_; ++c) to[c * lanes] = key[c] * scale;
  }

  /// Where the next key goes, [channels].
  [[nodiscard]] Real* next(index_t head) const noexcept {
    return keys_ + (head * block + states_[head].filled) * channels_;
  }
  /// Asks for the key that was written to `next()`: its candidate, or -1 where no cosine is a number, and the cosine
  /// are written once the block is full, or by `finish`.
  void add(index_t head, position_t* target, Real* similarity) const noexcept {
    state& s = states_[head];
    s.targets[s.filled] = target;
    s.similarities[s.filled] = similarity;
    if (++s.filled == block) finish(head);
  }

  /// Answers what is left.
  void finish(index_t head) const noexcept {
    state& s = states_[head];
    if (s.filled == 0) return;
    Real* const keys = keys_ + head * block * channels_;
    std::fill(keys + s.filled * channels_, keys + block * channels_, Real(0));
    Real best[block];
    index_t target[block];
    for (index_t i = 0; i < block; ++i) {
      best[i] = -std::numeric_limits<Real>::infinity();
      target[i] = -1;
    }
    for (index_t begin = s.first; begin < s.last; begin += lanes) {
      Real sums[block][lanes];
      multiply(keys, tile(head, (begin - s.first) / lanes), sums);
      const index_t count = std::min(lanes, s.last - begin);
      for (index_t i = 0; i < s.filled; ++i) {
        for (index_t j = 0; j < count; ++j) {
          if (sums[i][j] > best[i]) {
            best[i] = sums[i][j];
            target[i] = begin + j;
          }
        }
      }
    }
    for (index_t i = 0; i < s.filled; ++i) {
      const Real cosine = best[i] * inverse(keys + i * channels_);
      const bool known = target[i] >= 0 && std::isfinite(cosine);
      *s.targets[i] = known ? static_cast<position_t>(target[i]) : position_t(-1);
      *s.similarities[i] = known ? cosine : Real(0);
    }
    s.filled = 0;
  }

 private:
  static constexpr index_t lanes = 16;
  static constexpr index_t block = 4;

  struct state {
    index_t first;
    index_t last;
    index_t filled;
    position_t* targets[block];
    Real* similarities[block];
  };

  /// The products of a block of keys with a tile of candidates. Arrays of their own stay in registers.
  void multiply(const Real* keys, const Real* columns, Real (&sums)[block][lanes]) const noexcept {
    static_assert(block == 4);
    Real first[lanes] = {};
    Real second[lanes] = {};
    Real third[lanes] = {};
    Real fourth[lanes] = {};
    for (index_t c = 0; c < channels_; ++c) {
      const Real a = keys[c];
      const Real b = keys[channels_ + c];
      const Real x = keys[2 * channels_ + c];
      const Real y = keys[3 * channels_ + c];
      const Real* const column = columns + c * lanes;
      for (index_t j = 0; j < lanes; ++j) {
        first[j] += a * column[j];
        second[j] += b * column[j];
        third[j] += x * column[j];
        fourth[j] += y * column[j];
      }
    }
    for (index_t j = 0; j < lanes; ++j) {
      sums[0][j] = first[j];
      sums[1][j] = second[j];
      sums[2][j] = third[j];
      sums[3][j] = fourth[j];
    }
  }

  /// 1 / ||key||: 0 for a key of zeros, whose cosine is 0 with every other; not a number where the key is not finite.
  [[nodiscard]] Real inverse(const Real* key) const noexcept {
    const auto length = static_cast<Real>(norm(key, channels_));
    if (!std::isfinite(length)) return std::numeric_limits<Real>::quiet_NaN();
    return length >= std::numeric_limits<Real>::min() ? 1 / length : Real(0);
  }
  [[nodiscard]] Real* tile(index_t head, index_t i) const noexcept {
    return tiles_ + (head * tiles_per_head_ + i) * lanes * channels_;
  }

  index_t channels_;
  index_t tiles_per_head_;
  Real* tiles_;    // keys of length 1, [heads, tiles, channels, lanes]
  Real* keys_;     // [heads, block, channels]
  state* states_;  // [heads]
};

}  // namespace restkv::detail
