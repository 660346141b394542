// SPDX-License-Identifier: Apache-2.0
// What compaction on a kernel backend refuses: what the CPU's refuses, in its words, with nothing written.
#include "cache/cache_support.hpp"
#include "support/catch.hpp"

#include <restkv/backend/host/backend.hpp>
#include <restkv/backend/kernel_compact.hpp>
#include <restkv/cache/paged_gather.hpp>
#include <restkv/compact.hpp>

#include <string>

using namespace restkv;
using namespace restkv_test;

namespace {

constexpr memory_space host = memory_space::host;
using cache = tensor_view<float, 4>;

/// Both fail with the same code and the same words.
void same_refusal(const status& found, const status& wanted) {
  INFO("kernels: " << found.message());
  INFO("the CPU: " << wanted.message());
  CHECK(!wanted.ok());
  CHECK(found.code() == wanted.code());
  CHECK(std::string(found.message()) == wanted.message());
}

cache repeated(cache view) {
  view.strides[2] = 0;
  return view;
}

cache nowhere(cache view) {
  view.data = nullptr;
  return view;
}

/// Caches of 2 sequences, 2 heads, 20 tokens, 8 channels, and a kept set of at most 10 tokens a head.
struct caches {
  random_engine random{7};
  guarded_tensor<float, 4> key{random, {2, 2, 20, 8}, {}};
  guarded_tensor<float, 4> value{random, {2, 2, 20, 8}, {}};
  guarded_tensor<float, 4> out_key{random, {2, 2, 10, 8}, {}};
  guarded_tensor<float, 4> out_value{random, {2, 2, 10, 8}, {}};
  guarded_tensor<float, 4> before{out_key};
  guarded_tensor<float, 4> key_before{key};
  random_kept kept{random, 2, 2, 20, 10};
  host_kernel_backend backend{std::uint64_t{1}};

  ~caches() {
    CHECK(out_key.same_bytes(before));
    CHECK(key.same_bytes(key_before));
  }
};

}  // namespace

TEST_CASE("compact on a kernel backend refuses in the CPU's words") {
  caches c;
  const auto refused = [&](const_kept_tokens kept, const cache& key, const cache& value, const cache& out_key,
                           const cache& out_value) {
    same_refusal(compact(c.backend, kept, key, value, out_key, out_value),
                 compact(kept, key, value, dense_layout<float>{out_key}, dense_layout<float>{out_value}));
  };
  const const_kept_tokens kept = c.kept.read();
  const cache key = c.key.view();
  const cache value = c.value.view();
  const cache out_key = c.out_key.view();
  const cache out_value = c.out_value.view();
  const random_kept three_heads(c.random, 2, 3, 20, 10);
  const random_kept one_sequence(c.random, 1, 2, 20, 10);
  refused(three_heads.read(), key, value, out_key, out_value);
  refused(one_sequence.read(), key, value, out_key, out_value);
  refused({kept.positions, three_heads.read().lengths}, key, value, out_key, out_value);
  refused({tensor_view<const position_t, 3>(nullptr, kept.positions.extents), kept.lengths}, key, value, out_key,
          out_value);
  refused(kept, nowhere(key), value, out_key, out_value);
  refused(kept, key, nowhere(value), out_key, out_value);
  refused(kept, key.slice(2, 0, -1), value, out_key, out_value);
  refused(kept, key, value.slice(0, 0, 1), out_key, out_value);
  refused(kept, key, value.slice(1, 0, 1), out_key, out_value);
  refused(kept, key, value.slice(2, 0, 19), out_key, out_value);
  refused(kept, key, value, nowhere(out_key), out_value);
  refused(kept, key, value, out_key, nowhere(out_value));
  refused(kept, key, value, repeated(out_key), out_value);
  refused(kept, key, value, out_key.slice(0, 0, 1), out_value);
  refused(kept, key, value, out_key, out_value.slice(1, 0, 1));
  refused(kept, key, value, out_key, out_value.slice(3, 0, 7));
  refused(kept, key, value, key.slice(2, 0, 10), out_value);
  refused(kept, key, value, value.slice(2, 0, 10), out_value);
  refused(kept, key, value, out_key, key.slice(2, 0, 10));
  refused(kept, key, value, out_key, out_key);

  // Keys that are counted like positions, so that an output may lie where the kept set does.
  using numbers = tensor_view<position_t, 4>;
  guarded_tensor<position_t, 4> source(c.random, {2, 2, 20, 8}, {});
  guarded_tensor<position_t, 4> out(c.random, {2, 2, 10, 8}, {});
  std::vector<position_t> memory(2 * 2 * 10 * 8, 0);
  const numbers over(memory.data(), {2, 2, 10, 8});
  const const_kept_tokens in_it({memory.data(), {2, 2, 10}}, {memory.data() + 40, {2, 2}});
  same_refusal(compact(c.backend, in_it, source.view(), source.view(), out.view(), over),
               compact(in_it, source.read(), source.read(), dense_layout<position_t>{out.view()},
                       dense_layout<position_t>{over}));
  const const_kept_tokens lengths_in_it(kept.positions, {memory.data(), {2, 2}});
  same_refusal(gather_tokens(c.backend, lengths_in_it, source.view(), over),
               gather_tokens(lengths_in_it, source.read(), dense_layout<position_t>{over}));

  // What only the capacity can say, where lengths cannot be read.
  check_error(compact(c.backend, kept, key, value, out_key.slice(2, 0, 9), out_value), errc::shape_mismatch, {9, 10},
              "out_key");
}

TEST_CASE("ragged compaction on a kernel backend refuses in the CPU's words") {
  caches c;
  const const_kept_tokens kept = c.kept.read();
  using ragged = ragged_rows<float, host>;
  guarded_tensor<float, 2> rows(c.random, {40, 8}, {});
  const guarded_tensor<float, 2> before(rows);
  std::vector<std::int64_t> memory(5);
  const tensor_view<std::int64_t, 1> offsets(memory.data(), {5});
  REQUIRE(ragged_offsets(c.backend, kept, offsets).ok());
  const auto refused = [&](const ragged& out) {
    same_refusal(gather_tokens(c.backend, kept, c.key.read(), out),
                 gather_tokens(kept, c.key.read(), ragged_layout<float>{out.rows, out.offsets, 2, 2}));
  };
  refused({rows.view(), offsets.slice(0, 0, 4)});
  refused({tensor_view<float, 2>(nullptr, {40, 8}), offsets});
  refused({rows.view().slice(1, 0, 7), offsets});
  refused({tensor_view<float, 2>(rows.view().data, {40, 8}, {0, 1}), offsets});
  refused({tensor_view<float, 2>(c.key.view().data, {40, 8}), offsets});
  check_error(gather_tokens(c.backend, kept, c.key.read(), ragged{rows.view().slice(0, 0, 39), offsets}),
              errc::shape_mismatch, {39, 40}, "out");
  CHECK(rows.same_bytes(before));

  const auto refused_offsets = [&](const tensor_view<std::int64_t, 1>& out) {
    same_refusal(ragged_offsets(c.backend, kept, out), ragged_offsets(kept, out));
  };
  refused_offsets(offsets.slice(0, 0, 4));
  refused_offsets({nullptr, {5}});
  refused_offsets({memory.data(), {5}, {0}});
}

TEST_CASE("paged compaction on a kernel backend refuses in the CPU's words") {
  caches c;
  const const_kept_tokens kept = c.kept.read();
  guarded_tensor<float, 4> pool(c.random, {16, 1, 3, 8}, {});
  const guarded_tensor<float, 4> before(pool);
  std::vector<page_t> ids(16);
  std::iota(ids.begin(), ids.end(), page_t{0});
  std::vector<position_t> lengths(4, 10);
  const const_page_tables tables({ids.data(), {2, 2, 4}}, {lengths.data(), {2, 2}});
  const paged_layout<float> good{pool.view(), tables};
  const auto refused = [&](const paged_layout<float>& out) {
    same_refusal(gather_tokens(c.backend, kept, c.key.read(), out), gather_tokens(kept, c.key.read(), out));
  };
  refused({pool.view().slice(2, 0, 0), tables});
  refused({pool.view().slice(3, 0, 7), tables});
  refused({repeated(pool.view()), tables});
  refused({nowhere(pool.view()), tables});
  refused({pool.view().slice(0, 0, -1), tables});
  refused({pool.view(), {tables.ids.slice(1, 0, 1), tables.lengths}});
  refused({pool.view(), tables.sequence(0)});
  refused({pool.view(), {tables.ids.slice(1, 0, 1), tables.lengths.slice(1, 0, 1)}});
  refused({pool.view(), {{nullptr, {2, 2, 4}}, tables.lengths}});
  refused({pool.view(), {tables.ids, {reinterpret_cast<const position_t*>(pool.view().data), {2, 2}}}});
  refused({cache(c.key.view().data, {16, 1, 3, 8}), tables});
  check_error(gather_tokens(c.backend, kept, c.key.read(),
                            paged_layout<float>{pool.view(), {tables.ids.slice(2, 0, 3), tables.lengths}}),
              errc::shape_mismatch, {9, 10}, "out");

  const random_kept of_pages(c.random, 2, 2, 10, 10);
  const auto refused_source = [&](const paged_layout<const float>& from, const cache& out) {
    same_refusal(gather_tokens(c.backend, of_pages.set(), from, out),
                 gather_tokens(of_pages.read(), from, dense_layout<float>{out}));
  };
  const cache out = c.out_key.view();
  refused_source({pool.read(), tables.sequence(0)}, out);
  refused_source({pool.read().slice(2, 0, 0), tables}, out);
  refused_source({pool.read(), tables}, out.slice(3, 0, 7));
  refused_source({pool.read(), tables}, cache(pool.view().data, {2, 2, 10, 8}));
  check_error(gather_tokens(c.backend, kept,
                            paged_layout<const float>{
                                pool.read(), {{reinterpret_cast<const page_t*>(out.data), {2, 2, 4}}, tables.lengths}},
                            cache(out.data, {2, 2, 10, 8})),
              errc::aliasing, {}, "tables");

  // Keys and values of one pool need tables of their own.
  same_refusal(compact(c.backend, kept, c.key.read(), c.value.read(), good, good),
               detail::overlap_error("out_key", "out_value", good.touched(), good.touched()));
  const paged_layout<float> wide{cache(pool.view().data, {16, 1, 3, 4}, pool.view().strides), tables};
  same_refusal(compact(c.backend, kept, c.key.read(), c.value.read().slice(3, 0, 4), good, wide),
               detail::overlap_error("out_key", "out_value", good.touched(), wide.touched()));
  CHECK(pool.same_bytes(before));

  std::vector<page_t> device_ids(16);
  std::vector<position_t> device_lengths(4);
  const page_tables uploaded({device_ids.data(), {2, 2, 4}}, {device_lengths.data(), {2, 2}});
  REQUIRE(upload_tables(c.backend, tables, 16, 3, uploaded).ok());
  CHECK(device_ids == ids);
  CHECK(device_lengths == lengths);
  same_refusal(upload_tables(c.backend, tables, 15, 3, uploaded), check_tables(tables, 15, 3));
  same_refusal(upload_tables(c.backend, tables, 16, 2, uploaded), check_tables(tables, 16, 2));
  check_error(upload_tables(c.backend, tables, 16, 3, uploaded.sequence(0)), errc::shape_mismatch, {1, 2}, "out");

  const tensor_view<position_t, 2> of_tables(device_lengths.data(), {2, 2});
  check_error(page_lengths(c.backend, kept, 2, of_tables), errc::shape_mismatch, {4, 2}, "lengths");
  check_error(page_lengths(c.backend, kept, 1, of_tables.slice(0, 0, 1)), errc::shape_mismatch, {1, 2}, "lengths");
  check_error(move_tokens(c.backend, kept, good, tables.sequence(1)), errc::shape_mismatch, {1, 2}, "the plan");
  const random_kept per_query_head(c.random, 2, 4, 10, 10);
  same_refusal(move_tokens(c.backend, per_query_head.set(), good, tables),
               detail::check_kept_of_tables(per_query_head.read(), tables, 1));
  const random_kept one_sequence(c.random, 1, 2, 10, 10);
  same_refusal(move_tokens(c.backend, one_sequence.set(), good, tables),
               detail::check_kept_of_tables(one_sequence.read(), tables, 1));
  check_error(compact_in_place(c.backend, kept, good, good), errc::aliasing, {}, "overlap");
}

TEST_CASE("compaction in place on a kernel backend refuses in the CPU's words") {
  caches c;
  const const_kept_tokens kept = c.kept.read();
  const cache key = c.key.view();
  const cache value = c.value.view();
  const auto refused = [&](const const_kept_tokens& set, const cache& a, const cache& b) {
    same_refusal(compact_in_place(c.backend, set, a, b), compact_in_place(set, a, b));
  };
  const random_kept per_query_head(c.random, 2, 4, 20, 10);
  const random_kept three_heads(c.random, 2, 3, 20, 10);
  refused(per_query_head.read(), key, value);
  refused(three_heads.read(), key, value);
  refused(kept, nowhere(key), value);
  refused(kept, repeated(key), value);
  refused(kept, key, repeated(value));
  refused(kept, key, value.slice(0, 0, 1));
  refused(kept, key, value.slice(2, 0, 19));
  refused(kept, key, key);
}

TEST_CASE("rotations on a kernel backend refuse in the CPU's words") {
  caches c;
  const const_kept_tokens kept = c.kept.read();
  std::vector<double> memory{1.0, 0.5, 0.25, 0.125, 0.0625};
  const auto table = [&](index_t pairs) { return tensor_view<const double, 1>(memory.data(), {pairs}); };
  const cache out = c.out_key.view();
  const auto refused = [&](const const_kept_tokens& set, const cache& keys, index_t pairs) {
    same_refusal(rotate_keys(c.backend, set, keys, key_rotation<host>{table(pairs)}),
                 rotate_keys(set, keys, std::span<const double>(memory.data(), static_cast<std::size_t>(pairs))));
  };
  refused(kept, out, 5);
  refused(kept, out, 0);
  refused(kept, nowhere(out), 4);
  refused(kept, repeated(out), 4);
  refused(kept, out.slice(1, 0, 1), 4);
  refused({kept.positions.slice(1, 0, 1), kept.lengths}, out, 4);
  const auto run = [&](const tensor_view<const double, 1>& frequencies) {
    return compact(c.backend, kept, c.key.view(), c.value.view(), out, c.out_value.view(),
                   key_rotation<host>{frequencies});
  };
  check_error(run(table(5)), errc::shape_mismatch, {5, 4, 8}, "frequencies");
  check_error(run({nullptr, {4}}), errc::missing_input, {4}, "frequencies");
  check_error(run({memory.data(), {2}, {2}}), errc::shape_mismatch, {2}, "stride");
  check_error(run({reinterpret_cast<const double*>(out.data), {4}}), errc::aliasing, {}, "frequencies");
  check_error(compact_in_place(c.backend, kept, c.key.view(), c.value.view(), key_rotation<host>{table(5)}),
              errc::shape_mismatch, {5, 4, 8}, "frequencies");

  memory[1] = std::numeric_limits<double>::infinity();
  std::vector<double> uploaded(4);
  const tensor_view<double, 1> to(uploaded.data(), {4});
  same_refusal(upload_frequencies(c.backend, std::span<const double>(memory).first(4), to),
               rotate_keys(kept, out, std::span<const double>(memory).first(4)));
  check_error(upload_frequencies(c.backend, memory, to), errc::shape_mismatch, {4, 5}, "out");
}
