// SPDX-License-Identifier: Apache-2.0
/// @file
/// Compaction of quantised caches on a `kernel_backend`: kept tokens take their codes and their parameters along. See
/// `cache/quantised_gather.hpp` for what becomes of groups along tokens.
///
/// Codes of a byte or more that lie in pages or in rows of ragged heads, with parameters for each token, need nothing
/// of this: `gather_tokens` and `compact` copy codes and parameters as tensors of their own.
#pragma once

#include <restkv/backend/kernel_compact_rows.hpp>
#include <restkv/cache/quantised_gather.hpp>
#include <restkv/kernel/quantised_gather.hpp>

namespace restkv {

namespace detail {

/// A cache that is only read, as kernels take it.
template <class Scale, memory_space Space>
[[nodiscard]] quantised_view<Scale, Space> without_const(const quantised_view<const Scale, Space>& view) noexcept {
  const auto cast = []<class T>(const tensor_view<const T, 4, Space>& part) {
    return tensor_view<T, 4, Space>(const_cast<T*>(part.data), part.extents, part.strides);
  };
  return {cast(view.codes), cast(view.scale),      cast(view.zero),         cast(view.offset), view.tokens,
          view.channels,    view.tokens_per_group, view.channels_per_group, view.format};
}

}  // namespace detail

/// Copies kept tokens of a quantised cache: slot i of head h of `out` becomes token kept.positions(b, h, i) of head
/// h / group of `source`, where group = kept.heads() / source.heads(), bit by bit as the CPU's `gather_tokens` has it.
///
/// source, out: in the backend's memory, with the same channels, groups, bits and parameters; out has kept.heads()
/// heads and at least kept.capacity() tokens. Keys and values are one call each.
///
/// Enqueues; nothing is written on failure, but for a launch that fails (errc::device_failure). Fails as the CPU's
/// does, as far as the host can see. Cost: one read and one write of the kept tokens; two reads and the arithmetic for
/// groups that are quantised again.
template <class Executor, element Scale, element OutScale>
  requires(std::is_same_v<std::remove_const_t<Scale>, OutScale>)
[[nodiscard]] status gather_tokens(kernel_backend<Executor>& backend, const detail::kept_of<Executor>& kept,
                                   const quantised_view<Scale, Executor::space>& source,
                                   const quantised_view<OutScale, Executor::space>& out) {
  const quantised_view<const OutScale, Executor::space> in = source;
  RESTKV_RETURN_IF_FAILED(detail::check_quantised_gather(kept, in, out));
  RESTKV_RETURN_IF_FAILED(detail::check_room("out", out.tokens, kept.capacity()));
  kernel::gather_codes(backend.executor(), kernel::kept_rows(kept), kept.heads() / in.heads(),
                       detail::without_const<OutScale>(in), out);
  return backend.outcome("a gather of quantised tokens");
}

/// Moves the kept tokens of a quantised cache to the front of their own heads, with the outcome of `gather_tokens` bit
/// by bit. One set per KV head. Enqueues; fails as the CPU's does, as far as the host can see.
template <class Executor, element Scale>
  requires(!std::is_const_v<Scale>)
[[nodiscard]] status compact_in_place(kernel_backend<Executor>& backend, const detail::kept_of<Executor>& kept,
                                      const quantised_view<Scale, Executor::space>& cache) {
  RESTKV_RETURN_IF_FAILED(detail::check_quantised_in_place(kept, cache));
  kernel::gather_codes(backend.executor(), kernel::kept_rows(kept), 1, cache, cache);
  return backend.outcome("compaction of quantised tokens in place");
}

}  // namespace restkv
