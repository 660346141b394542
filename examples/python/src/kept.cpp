// SPDX-License-Identifier: Apache-2.0
#include "kept.hpp"

#include <fmt/format.h>

#include <nanobind/stl/pair.h>

#include <algorithm>
#include <cstring>
#include <limits>

namespace restkv::python {

namespace {

constexpr array_rules positions_rules{.rank = 3, .axes = "[batch, heads, capacity]"};
constexpr array_rules lengths_rules{.rank = 2, .axes = "[batch, heads]"};
constexpr array_rules mask_rules{.rank = 3, .axes = "[batch, heads, tokens]"};

std::vector<std::size_t> shape_of(std::initializer_list<index_t> extents) {
  return {extents.begin(), extents.end()};
}

/// Whoever fails here made the set by hand: the largest position is not known.
kept_set checked(kept_set made) {
  require(check_kept(made.view(), made.batch, made.heads == 0 ? 1 : made.heads,
                     std::numeric_limits<position_t>::max()));
  return trimmed(made.view(), made.from);
}

kept_set from_arrays(nb::handle positions, nb::handle lengths) {
  kept_set made;
  std::vector<index_t> extents;
  std::vector<index_t> rows;
  made.positions = take_integers(positions, "positions", positions_rules, extents);
  made.lengths = take_integers(lengths, "lengths", lengths_rules, rows);
  made.from = framework_of(positions);
  if (rows[0] != extents[0] || rows[1] != extents[1]) {
    throw failure(errc::shape_mismatch, fmt::format("positions is [{}, {}, {}], lengths is [{}, {}]", extents[0],
                                                    extents[1], extents[2], rows[0], rows[1]));
  }
  made.batch = extents[0];
  made.heads = extents[1];
  made.capacity = extents[2];
  return checked(std::move(made));
}

kept_set from_mask(nb::handle mask) {
  kept_set made;
  std::vector<index_t> extents;
  const std::vector<std::int32_t> keep = take_integers(mask, "mask", mask_rules, extents);
  made.from = framework_of(mask);
  made.batch = extents[0];
  made.heads = extents[1];
  made.capacity = extents[2];
  made.positions.resize(keep.size());
  for (index_t row = 0; row < made.batch * made.heads; ++row) {
    const index_t first = row * made.capacity;
    index_t count = 0;
    for (index_t n = 0; n < made.capacity; ++n) {
      if (keep[static_cast<std::size_t>(first + n)] == 0) continue;
      made.positions[static_cast<std::size_t>(first + count++)] = static_cast<position_t>(n);
    }
    made.lengths.push_back(static_cast<position_t>(count));
  }
  return trimmed(made.view(), made.from);
}

/// An array that was made on the host, where the set's own arrays lie.
nb::object where_it_lies(const kept_set& kept, nb::object made) {
  return kept.device ? moved_to(kept.device->place, made) : made;
}

nb::object mask_of(kept_set& kept, index_t tokens) {
  kept.fetch();
  require(check_kept(kept.view(), kept.batch, kept.heads == 0 ? 1 : kept.heads, tokens));
  const index_t rows = kept.batch * kept.heads;
  std::unique_ptr<std::byte[]> mask(new std::byte[static_cast<std::size_t>(rows * tokens)]());
  for (index_t row = 0; row < rows; ++row) {
    for (index_t i = 0; i < kept.lengths[static_cast<std::size_t>(row)]; ++i) {
      mask[static_cast<std::size_t>(row * tokens + kept.positions[static_cast<std::size_t>(row * kept.capacity + i)])] =
          std::byte{1};
    }
  }
  return where_it_lies(kept, give_bytes(kept.from == framework::cupy ? framework::numpy : kept.from, std::move(mask),
                                        shape_of({kept.batch, kept.heads, tokens}), nb::dtype<bool>()));
}

nb::object positions_of(nb::handle self) {
  auto& kept = nb::cast<kept_set&>(self);
  if (kept.device) {
    kept.fetch_lengths();
    const nb::slice all{nb::none(), nb::none(), nb::none()};
    return kept.device->positions[nb::make_tuple(all, all, nb::slice(kept.capacity))];
  }
  const auto shape = shape_of({kept.batch, kept.heads, kept.capacity});
  return give_array(kept.from, kept.positions.data(), shape, nb::dtype<position_t>(), self);
}

nb::object lengths_of(nb::handle self) {
  const auto& kept = nb::cast<const kept_set&>(self);
  if (kept.device) return kept.device->lengths;
  return give_array(kept.from, kept.lengths.data(), shape_of({kept.batch, kept.heads}), nb::dtype<position_t>(), self);
}

/// The positions of one head, a view.
nb::object row_of(nb::handle self, index_t batch, index_t head) {
  auto& kept = nb::cast<kept_set&>(self);
  kept.fetch_lengths();
  const auto within = [](const char* what, index_t& i, index_t count) {
    if (i < -count || i >= count) {
      throw nb::index_error(fmt::format("{} {} of {} does not exist", what, i, count).c_str());
    }
    if (i < 0) i += count;
  };
  within("sequence", batch, kept.batch);
  within("head", head, kept.heads);
  const index_t row = batch * kept.heads + head;
  if (kept.device) {
    const nb::slice own(kept.lengths[static_cast<std::size_t>(row)]);
    return kept.device->positions[nb::make_tuple(batch, head, own)];
  }
  return give_array(kept.from, kept.positions.data() + row * kept.capacity,
                    shape_of({kept.lengths[static_cast<std::size_t>(row)]}), nb::dtype<position_t>(), self);
}

nb::bytes bytes_of(const std::vector<position_t>& numbers) {
  return nb::bytes(numbers.data(), numbers.size() * sizeof(position_t));
}

std::vector<position_t> numbers_of(const nb::bytes& bytes) {
  std::vector<position_t> made(bytes.size() / sizeof(position_t));
  if (!made.empty()) std::memcpy(made.data(), bytes.data(), bytes.size());
  return made;
}

void set_state(kept_set& self, const nb::tuple& state) {
  kept_set made;
  made.batch = nb::cast<index_t>(state[0]);
  made.heads = nb::cast<index_t>(state[1]);
  made.capacity = nb::cast<index_t>(state[2]);
  made.positions = numbers_of(nb::cast<nb::bytes>(state[3]));
  made.lengths = numbers_of(nb::cast<nb::bytes>(state[4]));
  made.from = static_cast<framework>(nb::cast<int>(state[5]));
  if (made.batch < 0 || made.heads < 0 || made.capacity < 0 ||
      static_cast<index_t>(made.lengths.size()) != made.batch * made.heads ||
      static_cast<index_t>(made.positions.size()) != made.batch * made.heads * made.capacity) {
    throw failure(errc::bad_file,
                  fmt::format("a pickled kept set has {} lengths and {} positions for {} sequences of {} heads of {}",
                              made.lengths.size(), made.positions.size(), made.batch, made.heads, made.capacity));
  }
  new (&self) kept_set(checked(std::move(made)));
}

}  // namespace

kept_set trimmed(const const_kept_tokens& kept, framework from) {
  kept_set made;
  made.batch = kept.batch();
  made.heads = kept.heads();
  made.from = from;
  const index_t rows = made.batch * made.heads;
  made.lengths.assign(kept.lengths.data, kept.lengths.data + rows);
  if (rows > 0) made.capacity = *std::max_element(made.lengths.begin(), made.lengths.end());
  made.positions.assign(static_cast<std::size_t>(rows * made.capacity), position_t{-1});
  for (index_t row = 0; row < rows; ++row) {
    std::copy_n(kept.positions.data + row * kept.capacity(), made.lengths[static_cast<std::size_t>(row)],
                made.positions.data() + row * made.capacity);
  }
  return made;
}

void kept_set::fetch_lengths() {
  if (has_lengths) return;
  const nb::object copied = on_host(device->place, device->lengths);
  const array from = take_array(copied, "lengths", {.rank = 2, .axes = "[batch, heads]", .numbers = false});
  const auto* const first = static_cast<const position_t*>(from.data);
  lengths.assign(first, first + from.size());
  capacity = lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
  device->set.capacity = capacity;
  has_lengths = true;
}

void kept_set::fetch() {
  fetch_lengths();
  if (has_positions) return;
  const nb::object copied = on_host(device->place, device->positions);
  const array from = take_array(copied, "positions", {.rank = 3, .axes = "[batch, heads, room]", .numbers = false});
  auto* const first = static_cast<position_t*>(const_cast<void*>(from.data));
  const const_kept_tokens whole{{first, {batch, heads, device->set.room}}, {lengths.data(), {batch, heads}}};
  positions = trimmed(whole, this->from).positions;
  has_positions = true;
}

kept_set kept_of(const call_memory& memory, const array_place& place, index_t tokens) {
  kept_set made;
  made.batch = memory.set.batch;
  made.heads = memory.set.heads;
  made.from = place.from;
  made.device.emplace(kept_on_device{place, memory.positions, memory.lengths, memory.set, tokens});
  made.has_lengths = made.has_positions = false;
  return made;
}

kept_on_device set_at(kept_set& kept, const array_place& place, index_t tokens) {
  kept.fetch_lengths();
  if (kept.device && kept.device->place == place) {
    if (tokens < kept.device->tokens) {
      throw failure(errc::shape_mismatch, fmt::format("the kept set is of a cache of {} tokens, this one has {}",
                                                      kept.device->tokens, tokens));
    }
    return *kept.device;
  }
  kept.fetch();
  require(check_kept(kept.view(), kept.batch, kept.heads == 0 ? 1 : kept.heads, tokens));
  const auto shape = shape_of({kept.batch, kept.heads, kept.capacity});
  const nb::object copied_positions = give_array(framework::numpy, kept.positions.data(), shape,
                                                 nb::dtype<position_t>(), nb::none());
  const nb::object copied_lengths = give_array(framework::numpy, kept.lengths.data(),
                                               shape_of({kept.batch, kept.heads}), nb::dtype<position_t>(), nb::none());
  kept_on_device made{place, moved_to(place, copied_positions), moved_to(place, copied_lengths), {}, tokens};
  made.set = {.batch = kept.batch,
              .heads = kept.heads,
              .room = kept.capacity,
              .capacity = kept.capacity,
              .positions = static_cast<position_t*>(address_of(place, made.positions)),
              .lengths = static_cast<position_t*>(address_of(place, made.lengths))};
  return made;
}

void add_kept(nb::module_& m) {
  nb::class_<kept_set>(m, "Kept", R"(Which positions each head keeps: what `select` returns, and the others take.

Heads are the KV heads, or the query heads where the policy has `per_query_head`. Arrays are of the library whose
arrays were selected from, and share the memory of this object. `kept[b, h]` are the positions of one head;
iterating goes over the heads of all sequences. A set that was selected on a GPU lies there; `lengths` is there at once,
all else waits until the GPU has come so far, and copies to the host what it needs: for most of it the lengths.)")
      .def("__init__",
           [](kept_set& self, nb::handle positions, nb::handle lengths) {
             new (&self) kept_set(from_arrays(positions, lengths));
           },
           nb::arg("positions"), nb::arg("lengths"),
           nb::sig("def __init__(self, positions: Array, lengths: Array) -> None"),
           R"(A set of one's own, copied.

positions: [batch, heads, capacity], ascending within the first lengths[b, h] of each
head; lengths: [batch, heads]; whole numbers of any type. Raises Error for sets that are none.)")
      .def_static("from_mask", &from_mask, nb::arg("mask"), nb::sig("def from_mask(mask: Array) -> Kept"),
                  "The set of the tokens where mask [batch, heads, tokens] is not 0.")
      .def_prop_ro("positions", &positions_of, nb::sig("def positions(self) -> Any"),
                   "Kept positions, ascending, -1 behind a head's own. [batch, heads, capacity], int32")
      .def_prop_ro("lengths", &lengths_of, nb::sig("def lengths(self) -> Any"),
                   "Tokens that each head keeps. [batch, heads], int32")
      .def_ro("batch", &kept_set::batch, "Sequences.")
      .def_ro("heads", &kept_set::heads, "Heads of each sequence.")
      .def_prop_ro("capacity",
                   [](kept_set& kept) {
                     kept.fetch_lengths();
                     return kept.capacity;
                   },
                   "Tokens that the head with the most of them keeps.")
      .def_prop_ro("total",
                   [](kept_set& kept) {
                     kept.fetch_lengths();
                     return kept.view().total();
                   },
                   "Kept tokens over all heads of all sequences.")
      .def("mask", &mask_of, nb::arg("tokens"), nb::sig("def mask(self, tokens: int) -> Any"),
           "True where a token is kept. [batch, heads, tokens], bool. Raises Error where a kept position is no token.")
      .def("__len__", [](const kept_set& kept) { return kept.batch * kept.heads; }, "Heads of all sequences.")
      .def("__getitem__",
           [](nb::handle self, const std::pair<index_t, index_t>& at) { return row_of(self, at.first, at.second); },
           nb::arg("at"), nb::sig("def __getitem__(self, at: tuple[int, int], /) -> Any"),
           "The positions of head at[1] of sequence at[0], ascending. int32")
      .def("__iter__",
           [](nb::handle self) {
             nb::list rows;
             const auto& kept = nb::cast<const kept_set&>(self);
             for (index_t b = 0; b < kept.batch; ++b) {
               for (index_t h = 0; h < kept.heads; ++h) rows.append(row_of(self, b, h));
             }
             return nb::iter(rows);
           },
           nb::sig("def __iter__(self) -> Iterator[Any]"))
      .def("__repr__",
           [](kept_set& kept) {
             kept.fetch_lengths();
             return fmt::format("<restkv.Kept: {} sequences, {} heads, {} tokens kept, {} at most in a head>",
                                kept.batch, kept.heads, kept.view().total(), kept.capacity);
           })
      .def("__eq__",
           [](kept_set& a, nb::handle other) {
             if (!nb::isinstance<kept_set>(other)) return false;
             auto& b = nb::cast<kept_set&>(other);
             a.fetch();
             b.fetch();
             return a.batch == b.batch && a.heads == b.heads && a.lengths == b.lengths && a.positions == b.positions;
           },
           nb::arg("other").none(), nb::sig("def __eq__(self, other: object, /) -> bool"))
      .def("__getstate__",
           [](kept_set& kept) {
             kept.fetch();
             return nb::make_tuple(kept.batch, kept.heads, kept.capacity, bytes_of(kept.positions),
                                   bytes_of(kept.lengths), static_cast<int>(kept.from));
           },
           nb::sig("def __getstate__(self) -> tuple[int, int, int, bytes, bytes, int]"))
      .def("__setstate__", &set_state,
           nb::sig("def __setstate__(self, state: tuple[int, int, int, bytes, bytes, int], /) -> None"));
}

}  // namespace restkv::python
