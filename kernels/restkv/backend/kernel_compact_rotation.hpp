// SPDX-License-Identifier: Apache-2.0
/// @file
/// RoPE of kept keys on a `kernel_backend`: `rotate_keys`, and the rotation that compaction takes along. See
/// `cache/rope.hpp` for the formula and its accuracy.
#pragma once

#include <restkv/backend/kernel_compact_rows.hpp>
#include <restkv/cache/rope.hpp>
#include <restkv/kernel/gather_tokens.hpp>
#include <restkv/kernel/rotate_keys.hpp>

namespace restkv {

/// How keys are turned: pair i of the key in slot s of head h by (position(b, h, s) - kept.positions(b, h, s)) *
/// frequencies(i). `position` is called by kernels: mark its call operator constexpr or `RESTKV_HD`.
template <memory_space Space, new_position NewPosition = slot_position>
struct key_rotation {
  tensor_view<const double, 1, Space> frequencies{};  ///< [pairs], dense; see `upload_frequencies`
  rotary_pairs pairing = rotary_pairs::half_split;    ///< which channels make a pair
  NewPosition position{};                             ///< where to, by default the slot
};

/// Keys keep the positions that they carry.
struct no_rotation {};

namespace detail {

template <class R, memory_space Space>
inline constexpr bool is_rotation_in = std::is_same_v<R, no_rotation>;
template <class NewPosition, memory_space Space>
inline constexpr bool is_rotation_in<key_rotation<Space, NewPosition>, Space> = true;

/// A rotation of keys of type T in a memory, or none.
template <class R, memory_space Space, class T>
concept rotation_of = is_rotation_in<R, Space> && (std::is_same_v<R, no_rotation> || element<T>);

[[nodiscard]] inline status check_rotation(const no_rotation&, const char*, const byte_range&, index_t) noexcept {
  return {};
}
/// That a rotation fits keys of so many channels, whose memory is `bytes`.
template <memory_space Space, class NewPosition>
[[nodiscard]] status check_rotation(const key_rotation<Space, NewPosition>& rotation, const char* keys,
                                    const byte_range& bytes, index_t channels) noexcept {
  const auto& table = rotation.frequencies;
  RESTKV_RETURN_IF_FAILED(check_view("frequencies", table));
  RESTKV_RETURN_IF_FAILED(check_disjoint(keys, bytes, "frequencies", touched_bytes(table)));
  RESTKV_RETURN_IF_FAILED(check_frequency_count(static_cast<std::size_t>(table.extent(0)), channels));
  if (table.dense()) return {};
  return status::error(errc::shape_mismatch, "frequencies has a stride of %lld, must be 1",
                       static_cast<long long>(table.stride(0)));
}

template <class T, class Executor>
void gather_keys(Executor& executor, const kernel::kept_rows& kept, index_t group, const kernel::token_rows& source,
                 const kernel::token_rows& out, const no_rotation&) {
  kernel::gather(executor, kept, group, source, out);
}
template <class T, class Executor, memory_space Space, class NewPosition>
void gather_keys(Executor& executor, const kernel::kept_rows& kept, index_t group, const kernel::token_rows& source,
                 const kernel::token_rows& out, const key_rotation<Space, NewPosition>& rotation) {
  kernel::gather_rotated<T>(executor, kept, group, source, out, rotation.frequencies.data,
                            rotation.frequencies.extent(0), rotation.pairing, rotation.position);
}

template <class T, class Executor>
void turn_keys(Executor&, const kernel::kept_rows&, const kernel::token_rows&, const no_rotation&) {}
template <class T, class Executor, memory_space Space, class NewPosition>
void turn_keys(Executor& executor, const kernel::kept_rows& kept, const kernel::token_rows& keys,
               const key_rotation<Space, NewPosition>& rotation) {
  kernel::rotate<T>(executor, kept, keys, rotation.frequencies.data, rotation.frequencies.extent(0), rotation.pairing,
                    rotation.position);
}

}  // namespace detail

/// Copies a model's frequencies to a backend's memory, once: out(i) = frequencies[i]. out: [pairs], dense. Fails,
/// before anything is written, on frequencies that are not finite and on an array of another size.
template <class Executor>
[[nodiscard]] status upload_frequencies(kernel_backend<Executor>& backend, std::span<const double> frequencies,
                                        const tensor_view<double, 1, Executor::space>& out) {
  RESTKV_RETURN_IF_FAILED(detail::check_view("out", out));
  RESTKV_RETURN_IF_FAILED(
      detail::check_equal("out", "entries", out.extent(0), "frequencies", static_cast<index_t>(frequencies.size())));
  RESTKV_RETURN_IF_FAILED(detail::check_frequencies_finite(frequencies));
  if (!out.dense()) {
    return status::error(errc::shape_mismatch, "out has a stride of %lld, must be 1",
                         static_cast<long long>(out.stride(0)));
  }
  return backend.upload(out.data, frequencies);
}

/// Moves compacted keys to new positions, in their slots, as `rotate_keys` does on the CPU: kept names the positions
/// that the keys carry now. keys: [batch, heads, slots, head_dim], `ragged_rows` or pages, of float, half, bfloat16 or
/// double.
///
/// Enqueues; nothing is written on failure, but for a launch that fails (errc::device_failure). Fails as the CPU's
/// does, as far as the host can see. Cost: one read and one write of the keys, a sine and a cosine a pair and slot.
template <class Executor, detail::output_rows<Executor::space> Keys, class NewPosition>
  requires element<detail::rows_value_t<Keys>>
[[nodiscard]] status rotate_keys(kernel_backend<Executor>& backend, const detail::kept_of<Executor>& kept,
                                 const Keys& keys, const key_rotation<Executor::space, NewPosition>& rotation) {
  RESTKV_RETURN_IF_FAILED(detail::check_kept_memory(kept));
  RESTKV_RETURN_IF_FAILED(detail::check_kept_arrays(kept));
  const byte_range bytes = touched_bytes(detail::memory_of(keys));
  RESTKV_RETURN_IF_FAILED(detail::check_places(kept, "keys", keys));
  RESTKV_RETURN_IF_FAILED(detail::check_apart_from_kept(kept, "keys", bytes));
  RESTKV_RETURN_IF_FAILED(detail::check_rotation(rotation, "keys", bytes, detail::channels_of(keys)));
  detail::turn_keys<detail::rows_value_t<Keys>>(backend.executor(), kernel::kept_rows(kept),
                                                detail::kernel_rows(keys, kept.heads()), rotation);
  return backend.outcome("a rotation of keys");
}

}  // namespace restkv
