// SPDX-License-Identifier: Apache-2.0
/// @file
/// Kept tokens moved to the front of their own heads on a `kernel_backend`: within a cache, within the pages of each
/// table, or to the pages of a plan.
#pragma once

#include <restkv/backend/kernel_compact_rotation.hpp>
#include <restkv/cache/page_moves.hpp>
#include <restkv/kernel/gather_in_place.hpp>

namespace restkv {

namespace detail {

///@{
/// That a kept set fits rows that it is to be applied to in place.
template <class Kept, class T, memory_space Space>
[[nodiscard]] status check_rows_in_place(const Kept& kept, const char* name,
                                         const tensor_view<T, 4, Space>& cache) noexcept {
  RESTKV_RETURN_IF_FAILED(check_kept_shape(kept, cache.extent(0), cache.extent(1)));
  return check_memory_in_place(kept, name, cache);
}
template <class Kept, class T, memory_space Space>
[[nodiscard]] status check_rows_in_place(const Kept& kept, const char* name,
                                         const paged_layout<T, Space>& cache) noexcept {
  RESTKV_RETURN_IF_FAILED(check_kept_shape(kept, cache.batch(), cache.heads()));
  RESTKV_RETURN_IF_FAILED(check_one_set(kept.heads(), name, cache.heads()));
  return check_apart_from_kept(kept, name, touched_bytes(cache.pages));
}
///@}

/// The checks and launches of both kinds of `compact_in_place`.
template <class Executor, class Key, class Value, class Rotation>
[[nodiscard]] status compact_rows_in_place(kernel_backend<Executor>& backend, const kept_of<Executor>& kept,
                                           const Key& key, const Value& value, const Rotation& rotation) {
  RESTKV_RETURN_IF_FAILED(check_kept_memory(kept));
  RESTKV_RETURN_IF_FAILED(check_rows("key", key));
  RESTKV_RETURN_IF_FAILED(check_rows("value", value));
  RESTKV_RETURN_IF_FAILED(check_beside_rows(key, value));
  RESTKV_RETURN_IF_FAILED(check_rows_in_place(kept, "key", key));
  RESTKV_RETURN_IF_FAILED(check_rows_in_place(kept, "value", value));
  RESTKV_RETURN_IF_FAILED(check_outputs_apart("key", key, "value", value));
  RESTKV_RETURN_IF_FAILED(check_rotation(rotation, "key", touched_bytes(memory_of(key)), channels_of(key)));
  const kernel::kept_rows rows(kept);
  kernel::compact_in_place(backend.executor(), rows, kernel::rows_of(key));
  turn_keys<rows_value_t<Key>>(backend.executor(), rows, kernel::rows_of(key), rotation);
  kernel::compact_in_place(backend.executor(), rows, kernel::rows_of(value));
  return backend.outcome("compaction in place");
}

}  // namespace detail

/// Moves the kept keys and values to the front of their heads: slot i of a head holds what lay at kept.positions(b, h,
/// i); what lies behind the kept tokens is unspecified. With a `key_rotation` the keys in the slots are turned
/// afterwards.
///
/// key: [batch, kv_heads, tokens, key_dim], value: [batch, kv_heads, tokens, value_dim], any strides; one set per KV
/// head. They may interleave within one buffer.
///
/// Enqueues; nothing is written on failure, but for a launch that fails (errc::device_failure). Fails as the CPU's
/// `compact_in_place` does, as far as the host can see. Cost: one read and one write of what moves, and another of the
/// keys that are turned.
template <class Executor, class K, class V, detail::rotation_of<Executor::space, K> Rotation = no_rotation>
  requires(!std::is_const_v<K> && !std::is_const_v<V>)
[[nodiscard]] status compact_in_place(kernel_backend<Executor>& backend, const detail::kept_of<Executor>& kept,
                                      const tensor_view<K, 4, Executor::space>& key,
                                      const tensor_view<V, 4, Executor::space>& value, const Rotation& rotation = {}) {
  return detail::compact_rows_in_place(backend, kept, key, value, rotation);
}

/// The same within pages: slot i of a head comes to lie in entry i / page_size of its table. The tables stay as they
/// are, so that nothing is read back: a table of n tokens needs its first pages_of(n, page_size) pages afterwards, at
/// most those of kept.capacity() tokens, and the rest may be released. `page_lengths` says how many tokens each has.
///
/// Pages must be the sequences' own: in no table twice, nor in another's. Where pages are shared, plan the moves on the
/// host (`plan_page_moves`) and run them by `move_tokens`.
template <class Executor, class K, class V, detail::rotation_of<Executor::space, K> Rotation = no_rotation>
  requires(!std::is_const_v<K> && !std::is_const_v<V>)
[[nodiscard]] status compact_in_place(kernel_backend<Executor>& backend, const detail::kept_of<Executor>& kept,
                                      const paged_layout<K, Executor::space>& key,
                                      const paged_layout<V, Executor::space>& value, const Rotation& rotation = {}) {
  return detail::compact_rows_in_place(backend, kept, key, value, rotation);
}

/// Moves the kept tokens of one tensor in pages as a plan of `plan_page_moves` says: slot i of a head goes to entry
/// i / page_size of its table in `after`, from where its table in `cache` has it. Once for keys, for values, and for
/// arrays beside them.
///
/// cache: pages and the tables before; after: `page_moves::ids` and `lengths`; all of it in the backend's memory (see
/// `upload_tables`). Enqueues; the plan is committed on the host, whenever the host likes, by `commit_page_moves`.
/// Pages that are let go of must not be written before this has run. Cost: one read and one write of the tokens that
/// move.
template <class Executor, class T>
  requires(!std::is_const_v<T>)
[[nodiscard]] status move_tokens(kernel_backend<Executor>& backend, const detail::kept_of<Executor>& kept,
                                 const paged_layout<T, Executor::space>& cache,
                                 const std::type_identity_t<basic_page_tables<const page_t, Executor::space>>& after) {
  RESTKV_RETURN_IF_FAILED(cache.check_shapes());
  RESTKV_RETURN_IF_FAILED(check_table_shapes(after, cache.page_size()));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("the plan", "sequences", after.batch(), "tables", cache.tables.batch()));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("the plan", "tables", after.tables(), "tables", cache.tables.tables()));
  RESTKV_RETURN_IF_FAILED(detail::check_kept_memory(kept));
  RESTKV_RETURN_IF_FAILED(check_kept_shape(kept, cache.batch(), cache.heads()));
  RESTKV_RETURN_IF_FAILED(detail::check_heads_of_tables(kept.heads(), cache.heads()));
  const byte_range bytes = touched_bytes(cache.pages);
  RESTKV_RETURN_IF_FAILED(detail::check_apart_from_kept(kept, "pages", bytes));
  RESTKV_RETURN_IF_FAILED(detail::check_disjoint("pages", bytes, "the plan", touched_bytes(after.ids)));
  const paged_layout<T, Executor::space> to{cache.pages, after};
  kernel::compact_in_place(backend.executor(), kernel::kept_rows(kept), kernel::rows_of(cache), kernel::rows_of(to));
  return backend.outcome("moves between pages");
}

}  // namespace restkv
