// SPDX-License-Identifier: Apache-2.0
/// @file
/// Rotary position embedding of kept keys: `rope_frequencies` and `rotate_keys`, which moves keys to new positions.
///
/// RoPE (Su et al., RoFormer, arXiv 2104.09864, equations 14 to 16) turns pair i of a key at position p by the angle
/// p * f_i. Rotations add up, so a key that already carries position p is moved to position p' by turning it by
/// (p' - p) * f_i: the key before rotation is not needed.
#pragma once

#include <restkv/cache/gather.hpp>
#include <restkv/cache/layout.hpp>
#include <restkv/core/dtype.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <numbers>
#include <span>

namespace restkv {

/// Which channels make pair i of `pairs` rotary pairs.
enum class rotary_pairs {
  half_split,   ///< channels i and i + pairs (GPT-NeoX, Llama in its usual checkpoints)
  interleaved,  ///< channels 2 i and 2 i + 1 (RoFormer, GPT-J)
};

/// What a frequency is computed from before scaling: f_i = theta^(-2 i / rotary_dim).
struct rope_base {
  double theta = 10000;    ///< the model's base, rope_theta
  index_t rotary_dim = 0;  ///< rotated channels
};

/// A way to stretch RoPE to longer contexts: `check(base)`, and a const call operator from (pair i, f_i, base) to the
/// frequency used. It must not depend on the length of the sequence, or keys at old positions no longer fit.
template <class S>
concept rope_scaling = requires(const S& scaling, index_t pair, double frequency, const rope_base& base) {
  { scaling.check(base) } -> std::same_as<status>;
  { scaling(pair, frequency, base) } -> std::convertible_to<double>;
};

namespace detail {
[[nodiscard]] inline status check_positive(const char* name, double value) noexcept {
  if (value > 0 && std::isfinite(value)) return {};
  return status::error(errc::invalid_argument, "%s is %g, must be above 0 and finite", name, value);
}
}  // namespace detail

/// Plain RoPE.
struct unscaled_rope {
  ///@{
  /// See `rope_scaling`.
  [[nodiscard]] status check(const rope_base&) const noexcept { return {}; }
  [[nodiscard]] double operator()(index_t, double frequency, const rope_base&) const noexcept { return frequency; }
  ///@}
};

/// Position interpolation (Chen et al., arXiv 2306.15595): f_i / factor, as if positions were divided by it.
struct linear_rope {
  double factor = 1;  ///< how far the context is stretched

  ///@{
  /// See `rope_scaling`.
  [[nodiscard]] status check(const rope_base&) const noexcept {
    return detail::check_positive("the factor of linear_rope", factor);
  }
  [[nodiscard]] double operator()(index_t, double frequency, const rope_base&) const noexcept {
    return frequency / factor;
  }
  ///@}
};

/// YaRN (Peng et al., arXiv 2309.00071): pairs that turn often within the original context keep their frequency, pairs
/// that turn less than once are interpolated, those between are blended.
///
/// With c(t) = rotary_dim / 2 * log(original_max_positions / (2 pi t)) / log(theta), the pair that makes t turns within
/// the original context, the blend is linear in the pair's number, as in the authors' release and the engines that
/// follow it: low = max(floor(c(beta_fast)), 0), high = min(ceil(c(beta_slow)), rotary_dim - 1),
/// r_i = clamp((i - low) / (high - low), 0, 1), f_i' = r_i * f_i / factor + (1 - r_i) * f_i. The paper's text blends
/// linearly in the number of turns instead.
///
/// YaRN's attention temperature has no parameter here: engines multiply cosine and sine by it, so a cached key carries
/// it as a factor of its length, and a rotation leaves lengths alone.
struct yarn_rope {
  double factor = 1;                   ///< how far the context is stretched
  index_t original_max_positions = 0;  ///< context before stretching, in tokens
  double beta_fast = 32;               ///< turns from which on a pair keeps its frequency
  double beta_slow = 1;                ///< turns up to which a pair is interpolated
  bool truncate = true;                ///< floor and ceil in low and high; some checkpoints turn it off

  ///@{
  /// See `rope_scaling`.
  [[nodiscard]] status check(const rope_base& base) const noexcept {
    RESTKV_RETURN_IF_FAILED(detail::check_positive("the factor of yarn_rope", factor));
    RESTKV_RETURN_IF_FAILED(
        detail::check_positive("original_max_positions of yarn_rope", static_cast<double>(original_max_positions)));
    RESTKV_RETURN_IF_FAILED(detail::check_positive("beta_slow of yarn_rope", beta_slow));
    RESTKV_RETURN_IF_FAILED(detail::check_positive("beta_fast of yarn_rope", beta_fast));
    if (beta_fast <= beta_slow) {
      return status::error(errc::invalid_argument, "beta_fast of yarn_rope is %g, must be above beta_slow, %g",
                           beta_fast, beta_slow);
    }
    const auto [low, high] = blend(base);
    if (low > high) {
      return status::error(errc::invalid_argument,
                           "yarn_rope would blend from pair %g down to pair %g: original_max_positions is %lld", low,
                           high, static_cast<long long>(original_max_positions));
    }
    return {};
  }
  [[nodiscard]] double operator()(index_t pair, double frequency, const rope_base& base) const noexcept {
    const auto [low, high] = blend(base);
    const double width = high > low ? high - low : 1e-3;  // as the release has it: a step
    const double interpolated = std::clamp((static_cast<double>(pair) - low) / width, 0.0, 1.0);
    return interpolated * (frequency / factor) + (1 - interpolated) * frequency;
  }
  ///@}

 private:
  struct pair_range {
    double low;
    double high;
  };
  [[nodiscard]] pair_range blend(const rope_base& base) const noexcept {
    const auto pair_of = [&](double turns) {
      const double wavelength = static_cast<double>(original_max_positions) / turns;
      return 0.5 * static_cast<double>(base.rotary_dim) * std::log(wavelength / (2 * std::numbers::pi)) /
             std::log(base.theta);
    };
    const double low = truncate ? std::floor(pair_of(beta_fast)) : pair_of(beta_fast);
    const double high = truncate ? std::ceil(pair_of(beta_slow)) : pair_of(beta_slow);
    return {std::max(low, 0.0), std::min(high, static_cast<double>(base.rotary_dim - 1))};
  }
};

/// Llama 3.1's rescaling, as its release defines it. With t_i = original_max_positions * f_i / (2 pi), the turns of
/// pair i within the original context, and s_i = clamp((t_i - low_freq_factor) / (high_freq_factor - low_freq_factor),
/// 0, 1): f_i' = (1 - s_i) * f_i / factor + s_i * f_i.
struct llama3_rope {
  double factor = 8;                      ///< how far the context is stretched
  double low_freq_factor = 1;             ///< turns up to which a pair is interpolated
  double high_freq_factor = 4;            ///< turns from which on a pair keeps its frequency
  index_t original_max_positions = 8192;  ///< context before stretching, in tokens

  ///@{
  /// See `rope_scaling`.
  [[nodiscard]] status check(const rope_base&) const noexcept {
    RESTKV_RETURN_IF_FAILED(detail::check_positive("the factor of llama3_rope", factor));
    RESTKV_RETURN_IF_FAILED(
        detail::check_positive("original_max_positions of llama3_rope", static_cast<double>(original_max_positions)));
    RESTKV_RETURN_IF_FAILED(detail::check_positive("low_freq_factor of llama3_rope", low_freq_factor));
    RESTKV_RETURN_IF_FAILED(detail::check_positive("high_freq_factor of llama3_rope", high_freq_factor));
    if (high_freq_factor <= low_freq_factor) {
      return status::error(errc::invalid_argument,
                           "high_freq_factor of llama3_rope is %g, must be above low_freq_factor, %g", high_freq_factor,
                           low_freq_factor);
    }
    return {};
  }
  [[nodiscard]] double operator()(index_t, double frequency, const rope_base&) const noexcept {
    const double turns = static_cast<double>(original_max_positions) * frequency / (2 * std::numbers::pi);
    const double kept = std::clamp((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0);
    return (1 - kept) * (frequency / factor) + kept * frequency;
  }
  ///@}
};

/// A model's RoPE. `rotary_dim` is the number of channels that are rotated, head_dim unless the model rotates only a
/// part of them.
template <rope_scaling Scaling = unscaled_rope>
struct rope_parameters {
  index_t rotary_dim = 0;  ///< even, at most head_dim
  double theta = 10000;    ///< the model's base, rope_theta
  Scaling scaling{};       ///< see rope_scaling

  /// Fails on an odd rotary_dim, on a theta of 1 or less, and on what the scaling rejects.
  [[nodiscard]] status check() const noexcept {
    if (rotary_dim <= 0 || rotary_dim % 2 != 0) {
      return status::error(errc::invalid_argument, "rotary_dim is %lld, must be even and at least 2",
                           static_cast<long long>(rotary_dim));
    }
    if (!(theta > 1 && std::isfinite(theta))) {
      return status::error(errc::invalid_argument, "theta of RoPE is %g, must be above 1 and finite", theta);
    }
    return scaling.check(rope_base{theta, rotary_dim});
  }
};

/// Fills in the frequency of every pair, in radians per position, in double: scaling(i, theta^(-2 i / rotary_dim)).
///
/// frequencies: [rotary_dim / 2]. Once per model; engines that hold a table of their own (dynamic NTK, LongRoPE) hand
/// that to `rotate_keys` instead. Fails on parameters outside their ranges and on a span of another size.
template <rope_scaling Scaling>
[[nodiscard]] status rope_frequencies(const rope_parameters<Scaling>& parameters,
                                      std::span<double> frequencies) noexcept {
  RESTKV_RETURN_IF_FAILED(parameters.check());
  const index_t pairs = parameters.rotary_dim / 2;
  if (static_cast<index_t>(frequencies.size()) != pairs) {
    return status::error(errc::shape_mismatch, "frequencies has %zu entries, rotary_dim %lld needs %lld",
                         frequencies.size(), static_cast<long long>(parameters.rotary_dim),
                         static_cast<long long>(pairs));
  }
  const rope_base base{parameters.theta, parameters.rotary_dim};
  for (index_t i = 0; i < pairs; ++i) {
    const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(base.rotary_dim);
    frequencies[static_cast<std::size_t>(i)] = parameters.scaling(i, std::pow(base.theta, exponent), base);
  }
  return {};
}

/// The new position of a compacted key: its slot, so that a head's keys follow each other without gaps.
struct slot_position {
  /// The slot.
  [[nodiscard]] constexpr index_t operator()(index_t, index_t, index_t slot) const noexcept { return slot; }
};

/// Where `rotate_keys` moves a key: a pure function of (sequence, head, slot).
template <class F>
concept new_position = requires(const F& position, index_t i) {
  { position(i, i, i) } -> std::integral;
};

namespace detail {

/// The channels of the rotary pairs of a row.
class rotary_channels {
 public:
  constexpr rotary_channels(rotary_pairs pairing, std::size_t pairs) noexcept
      : step_(pairing == rotary_pairs::interleaved ? 2 : 1),
        apart_(pairing == rotary_pairs::interleaved ? 1 : static_cast<index_t>(pairs)) {}
  [[nodiscard]] constexpr index_t first(index_t pair) const noexcept { return step_ * pair; }
  [[nodiscard]] constexpr index_t second(index_t pair) const noexcept { return first(pair) + apart_; }

 private:
  index_t step_;   // from one pair to the next
  index_t apart_;  // from a pair's first channel to its second
};

/// Turns pair `pair` of a key, counterclockwise: (x, y) -> (x cos - y sin, x sin + y cos).
template <element T, std::floating_point Real>
RESTKV_HD void rotate_pair(T& first, T& second, Real cosine, Real sine) noexcept {
  const Real x = widen<Real>(first);
  const Real y = widen<Real>(second);
  first = narrow<T>(x * cosine - y * sine);
  second = narrow<T>(x * sine + y * cosine);
}

/// That there are frequencies, and at most one for every two channels.
[[nodiscard]] inline status check_frequency_count(std::size_t pairs, index_t channels) noexcept {
  if (pairs > 0 && pairs <= static_cast<std::size_t>(channels / 2)) return {};
  return status::error(errc::shape_mismatch, "frequencies has %zu entries, must be within [1, %lld] for %lld channels",
                       pairs, static_cast<long long>(channels / 2), static_cast<long long>(channels));
}

[[nodiscard]] inline status check_frequencies_finite(std::span<const double> frequencies) noexcept {
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    if (std::isfinite(frequencies[i])) continue;
    return status::error(errc::invalid_argument, "frequency %zu of %zu is %g, must be finite", i, frequencies.size(),
                         frequencies[i]);
  }
  return {};
}

/// Rotates the keys of one head, number b * heads + h. All checks have been made. Pairs are taken in blocks whose
/// cosines and sines fit the stack; neighbouring slots that move equally far share them.
template <cache_layout Layout, new_position NewPosition>
void rotate_head(const const_kept_tokens& old, const Layout& keys, std::span<const double> frequencies,
                 rotary_pairs pairing, const NewPosition& position, index_t row) noexcept {
  using value_type = typename Layout::value_type;
  using real = std::conditional_t<std::is_same_v<value_type, double>, double, float>;
  constexpr index_t block = 128;
  std::array<real, block> cosines;
  std::array<real, block> sines;
  const index_t b = row / old.heads();
  const index_t h = row % old.heads();
  const index_t length = old.lengths(b, h);
  const auto pairs = static_cast<index_t>(frequencies.size());
  const rotary_channels channels(pairing, frequencies.size());
  for (index_t begin = 0; begin < pairs; begin += block) {
    const index_t count = std::min(block, pairs - begin);
    double turned = 0;  // the shift that cosines and sines are of; 0: none yet
    for (index_t slot = 0; slot < length; ++slot) {
      // In double: exact below 2^53, no overflow beyond.
      const double shift = static_cast<double>(position(b, h, slot)) - static_cast<double>(old.positions(b, h, slot));
      if (shift == 0) continue;
      if (shift != turned) {
        turned = shift;
        for (index_t i = 0; i < count; ++i) {
          const double angle = shift * frequencies[static_cast<std::size_t>(begin + i)];
          cosines[static_cast<std::size_t>(i)] = static_cast<real>(std::cos(angle));
          sines[static_cast<std::size_t>(i)] = static_cast<real>(std::sin(angle));
        }
      }
      const tensor_view<value_type, 1> key = keys.row(b, h, slot);
      for (index_t i = 0; i < count; ++i) {
        rotate_pair(key.data[channels.first(begin + i) * key.stride(0)],
                    key.data[channels.second(begin + i) * key.stride(0)], cosines[static_cast<std::size_t>(i)],
                    sines[static_cast<std::size_t>(i)]);
      }
    }
  }
}

}  // namespace detail

/// Moves compacted keys to new positions: pair i of the key in slot s of head h turns by
/// (position(b, h, s) - old.positions(b, h, s)) * frequencies[i], for s < old.lengths(b, h).
///
/// old: the positions that the keys carry now, [batch, heads, slots], the kept set itself right after compaction. They
/// need not ascend. keys: a layout of [batch, heads] rows of head_dim channels (dense, ragged, your own); with one set
/// per query head every row is its own. frequencies: from `rope_frequencies`, in radians; the first
/// 2 * frequencies.size() channels rotate and the rest stay (for a rotary part that lies elsewhere, slice axis 3).
/// position: where to, by default the slot. Only differences matter: with left padding of n tokens whose positions
/// begin behind it, return slot + n.
///
/// A key that does not move keeps its bits. Angles are in double, so that positions up to 2^20 and beyond are as exact
/// as the first: each channel is within a few units of rounding of its element type, relative to the pair's length.
/// That rounding adds up over repeated rotations, and it cannot undo what an engine that computes angles in float
/// already lost (up to position * 2^-24 rad). NaN and infinity stay within their pair; a half that grows past 65504
/// becomes infinite.
///
/// Fails, before anything is written: a layout that is inconsistent, overlaps itself or the kept set, has other heads
/// or too few slots; more frequencies than half the channels, none, or one that is not finite.
///
/// Cost: one read and one write of the keys that move, and a cosine and a sine per pair for each run of slots of a head
/// that move equally far.
template <cache_layout Layout, new_position NewPosition = slot_position, parallel_loop ParallelFor = serial_for>
  requires(element<typename Layout::value_type> && !std::is_const_v<typename Layout::value_type>)
[[nodiscard]] status rotate_keys(const const_kept_tokens& old, const Layout& keys, std::span<const double> frequencies,
                                 rotary_pairs pairing = rotary_pairs::half_split, const NewPosition& position = {},
                                 const ParallelFor& parallel_for = {}) {
  RESTKV_RETURN_IF_FAILED(detail::check_kept_memory(old));
  RESTKV_RETURN_IF_FAILED(detail::check_kept_arrays(old));
  RESTKV_RETURN_IF_FAILED(detail::check_lengths(old));
  RESTKV_RETURN_IF_FAILED(detail::check_room(old, "keys", keys));
  const tensor_view<const double, 1> table(frequencies.data(), {static_cast<index_t>(frequencies.size())});
  RESTKV_RETURN_IF_FAILED(detail::check_disjoint("keys", keys.touched(), "frequencies", touched_bytes(table)));
  RESTKV_RETURN_IF_FAILED(detail::check_frequency_count(frequencies.size(), keys.head_dim()));
  RESTKV_RETURN_IF_FAILED(detail::check_frequencies_finite(frequencies));
  parallel_for(old.batch() * old.heads(),
               [&](index_t row) { detail::rotate_head(old, keys, frequencies, pairing, position, row); });
  return {};
}

/// The same for keys [batch, heads, slots, head_dim].
template <element T, new_position NewPosition = slot_position, parallel_loop ParallelFor = serial_for>
  requires(!std::is_const_v<T>)
[[nodiscard]] status rotate_keys(const const_kept_tokens& old, const tensor_view<T, 4>& keys,
                                 std::span<const double> frequencies, rotary_pairs pairing = rotary_pairs::half_split,
                                 const NewPosition& position = {}, const ParallelFor& parallel_for = {}) {
  return rotate_keys(old, dense_layout<T>{keys}, frequencies, pairing, position, parallel_for);
}

}  // namespace restkv
