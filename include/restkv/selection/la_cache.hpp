// SPDX-License-Identifier: Apache-2.0
/// @file
/// `la_cache`: the ladder of LaCache, which keeps other tokens in every layer and asks no score.
#pragma once

#include <restkv/core/status.hpp>
#include <restkv/score/head_score.hpp>

#include <algorithm>
#include <limits>
#include <span>

namespace restkv {

/// What a ladder remembers from one eviction to the next, the same for all layers.
struct la_cache_state {
  index_t cursor = 0;    ///< cache index behind the part that has been compacted already
  index_t capacity = 0;  ///< tokens a layer may hold
  bool evicted = false;  ///< an eviction took place: compensation is in `capacity`
};

/// One eviction, for all layers: which cache indices a layer keeps, and the state behind it.
class la_cache_eviction {
 public:
  la_cache_eviction() = default;

  [[nodiscard]] constexpr const la_cache_state& state() const noexcept { return after_; }  ///< for the next eviction
  [[nodiscard]] constexpr index_t length() const noexcept { return length_; }              ///< tokens before it

  /// True when layer `layer` keeps the token at cache index `index` of the cache before the eviction. Indices must be
  /// asked in ascending order, each once, from 0; `rank` begins at 0 and is the caller's memory between calls.
  [[nodiscard]] constexpr bool keeps(index_t layer, index_t index, index_t& rank) const noexcept {
    if (!first_.keeps(layer, index)) return false;
    return second_.keeps(layer, rank++);
  }

  /// Writes the cache indices that layer `layer` keeps, ascending, into `positions` and their number into `count`.
  /// Fails where they do not fit. At most `state().capacity` tokens are kept, or all of a cache that is no longer.
  [[nodiscard]] status keep(index_t layer, std::span<position_t> positions, index_t& count) const noexcept {
    const auto room = static_cast<index_t>(positions.size());
    index_t rank = 0;
    index_t written = 0;
    for (index_t n = 0; n < length_; ++n) {
      if (!keeps(layer, n, rank)) continue;
      if (written < room) positions[static_cast<std::size_t>(written)] = static_cast<position_t>(n);
      ++written;
    }
    if (written > room) {
      return status::error(errc::shape_mismatch, "positions has %lld entries, the layer keeps %lld",
                           static_cast<long long>(room), static_cast<long long>(written));
    }
    count = written;
    return {};
  }

 private:
  friend struct la_cache;

  /// Behind `begin`, blocks of `block` tokens of which `rung` are kept, `stride` apart; all from the last block on.
  struct ladder {
    index_t begin = 0;
    index_t blocks = 0;
    index_t block = 1;
    index_t rung = 0;
    index_t stride = 1;
    index_t steps = 1;  // a layer's rung begins at its number modulo this

    [[nodiscard]] constexpr bool keeps(index_t layer, index_t index) const noexcept {
      if (index < begin || index >= begin + blocks * block) return true;
      for (index_t k = 0; k < rung; ++k) {
        const index_t offset = index - begin - layer % steps - stride * k;
        if (offset >= 0 && offset % block == 0) return true;
      }
      return false;
    }
  };

  ladder first_{};
  ladder second_{};
  la_cache_state after_{};
  index_t length_ = 0;
};

/// LaCache (arXiv 2507.14204, as its release computes it). Layers keep short runs of tokens at offsets that climb with
/// the layer, so that together they cover more of the past than each could. Keys are stored before RoPE there, and
/// positions are cache indices, counted anew after each eviction.
///
/// With p = span, v = overlap, N layers: blocks have b = 1 + ceil((N - p) / (p - v)) tokens, of which
/// r = min(ceil(p / (p - v)), b) are kept; layer i keeps the r that begin i mod (b - r + 1) behind the block's first.
/// A cache of S > C tokens must lose S - C: blocks from the cursor on are thinned until enough are gone, and the cursor
/// moves behind what was kept. When fewer blocks are left than that takes, all that are left are thinned, and the
/// ladder starts over behind the first `start` tokens: r tokens, t = ceil(left / ((C - start - N) / r * (b - r)))
/// apart, out of blocks of b + (t - 1) (b - 1). A rung that would lie behind the cache's end is left out; a cache that was
/// many times too long may thus lose its newest tokens: protect them.
///
/// With `compensation` the first eviction adds (b - r) / 2 to the capacity, for good: thinning whole blocks removes
/// more than asked.
///
/// Call `evict` once for all layers whenever tokens were added; each layer then asks `keep`. Cost: r operations a token
/// and layer. Nothing is allocated, nothing random.
struct la_cache {
  index_t cache_size = 1024;  ///< C, tokens a layer may hold
  index_t start = 4;          ///< first tokens, never evicted
  index_t span = 16;          ///< p, layers over which a rung repeats a token
  index_t overlap = 0;        ///< v, below span
  bool compensation = true;   ///< see above

  /// Fails on parameters outside their ranges, and on a model without enough layers or a cache without room for a
  /// block beyond the start and one token a layer.
  [[nodiscard]] status check(index_t layers) const noexcept {
    if (start < 0) {
      return status::error(errc::invalid_argument, "start of la_cache is %lld, must be at least 0",
                           static_cast<long long>(start));
    }
    if (span < 1 || overlap < 0 || overlap >= span) {
      return status::error(errc::invalid_argument,
                           "la_cache has span %lld and overlap %lld: the span must be at least 1, the overlap within "
                           "[0, span)",
                           static_cast<long long>(span), static_cast<long long>(overlap));
    }
    if (layers <= span) {
      return status::error(errc::invalid_argument, "span of la_cache is %lld, must be below the %lld layers",
                           static_cast<long long>(span), static_cast<long long>(layers));
    }
    if (removed(layers) < 1) {
      return status::error(errc::invalid_argument,
                           "la_cache keeps all %lld tokens of a block at span %lld, overlap %lld and %lld layers",
                           static_cast<long long>(block(layers)), static_cast<long long>(span),
                           static_cast<long long>(overlap), static_cast<long long>(layers));
    }
    const index_t least = start + layers + kept(layers);
    if (cache_size < least || cache_size > std::numeric_limits<position_t>::max()) {
      return status::error(errc::invalid_argument, "cache_size of la_cache is %lld, must be within [%lld, %lld]",
                           static_cast<long long>(cache_size), static_cast<long long>(least),
                           static_cast<long long>(std::numeric_limits<position_t>::max()));
    }
    return {};
  }

  /// The state of an empty cache.
  [[nodiscard]] constexpr la_cache_state begin() const noexcept { return {start, cache_size, false}; }

  /// Plans the eviction of a cache of `length` tokens, by parameters that `check` accepted. A cache within its capacity
  /// keeps everything, and the state stays. Fails on a negative length and on a state that is not of this ladder.
  [[nodiscard]] status evict(index_t layers, index_t length, const la_cache_state& state,
                             la_cache_eviction& eviction) const noexcept {
    RESTKV_RETURN_IF_FAILED(check(layers));
    if (length < 0 || length > std::numeric_limits<position_t>::max()) {
      return status::error(errc::invalid_argument, "the cache has %lld tokens, must be within [0, %lld]",
                           static_cast<long long>(length),
                           static_cast<long long>(std::numeric_limits<position_t>::max()));
    }
    if (state.capacity < cache_size || state.capacity > cache_size + layers) {
      return status::error(errc::invalid_argument, "the state has capacity %lld, must be within [%lld, %lld]",
                           static_cast<long long>(state.capacity), static_cast<long long>(cache_size),
                           static_cast<long long>(cache_size + layers));
    }
    if (state.cursor < start || state.cursor > state.capacity - layers) {
      return status::error(errc::invalid_argument, "the state has cursor %lld, must be within [%lld, %lld]",
                           static_cast<long long>(state.cursor), static_cast<long long>(start),
                           static_cast<long long>(state.capacity - layers));
    }
    la_cache_eviction made;
    made.length_ = length;
    made.after_ = state;
    if (length > state.capacity) thin(layers, made);
    eviction = made;
    return {};
  }

 private:
  [[nodiscard]] static constexpr index_t ceiling(index_t a, index_t b) noexcept { return (a + b - 1) / b; }
  [[nodiscard]] constexpr index_t block(index_t layers) const noexcept {
    return 1 + ceiling(layers - span, span - overlap);
  }
  [[nodiscard]] constexpr index_t kept(index_t layers) const noexcept {
    return std::min(ceiling(span, span - overlap), block(layers));
  }
  [[nodiscard]] constexpr index_t removed(index_t layers) const noexcept { return block(layers) - kept(layers); }

  constexpr void thin(index_t layers, la_cache_eviction& made) const noexcept {
    const index_t b = block(layers);
    const index_t r = kept(layers);
    const index_t loss = b - r;
    la_cache_state& state = made.after_;
    if (compensation && !state.evicted) state.capacity += loss / 2;
    state.evicted = true;
    const index_t excess = made.length_ - state.capacity;
    if (excess <= 0) return;
    const index_t blocks = (state.capacity - state.cursor - layers) / r;
    const index_t needed = ceiling(excess, loss);
    made.first_ = {state.cursor, std::min(blocks, needed), b, r, 1, loss + 1};
    if (needed <= blocks) {
      state.cursor += needed * r;
      return;
    }
    const index_t left = excess - blocks * loss;
    const index_t lost_at_once = (state.capacity - start - layers) / r * loss;
    const index_t apart = ceiling(left, lost_at_once);
    const index_t wide = b + (apart - 1) * (b - 1);
    const index_t wide_blocks = ceiling(left, wide - r);
    made.second_ = {start, wide_blocks, wide, r, apart, wide - r + 1};
    state.cursor = start + wide_blocks * r;
  }
};

/// The ladder as a head score, for a prompt that is compressed once: 1 for the tokens that `ladder` keeps in the plan's
/// layer, below that i / length for token i, so that a budget beyond the ladder's takes the newest others. Give the
/// policy a uniform budget of `ladder.cache_size`; the plan's shape must say which of how many layers this is.
///
/// Cost: as `la_cache`; reads neither keys nor values; no scratch.
struct la_cache_score {
  la_cache ladder{};  ///< its parameters

  ///@{
  /// See `head_score`.
  static constexpr cache_part reads = cache_part::none;

  [[nodiscard]] status check(const problem_shape& shape) const noexcept { return ladder.check(shape.layers); }

  template <element T, std::floating_point Real>
  void score_head(const head_view<T>& head, std::span<Real> scores, std::span<Real>) const noexcept {
    la_cache_eviction eviction;
    const bool planned = ladder.evict(head.shape().layers, head.length(), ladder.begin(), eviction).ok();
    index_t rank = 0;
    for (index_t n = 0; n < head.length(); ++n) {
      const bool keeps = planned && eviction.keeps(head.shape().layer, n, rank);
      scores[static_cast<std::size_t>(n)] = keeps ? Real(1) : static_cast<Real>(n) / static_cast<Real>(head.length());
    }
  }
  ///@}
};

}  // namespace restkv
