// SPDX-License-Identifier: Apache-2.0
#include "backends.hpp"
#include "functions.hpp"
#include "kept.hpp"

#include <restkv/compact.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace restkv::python {

namespace {

constexpr array_rules cache_rules{
    .rank = 4, .axes = "[batch, kv_heads, tokens, head_dim]", .numbers = false, .devices = true};
constexpr array_rules own_cache_rules{
    .rank = 4, .axes = "[batch, kv_heads, tokens, head_dim]", .writable = true, .numbers = false, .devices = true};
constexpr array_rules dense_rules{
    .rank = 4, .axes = "[batch, heads, capacity, head_dim]", .writable = true, .numbers = false};
constexpr array_rules ragged_rules{.rank = 2, .axes = "[total, head_dim]", .writable = true, .numbers = false};

/// Calls visit(T{}) with an unsigned type of that many bytes: copies do not look into elements.
template <class Visit>
void with_bytes(const array& cache, const Visit& visit) {
  switch (cache.item_bytes) {
    case 1: visit(std::uint8_t{}); return;
    case 2: visit(std::uint16_t{}); return;
    case 4: visit(std::uint32_t{}); return;
    case 8: visit(std::uint64_t{}); return;
    default:
      throw failure(errc::unsupported, fmt::format("{} has elements of {} bytes, must be 1, 2, 4 or 8", cache.name,
                                                   cache.item_bytes));
  }
}

/// Keys or values on their way, and where they go.
struct destination {
  array source;
  array given;                       ///< `out`, where there is one
  std::unique_ptr<std::byte[]> own;  ///< else, on the host
  nb::object own_on_device;          ///< or on a device
  std::vector<std::size_t> shape;
  std::vector<index_t> strides;

  [[nodiscard]] void* data() const noexcept {
    return given.missing() ? static_cast<void*>(own.get()) : const_cast<void*>(given.data);
  }

  /// `room` is what the result has but for its channels.
  void prepare(const char* name, nb::handle out, const array_rules& rules, std::vector<std::size_t> room) {
    shape = std::move(room);
    shape.push_back(static_cast<std::size_t>(source.extents[3]));
    const bool on_device = array_place(source).library() != nullptr;
    if (!out.is_none()) {
      array_rules anywhere = rules;
      anywhere.devices = on_device;
      given = take_array(out, name, anywhere);
      if (given.device_type != source.device_type || given.device != source.device) {
        throw failure(errc::invalid_argument, fmt::format("{} lies on {}, {} on {}", name, array_place(given).text(),
                                                          source.name, array_place(source).text()));
      }
      if (given.dtype != source.dtype) {
        throw failure(errc::invalid_argument,
                      fmt::format("{} has elements of {} bytes or another type than {}'s {}", name, given.item_bytes,
                                  source.name, source.item_bytes));
      }
      for (std::size_t axis = 0; axis < shape.size(); ++axis) {
        if (static_cast<index_t>(shape[axis]) == given.extents[axis]) continue;
        throw failure(errc::shape_mismatch, fmt::format("{} has {} entries on axis {}, {} are needed", name,
                                                        given.extents[axis], axis, shape[axis]));
      }
      strides = given.strides;
      return;
    }
    if (on_device) {
      own_on_device = empty_array(array_place(source), {shape.begin(), shape.end()}, source.object.attr("dtype"));
    } else {
      std::size_t size = static_cast<std::size_t>(source.item_bytes);
      for (const std::size_t extent : shape) size *= extent;
      own.reset(new std::byte[std::max<std::size_t>(size, 1)]);
    }
    strides.assign(shape.size(), 1);
    for (std::size_t axis = shape.size() - 1; axis-- > 0;) {
      strides[axis] = strides[axis + 1] * static_cast<index_t>(shape[axis + 1]);
    }
  }

  template <class T, std::size_t Rank>
  [[nodiscard]] tensor_view<T, Rank> view() const {
    tensor_view<T, Rank> made;
    made.data = static_cast<T*>(data());
    for (std::size_t axis = 0; axis < Rank; ++axis) {
      made.extents[axis] = static_cast<index_t>(shape[axis]);
      made.strides[axis] = strides[axis];
    }
    return made;
  }

  /// On the device.
  [[nodiscard]] device_tensor tensor() const {
    if (!given.missing()) return tensor_of(given);
    device_tensor made{.given = true,
                       .data = address_of(array_place(source), own_on_device),
                       .type = source.type,
                       .item_bytes = source.item_bytes};
    std::copy(shape.begin(), shape.end(), made.extents.begin());
    std::copy(strides.begin(), strides.end(), made.strides.begin());
    return made;
  }

  [[nodiscard]] nb::object give(nb::handle out) {
    if (own_on_device.is_valid()) return own_on_device;
    return out.is_none() ? give_bytes(source.from, std::move(own), shape, source.dtype) : nb::borrow(out);
  }
};

/// Zeros behind the kept tokens of each head.
template <class T>
void clear_rest(eigen_backend& backend, const const_kept_tokens& kept, const tensor_view<T, 4>& out) {
  backend.parallel_for(kept.batch() * kept.heads(), [&](index_t row) {
    const index_t b = row / kept.heads();
    const index_t h = row % kept.heads();
    for (index_t slot = kept.lengths(b, h); slot < out.extent(2); ++slot) {
      for (index_t c = 0; c < out.extent(3); ++c) out(b, h, slot, c) = T{0};
    }
  });
}

/// `key` and `value` to layouts that make_layout makes of them.
template <class MakeLayout>
void gather_both(eigen_backend& backend, const const_kept_tokens& kept, destination& key, destination& value,
                 const MakeLayout& make_layout) {
  with_bytes(key.source, [&]<class K>(K) {
    with_bytes(value.source, [&]<class V>(V) {
      if constexpr (std::is_same_v<K, V>) {
        require(compact(kept, key.source.view_as<const K, 4>(), value.source.view_as<const V, 4>(),
                        make_layout(key, K{}), make_layout(value, V{}), backend_loop{backend}));
      } else {
        throw failure(errc::unsupported, fmt::format("key has elements of {} bytes, value of {}: they must be alike",
                                                     key.source.item_bytes, value.source.item_bytes));
      }
    });
  });
}

/// On a device: dense, or rows with room for batch * heads * capacity of them, of which the kept ones are filled.
nb::object compact_on(device_library& library, kept_set& kept, destination& key, destination& value,
                      nb::handle out_key, nb::handle out_value, bool ragged) {
  const array_place place(key.source);
  if (array_place(value.source) != place) {
    throw failure(errc::invalid_argument, fmt::format("key lies on {}, value on {}", place.text(),
                                                      array_place(value.source).text()));
  }
  const kept_on_device set = set_at(kept, place, key.source.extents[2]);
  std::vector<std::size_t> room{static_cast<std::size_t>(kept.batch), static_cast<std::size_t>(kept.heads),
                                static_cast<std::size_t>(kept.capacity)};
  if (ragged) room = {room[0] * room[1] * room[2]};
  key.prepare("out[0]", out_key, ragged ? ragged_rules : dense_rules, room);
  value.prepare("out[1]", out_value, ragged ? ragged_rules : dense_rules, room);
  call_memory memory(place);
  device_cache out{.key = key.tensor(), .value = value.tensor()};
  nb::object cu_seqlens;
  if (ragged) {
    cu_seqlens = empty_array(place, {kept.batch * kept.heads + 1}, dtype_named(place, "int32"));
    out.cu_seqlens = static_cast<std::int32_t*>(address_of(place, cu_seqlens));
  }
  const device_tensor from_key = tensor_of(key.source);
  const device_tensor from_value = tensor_of(value.source);
  const device_call call = call_at(place);
  {
    const nb::gil_scoped_release unlocked;
    require(library.compact(call, set.set, from_key, from_value, out, memory));
  }
  if (!ragged) return nb::make_tuple(key.give(out_key), value.give(out_value));
  const nb::slice filled(kept.view().total());
  return nb::make_tuple(key.give(out_key)[filled], value.give(out_value)[filled], cu_seqlens);
}

nb::object compact_dense(const kept_set& kept, destination& key, destination& value, nb::handle out_key,
                         nb::handle out_value, std::optional<int> threads) {
  const std::vector<std::size_t> room{static_cast<std::size_t>(kept.batch), static_cast<std::size_t>(kept.heads),
                                      static_cast<std::size_t>(kept.capacity)};
  key.prepare("out[0]", out_key, dense_rules, room);
  value.prepare("out[1]", out_value, dense_rules, room);
  {
    const nb::gil_scoped_release unlocked;
    const borrowed_backend backend(threads);
    gather_both(*backend, kept.view(), key, value,
                []<class T>(const destination& to, T) { return dense_layout<T>{to.view<T, 4>()}; });
    for (destination* const to : {&key, &value}) {
      with_bytes(to->source, [&]<class T>(T) { clear_rest<T>(*backend, kept.view(), to->view<T, 4>()); });
    }
  }
  return nb::make_tuple(key.give(out_key), value.give(out_value));
}

nb::object compact_ragged(const kept_set& kept, destination& key, destination& value, nb::handle out_key,
                          nb::handle out_value, std::optional<int> threads) {
  const index_t entries = kept.batch * kept.heads + 1;
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(entries));
  const tensor_view<std::int64_t, 1> offsets_view(offsets.data(), {entries});
  require(ragged_offsets(kept.view(), offsets_view));
  if (offsets.back() > std::numeric_limits<std::int32_t>::max()) {
    throw failure(errc::unsupported, fmt::format("{} tokens are kept, cu_seqlens counts up to {}", offsets.back(),
                                                 std::numeric_limits<std::int32_t>::max()));
  }
  const std::vector<std::size_t> room{static_cast<std::size_t>(offsets.back())};
  key.prepare("out[0]", out_key, ragged_rules, room);
  value.prepare("out[1]", out_value, ragged_rules, room);
  {
    const nb::gil_scoped_release unlocked;
    const borrowed_backend backend(threads);
    gather_both(*backend, kept.view(), key, value, [&]<class T>(const destination& to, T) {
      return ragged_layout<T>{to.view<T, 2>(), offsets_view, kept.batch, kept.heads};
    });
  }
  std::unique_ptr<std::byte[]> narrowed(new std::byte[static_cast<std::size_t>(entries) * sizeof(std::int32_t)]);
  std::transform(offsets.begin(), offsets.end(), reinterpret_cast<std::int32_t*>(narrowed.get()),
                 [](std::int64_t offset) { return static_cast<std::int32_t>(offset); });
  nb::object cu_seqlens = give_bytes(key.source.from, std::move(narrowed), {static_cast<std::size_t>(entries)},
                                     nb::dtype<std::int32_t>());
  return nb::make_tuple(key.give(out_key), value.give(out_value), cu_seqlens);
}

nb::object compact_in_their_place(kept_set& kept, nb::handle key_object, nb::handle value_object,
                                  std::optional<int> threads) {
  const array key = take_array(key_object, "key", own_cache_rules);
  const array value = take_array(value_object, "value", own_cache_rules);
  const array_place place(key);
  if (device_library* const library = place.library()) {
    if (array_place(value) != place) {
      throw failure(errc::invalid_argument, fmt::format("key lies on {}, value on {}", place.text(),
                                                        array_place(value).text()));
    }
    const kept_on_device set = set_at(kept, place, key.extents[2]);
    const device_call call = call_at(place);
    const nb::gil_scoped_release unlocked;
    require(library->compact_in_place(call, set.set, tensor_of(key), tensor_of(value)));
  } else {
    kept.fetch();
    const nb::gil_scoped_release unlocked;
    const borrowed_backend backend(threads);
    with_bytes(key, [&]<class T>(T) {
      if (value.item_bytes != key.item_bytes) {
        throw failure(errc::unsupported, fmt::format("key has elements of {} bytes, value of {}: they must be alike",
                                                     key.item_bytes, value.item_bytes));
      }
      require(compact_in_place(kept.view(), key.view_as<T, 4>(), value.view_as<T, 4>(), backend_loop{*backend}));
    });
  }
  const auto front = [&](nb::handle cache) {
    const nb::slice all{nb::none(), nb::none(), nb::none()};
    return nb::object(cache[nb::make_tuple(all, all, nb::slice(kept.capacity))]);
  };
  return nb::make_tuple(front(key_object), front(value_object));
}

nb::object compact_arrays(kept_set& kept, nb::handle key_object, nb::handle value_object,
                          const std::string& layout, nb::handle out, bool in_place, std::optional<int> threads) {
  if (layout != "dense" && layout != "ragged") {
    throw failure(errc::invalid_argument, fmt::format("layout is '{}', must be 'dense' or 'ragged'", layout));
  }
  if (in_place) {
    if (layout != "dense" || !out.is_none()) {
      throw failure(errc::invalid_argument, "in_place goes with the layout dense and without out");
    }
    return compact_in_their_place(kept, key_object, value_object, threads);
  }
  nb::object out_key = nb::none();
  nb::object out_value = nb::none();
  if (!out.is_none()) {
    if (!nb::isinstance<nb::sequence>(out) || nb::len(out) != 2) {
      throw failure(errc::invalid_argument, "out must be a pair of arrays, for keys and for values");
    }
    out_key = out[0];
    out_value = out[1];
  }
  destination key;
  destination value;
  key.source = take_array(key_object, "key", cache_rules);
  value.source = take_array(value_object, "value", cache_rules);
  if (device_library* const library = array_place(key.source).library()) {
    return compact_on(*library, kept, key, value, out_key, out_value, layout == "ragged");
  }
  kept.fetch();
  return (layout == "dense" ? compact_dense : compact_ragged)(kept, key, value, out_key, out_value, threads);
}

}  // namespace

void add_compact(nb::module_& m) {
  m.def("compact", &compact_arrays, nb::arg("kept"), nb::arg("key").none(), nb::arg("value").none(), nb::kw_only(),
        nb::arg("layout") = "dense", nb::arg("out") = nb::none(), nb::arg("in_place") = false,
        nb::arg("threads") = nb::none(),
        nb::sig("def compact(kept: Kept, key: ArrayT, value: ArrayT, *, layout: Literal['dense', 'ragged'] = 'dense', "
                "out: tuple[ArrayT, ArrayT] | None = None, in_place: bool = False, threads: int | None = None) "
                "-> tuple[ArrayT, ...]"),
        R"(Copies the kept keys and values, bit by bit, of any element type.

key, value: [batch, kv_heads, tokens, head_dim], any strides; a kept set per query head takes each KV head several
times.

layout 'dense': (key, value), [batch, heads, kept.capacity, head_dim] each, zeros behind a head's tokens. 'ragged':
(key, value, cu_seqlens), [kept.total, head_dim] each, and where the heads of all sequences begin in them, [batch *
heads + 1], int32. out: a pair of arrays of those shapes and key's type to write to; they are returned. in_place:
moves the kept tokens to the front of key and value themselves, and returns [:, :, :kept.capacity] of them; what
lies behind a head's tokens there is no token. One kept set per KV head is needed.

On a GPU (see `select`) everything is enqueued on the caller's stream, once the lengths of the kept set are there; a
ragged `out` then has room for batch * heads * kept.capacity rows, of which the kept ones are returned.

The interpreter's lock is not held. Raises Error for arrays that do not fit, overlap or may not be written.)");
}

}  // namespace restkv::python
