// SPDX-License-Identifier: Apache-2.0
/// @file
/// Compaction on a backend's threads: `cache/compact.hpp` and `cache/gather.hpp` with the backend in front, as `select`
/// has it, and wrappers that throw.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/cache/compact.hpp>

namespace restkv {

namespace detail {

/// A backend that moves tokens by kernels, with a `compact_in_place` of its own that returns a status.
template <class B>
concept moves_by_kernels = requires { typename B::executor_type; };

}  // namespace detail

/// A backend's threads as a loop for `compact`, `compact_in_place`, `gather_tokens` and `rotate_keys`.
template <tensor_backend Backend>
struct backend_loop {
  Backend& backend;  ///< whose threads run the loop

  /// See `parallel_loop`.
  template <class Body>
  void operator()(index_t n, const Body& body) const {
    backend.parallel_for(n, body);
  }
};
/// `backend_loop{backend}` finds the type.
template <class Backend>
backend_loop(Backend&) -> backend_loop<Backend>;

#if RESTKV_EXCEPTIONS

/// Copies the kept keys and values to two layouts on the backend's threads; throws `restkv::error`. See
/// `compact(kept, key, value, out_key, out_value)`.
template <tensor_backend Backend, cache_layout KeyLayout, cache_layout ValueLayout>
void compact(Backend& backend, const const_kept_tokens& kept,
             const chunked_tensor_view<const typename KeyLayout::value_type>& key,
             const chunked_tensor_view<const typename ValueLayout::value_type>& value, const KeyLayout& out_key,
             const ValueLayout& out_value) {
  throw_if_failed(compact(kept, key, value, out_key, out_value, backend_loop{backend}));
}

/// Moves the kept keys and values to the front of their heads on the backend's threads; throws `restkv::error`. See
/// `compact_in_place(kept, key, value)`.
template <tensor_backend Backend, class K, class V>
  requires(!detail::moves_by_kernels<Backend>)
void compact_in_place(Backend& backend, const const_kept_tokens& kept, const tensor_view<K, 4>& key,
                      const tensor_view<V, 4>& value) {
  throw_if_failed(compact_in_place(kept, key, value, backend_loop{backend}));
}

#endif

}  // namespace restkv
