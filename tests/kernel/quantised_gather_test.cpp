// SPDX-License-Identifier: Apache-2.0
// The kernels that move quantised tokens and running scores, on the host group, against the library's own loops.
#include "cache/cache_support.hpp"
#include "kernel/quantised_support.hpp"
#include "support/catch.hpp"

#include <restkv/backend/host/backend.hpp>
#include <restkv/backend/kernel_compact.hpp>
#include <restkv/kernel/running_update.hpp>
#include <restkv/session/session_layer.hpp>

using namespace restkv;
using namespace restkv_test;

namespace {

template <class Scale>
void check_quantised(index_t turn) {
  random_engine random(static_cast<unsigned>(turn + 1));
  const quantised_recipe how = random_recipe(random, turn);
  const index_t group = pick(random, 1, 2);
  quantised_recipe of_out = how;
  of_out.heads = how.heads * group;
  of_out.format.packed = chance(random, 60)   ? how.format.packed
                         : chance(random, 50) ? cache_axis::channels
                                              : cache_axis::tokens;
  const quantised_memory<Scale> source(random, how, turn % 3 == 0);
  const quantised_memory<Scale> out(random, of_out, turn % 2 == 0);
  const quantised_memory<Scale> expected(out);
  CAPTURE(turn, how.tokens, how.channels, how.tokens_per_group, how.channels_per_group, how.format.bits);
  kernel::conflict_recorder recorder;
  host_kernel_backend backend(static_cast<std::uint64_t>(turn), &recorder);
  const random_kept kept(random, how.batch, of_out.heads, how.tokens, how.tokens);
  REQUIRE(gather_tokens(kept.read(), source.view(), expected.view()).ok());
  const quantised_view<const Scale> read = source.view();
  REQUIRE(gather_tokens(backend, kept.set(), read, out.view()).ok());
  CHECK(out.same_bytes(expected));

  const random_kept own(random, how.batch, how.heads, how.tokens, how.tokens);
  const quantised_memory<Scale> moved(source);
  REQUIRE(compact_in_place(own.read(), moved.view()).ok());
  const quantised_memory<Scale> mine(source);
  REQUIRE(compact_in_place(backend, own.set(), mine.view()).ok());
  CHECK(mine.same_bytes(moved));
  CHECK(recorder.conflicts().empty());
}

template <class Running>
void check_running(const Running& reduction) {
  random_engine random(5);
  constexpr index_t kv_heads = 3;
  constexpr index_t group = 2;
  constexpr index_t capacity = 600;
  const auto heads = kv_heads * group;
  const guarded_tensor<double, 2> running(random, {heads, capacity}, {});
  const guarded_tensor<double, 2> expected_running(running);
  guarded_tensor<std::int32_t, 2> observers(random, {kv_heads, capacity}, {});
  for_each(observers.view(), [&](std::int32_t& n) { n = static_cast<std::int32_t>(pick(random, 0, 3)); });
  const guarded_tensor<std::int32_t, 2> expected_observers(observers);
  const guarded_tensor<float, 2> scores(random, {heads, capacity}, {});
  for_each(scores.view(), [&](float& x) { x = chance(random, 2) ? NAN : static_cast<float>(normal(random)); });
  for_each(running.view(), [&](double& x) { x = normal(random); });
  for (index_t h = 0; h < heads; ++h) {
    for (index_t n = 0; n < capacity; ++n) expected_running.view()(h, n) = running.view()(h, n);
  }
  const std::vector<position_t> lengths{600, 0, 257};
  detail::session_layer<float> layer;
  layer.key = {nullptr, {kv_heads, capacity, 1}};
  layer.running = expected_running.view();
  layer.observers = expected_observers.view();
  kernel::conflict_recorder recorder;
  kernel::host_executor executor(3, &recorder);
  for (const index_t unscored : {0, 1, 1}) {
    layer.fold(
        reduction, [&](index_t q, index_t n) { return static_cast<double>(scores.view()(q, n)); },
        [&](index_t h) { return std::max<index_t>(0, lengths[static_cast<std::size_t>(h)] - unscored); });
    kernel::fold_scores(executor, reduction, scores.read(),
                        tensor_view<const position_t, 1>(lengths.data(), {kv_heads}), unscored, running.view(),
                        observers.view());
    CHECK(running.same_bytes(expected_running));
    CHECK(observers.same_bytes(expected_observers));
  }
  CHECK(recorder.conflicts().empty());
}

}  // namespace

TEST_CASE("Kernels gather and compact quantised caches as the library does", "[kernel]") {
  for (index_t turn = 0; turn < 120; ++turn) {
    check_quantised<half>(turn);
    check_quantised<float>(turn);
  }
}

TEST_CASE("Kernels refuse quantised caches in the CPU's words", "[kernel]") {
  random_engine random(9);
  quantised_recipe how = random_recipe(random, 20);  // 2 bits, groups of 3 tokens
  how.batch = how.heads = 2;
  how.tokens = 24;
  how.channels = how.channels_per_group = 8;
  const quantised_memory<float> source(random, how, false);
  const quantised_memory<float> out(random, how, false);
  const quantised_memory<float> before(out);
  const random_kept kept(random, 2, 2, 24, 24);
  const random_kept wide(random, 2, 4, 24, 24);
  const random_kept three(random, 2, 3, 24, 24);
  host_kernel_backend backend(std::uint64_t{1});
  const auto same = [](const status& found, const status& wanted) {
    INFO("kernels: " << found.message());
    CHECK(!wanted.ok());
    CHECK(found.code() == wanted.code());
    CHECK(std::string(found.message()) == wanted.message());
  };
  const auto refused = [&](const random_kept& set, const quantised_view<float>& from, const quantised_view<float>& to) {
    same(gather_tokens(backend, set.set(), from, to), gather_tokens(set.read(), from, to));
  };
  const auto changed = [](quantised_view<float> view, const auto& change) {
    change(view);
    return view;
  };
  const auto bad_out = [&](const auto& change) { refused(kept, source.view(), changed(out.view(), change)); };
  const auto bad_source = [&](const auto& change) { refused(kept, changed(source.view(), change), out.view()); };
  using view = quantised_view<float>;
  REQUIRE(gather_tokens(kept.read(), source.view(), out.view()).ok());
  refused(three, source.view(), out.view());
  refused(wide, source.view(), out.view());
  refused(kept, source.view(), source.view());
  bad_source([](view& v) { v.format.bits = 3; });
  bad_source([](view& v) { v.channels = 9; });
  bad_source([](view& v) { v.codes.data = nullptr; });
  bad_source([](view& v) { v.tokens_per_group = 0; });
  bad_out([](view& v) { v.format.is_signed = !v.format.is_signed; });
  bad_out([](view& v) { v.tokens_per_group = 4; });
  bad_out([](view& v) { v.scale.data = nullptr; });
  bad_out([](view& v) { v.codes.strides[2] = 0; });
  bad_out([&](view& v) { v.scale = source.view().scale; });
  refused(kept, source.view(), changed(out.view(), [](view& v) {
            v.scale.extents[0] = v.codes.extents[0] = 1;
            if (v.zero.data != nullptr) v.zero.extents[0] = 1;
            if (v.offset.data != nullptr) v.offset.extents[0] = 1;
          }));
  same(compact_in_place(backend, wide.set(), out.view()), compact_in_place(wide.read(), out.view()));
  const view broken = changed(out.view(), [](view& v) { v.codes.strides[1] = 0; });
  same(compact_in_place(backend, kept.set(), broken), compact_in_place(kept.read(), broken));
  const random_kept large(random, 2, 2, 24, 25);
  check_error(gather_tokens(backend, large.set(), source.view(), out.view()), errc::shape_mismatch, {24, 25}, "out");
}

TEST_CASE("Kernels fold a query into running scores as a session does", "[kernel]") {
  check_running(running_sum{});
  check_running(running_mean{});
  check_running(running_ema{});
  check_running(running_maximum{});
  check_running(running_last{});
}
