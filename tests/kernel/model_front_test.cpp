// SPDX-License-Identifier: Apache-2.0
// Budgets across layers over a kernel backend's memory keep, layer by layer, what the selection on the CPU keeps.
#include "kernel/hashing_backend.hpp"
#include "model/random_model.hpp"
#include "support/catch.hpp"
#include "support/check_error.hpp"
#include "support/device_like_backend.hpp"

#include <restkv/backend/host/backend.hpp>
#include <restkv/model/bulk_model_selection.hpp>
#include <restkv/model/cake_budget.hpp>
#include <restkv/model/error_bounded.hpp>
#include <restkv/model/global_budget.hpp>
#include <restkv/model/lava_budget.hpp>

#include <algorithm>
#include <string>

using namespace restkv;
using namespace restkv_test;

namespace {

constexpr memory_space device = memory_space::device;

layer_view<float, device> on_device(const layer_view<float>& host) {
  layer_view<float, device> made;
  made.query = restkv_test::on_device(host.query);
  made.key = restkv_test::on_device(host.key.chunk(0));
  made.value = restkv_test::on_device(host.value.chunk(0));
  made.lengths = host.lengths;
  made.pad = host.pad;
  made.head_lengths = host.head_lengths;
  made.keep_mask = host.keep_mask;
  return made;
}

/// Memory with a guard behind it.
struct guarded_bytes {
  std::vector<std::byte> memory;
  std::size_t size;

  explicit guarded_bytes(std::size_t bytes) : memory(bytes + 64, std::byte{0x5c}), size(bytes) {}
  ~guarded_bytes() {
    CHECK(std::all_of(memory.end() - 64, memory.end(), [](std::byte b) { return b == std::byte{0x5c}; }));
  }
  [[nodiscard]] workspace space() { return {memory.data(), size}; }
};

/// Positions of `found` that `expected` has not, or in another order, and lengths that differ.
index_t differences(const kept_tokens& expected, const basic_kept_tokens<position_t, device>& found) {
  if (expected.batch() != found.batch() || expected.heads() != found.heads()) return 1;
  index_t count = 0;
  for (index_t b = 0; b < found.batch(); ++b) {
    for (index_t h = 0; h < found.heads(); ++h) {
      const index_t length = found.lengths(b, h);
      count += length != expected.lengths(b, h) ? 1 : 0;
      for (index_t i = 0; i < std::min<index_t>(length, expected.lengths(b, h)); ++i) {
        count += found.positions(b, h, i) != expected.positions(b, h, i) ? 1 : 0;
      }
    }
  }
  return count;
}

/// Adds every layer to both and compares all of them after each. Returns the tokens that were evicted in the end, -1
/// where both refused something, in the same words.
template <class HostBackend, class DeviceBackend, class Policy, class Budget>
index_t compare(HostBackend host, DeviceBackend on, const Policy& policy, const Budget& budget,
                const random_model& model) {
  const problem_shape shape = shape_of(model.view(0), 0, model.count());
  model_plan<Policy, Budget> wanted_plan, plan;
  const status refused = make_model_plan(host, policy, budget, shape, wanted_plan);
  const status also = make_model_plan(on, policy, budget, shape, plan);
  CHECK(std::string(also.message()) == refused.message());
  if (!refused.ok()) return -1;
  std::vector<std::byte> state(wanted_plan.state_bytes), space(wanted_plan.workspace_bytes);
  guarded_bytes device_state(plan.state_bytes), device_space(plan.workspace_bytes);
  model_selection wanted(host, wanted_plan, workspace(state));
  model_selection found(on, plan, device_state.space());
  for (int round = 0; round < 2; ++round) {  // the second in memory that the first has used
    REQUIRE(found.begin().ok());
    REQUIRE(wanted.begin().ok());
    for (index_t l = 0; l < model.count(); ++l) {
      const status outcome = wanted.add_layer(host, model.view(l), workspace(space));
      const status other = found.add_layer(on, on_device(model.view(l)), device_space.space());
      CHECK(std::string(other.message()) == outcome.message());
      CHECK(found.layers() == wanted.layers());
      if (!outcome.ok()) return -1;
      for (index_t k = 0; k <= l; ++k) {
        CAPTURE(l, k);
        basic_kept_tokens<position_t, device> kept;
        REQUIRE(found.kept(on, k, kept).ok());
        CHECK(differences(wanted.kept(k), kept) == 0);
        REQUIRE(found.cache_slots(on, k, kept).ok());
        CHECK(differences(wanted.cache_slots(k), kept) == 0);
      }
    }
  }
  index_t evicted = 0;
  for (index_t b = 0; b < shape.batch; ++b) {
    for (index_t l = 0; l < model.count(); ++l) {
      for (index_t h = 0; h < wanted_plan.layer.heads; ++h) {
        evicted += sequence(model.view(l), b, h * shape.kv_heads / wanted_plan.layer.heads).length;
      }
    }
    evicted -= wanted.total(b);
  }
  return evicted;
}

using attention_policy = eviction_policy<snap_kv, mean_variance, average_pool, uniform>;

/// Kind 4: the heads of every layer have lengths of their own; kind 5: every layer has.
random_model random_layers_of(random_engine& random, int kind) {
  random_model model = random_layers(random, kind % 4 == kind ? kind : 0);
  const index_t tokens = model.sizes.tokens;
  for (index_t l = 0; l < model.count() && kind == 4; ++l) {
    auto& lengths = model.head_lengths.emplace_back();
    for (index_t i = 0; i < model.sizes.batch * 2; ++i) {
      lengths.push_back(static_cast<std::int32_t>(pick(random, chance(random, 30) ? 0 : 8, tokens)));
    }
  }
  for (index_t l = 0; l < model.count() && kind == 5; ++l) {
    model.axes.push_back(l == 0 ? tokens : pick(random, chance(random, 30) ? 0 : 8, tokens));
  }
  return model;
}

template <class MakeBudget>
void check_many(unsigned seed, const MakeBudget& make_budget) {
  random_engine random(seed);
  index_t done = 0, evicted = 0;
  for (int trial = 0; trial < 120; ++trial) {
    const int kind = trial % 6;
    const random_model model = random_layers_of(random, kind);
    auto policy = random_policy<attention_policy>(random);
    if (kind == 3 || kind == 4) policy.granularity.shared = false;
    CAPTURE(trial, kind, policy.granularity.tokens, policy.granularity.shared);
    const int unusual = chance(random, 50) ? 0 : 10;
    const auto some = static_cast<std::uint64_t>(trial);
    const index_t gone = compare(hashing_backend<kernel::host_executor>(kernel::host_executor(some), unusual),
                                 hashing_backend<device_like_executor>(device_like_executor(some), unusual), policy,
                                 make_budget(random, model.sizes.tokens), model);
    done += gone >= 0 ? 1 : 0;
    evicted += std::max<index_t>(gone, 0);
  }
  CHECK(done > 60);
  CHECK(evicted > 1000);
}

}  // namespace

TEST_CASE("one competition of all layers, on a device") {
  check_many(1, [](random_engine& random, index_t tokens) {
    return global_budget{
        .budget = random_size(random, tokens), .least = pick(random, 0, 2), .normalise = chance(random, 50)};
  });
}

TEST_CASE("layers by the entropy of their scores, heads by competition, on a device") {
  check_many(2, [](random_engine& random, index_t tokens) {
    return lava_budget{.budget = random_size(random, tokens), .least = pick(random, 0, 2)};
  });
}

TEST_CASE("layers by their attention, on a device") {
  check_many(3, [](random_engine& random, index_t tokens) {
    return cake_budget{.budget = random_size(random, tokens),
                       .least = pick(random, 0, 2),
                       .entropy_temperature = chance(random, 50) ? 1.0f : 1.6f,
                       .variance_temperature = chance(random, 50) ? 1.0f : 0.4f};
  });
}

TEST_CASE("layers of keys and queries, long enough for several tiles") {
  random_engine random(4);
  const random_model model(random, 3, {.query_heads = 4, .kv_heads = 2, .head_dim = 6, .tokens = 1100, .queries = 8});
  attention_policy policy;
  policy.window = 8;
  policy.protect = {.sink = 2, .recent = 8};
  policy.group = group_reduce::mean;
  const auto evicts = [&](const auto& budget) {
    const auto evicted =
        compare(host_kernel_backend(std::uint64_t{7}), device_like_backend(std::uint64_t{7}), policy, budget, model);
    CHECK(evicted == 3 * 2 * (1100 - 200));
  };
  evicts(cake_budget{.budget = 200});
  evicts(lava_budget{.budget = 200, .least = 5});
  evicts(global_budget{.budget = 200, .normalise = true});
}

TEST_CASE("models without sequences, without tokens or with one, on a device") {
  random_engine random(6);
  attention_policy policy;
  policy.window = 4;
  policy.protect = {.sink = 0, .recent = 0};
  const auto evicts_nothing = [&](const layer_sizes& sizes) {
    const random_model model(random, 3, sizes);
    const auto compared = [&](const auto& budget) {
      return compare(hashing_backend<kernel::host_executor>(kernel::host_executor(1), 10),
                     hashing_backend<device_like_executor>(device_like_executor(1), 10), policy, budget, model);
    };
    CHECK(compared(cake_budget{.budget = 12}) == 0);
    CHECK(compared(lava_budget{.budget = 12, .least = 1}) == 0);
    CHECK(compared(global_budget{.budget = 12, .normalise = true}) == 0);
  };
  evicts_nothing({.batch = 0, .query_heads = 4, .kv_heads = 2, .head_dim = 4, .tokens = 30});
  evicts_nothing({.query_heads = 4, .kv_heads = 2, .head_dim = 4, .tokens = 0, .queries = 0});
  evicts_nothing({.query_heads = 4, .kv_heads = 2, .head_dim = 4, .tokens = 1, .queries = 1});
  evicts_nothing({.query_heads = 4, .kv_heads = 2, .head_dim = 4, .tokens = 12, .queries = 8});
}

TEST_CASE("a model on a device says what it cannot do, before anything is enqueued") {
  random_engine random(5);
  random_model model(random, 2, {.query_heads = 4, .kv_heads = 2, .head_dim = 6, .tokens = 50, .queries = 8});
  using backend = hashing_backend<device_like_executor>;
  backend on(device_like_executor(1), 0);
  attention_policy policy;
  policy.window = 8;
  model_plan<attention_policy, cake_budget> plan;
  REQUIRE(make_model_plan(on, policy, cake_budget{.budget = 48}, shape_of(model.view(0), 0, 2), plan).ok());
  std::vector<std::byte> state(plan.state_bytes), space(plan.workspace_bytes);
  basic_kept_tokens<position_t, device> kept;

  model_selection starved(on, plan, workspace(state.data(), 100));
  CHECK(starved.begin().code() == errc::workspace_too_small);
  CHECK(starved.add_layer(on, on_device(model.view(0)), workspace(space)).code() == errc::workspace_too_small);
  CHECK(starved.kept(on, 0, kept).code() == errc::workspace_too_small);

  model_selection selection(on, plan, workspace(state));
  check_error(selection.kept(on, 0, kept), errc::invalid_argument, {0}, "layer");
  // All but the last bytes of the workspace, which hold the budget's own sums.
  const std::vector<std::byte> untouched = state;
  const workspace short_by_a_line(space.data(), space.size() - 64 * 3);
  CHECK(selection.add_layer(on, on_device(model.view(0)), short_by_a_line).code() == errc::workspace_too_small);
  CHECK(state == untouched);
  REQUIRE(selection.add_layer(on, on_device(model.view(0)), workspace(space)).ok());
  check_error(selection.cache_slots(on, 1, kept), errc::invalid_argument, {1, 1}, "layer");
  check_error(selection.kept(on, -1, kept), errc::invalid_argument, {-1, 1}, "layer");
  model.mask.assign(50, 1);
  CHECK(selection.add_layer(on, on_device(model.view(1)), workspace(space)).code() == errc::invalid_argument);
  CHECK(selection.layers() == 1);
  model.mask.clear();
  REQUIRE(selection.add_layer(on, on_device(model.view(1)), workspace(space)).ok());
  check_error(selection.add_layer(on, on_device(model.view(1)), workspace(space)), errc::invalid_argument, {2, 2},
              "layer");

  error_bounded_selection bounded;
  const std::vector<layer_view<float, device>> layers{on_device(model.view(0))};
  check_error(bounded.run(on, policy, std::span(layers), error_bounded{}), errc::unsupported, {1}, "error_bounded");
}
