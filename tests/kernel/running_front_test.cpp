// SPDX-License-Identifier: Apache-2.0
// A decode loop over a kernel backend's memory keeps, token by token, what a session on the CPU keeps.
#include "support/catch.hpp"
#include "support/check_error.hpp"
#include "support/device_like_backend.hpp"
#include "support/guarded_tensor.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/backend/kernel_running.hpp>
#include <restkv/budget/ada_kv.hpp>
#include <restkv/score/observed_attention.hpp>
#include <restkv/score/vatp.hpp>
#include <restkv/session/session.hpp>

#include <string>

using namespace restkv;
using namespace restkv_test;

namespace {

constexpr memory_space device = memory_space::device;
constexpr index_t channels = 4;

/// The engine's side of one layer: its cache, and the running scores beside it, each behind guards.
template <class Plan>
struct device_layer {
  device_like_backend backend;
  const Plan& plan;
  guarded_tensor<float, 4> key;
  guarded_tensor<float, 4> value;
  std::vector<std::byte> state;
  std::vector<std::byte> space;
  running_layer<device> layer;

  device_layer(random_engine& random, const Plan& made, std::uint64_t seed)
      : backend(seed),
        plan(made),
        key(random, {made.shape.batch, made.shape.kv_heads, made.shape.tokens, channels}, {}),
        value(random, {made.shape.batch, made.shape.kv_heads, made.shape.tokens, channels}, {}),
        state(made.state_bytes + 64, std::byte{0x5c}),
        space(made.workspace_bytes + 64, std::byte{0x5c}) {
    REQUIRE(begin_running(backend, plan, workspace(state.data(), plan.state_bytes), layer).ok());
  }
  ~device_layer() {
    for (const auto* memory : {&state, &space}) {
      CHECK(std::all_of(memory->end() - 64, memory->end(), [](std::byte b) { return b == std::byte{0x5c}; }));
    }
  }
  [[nodiscard]] workspace scratch() { return {space.data(), plan.workspace_bytes}; }

  /// The cache as it is. Lengths of heads that differ are copied back, as an engine would.
  [[nodiscard]] layer_view<float, device> view() {
    lengths_.assign(layer.lengths.data, layer.lengths.data + layer.lengths.size());
    layer_view<float, device> made;
    made.key = on_device(key.read().slice(2, 0, layer.longest));
    made.value = on_device(value.read().slice(2, 0, layer.longest));
    if (!layer.alike) {
      made.head_lengths = {lengths_.data(), layer.lengths.extents};
      made.pad = padding::right;
    }
    return made;
  }
  void evict() {
    running_choice<device> choice;
    REQUIRE(choose(backend, plan, layer, view(), scratch(), choice).ok());
    REQUIRE(compact_in_place(backend, choice.kept, on_device(key.view()), on_device(value.view())).ok());
    REQUIRE(keep(backend, plan, layer, choice).ok());
  }
  /// Stores a token [batch, heads, 1, channels] behind those of each head.
  void append(const tensor_view<const float, 4>& new_key, const tensor_view<const float, 4>& new_value) {
    for (index_t b = 0; b < plan.shape.batch; ++b) {
      for (index_t h = 0; h < plan.shape.kv_heads; ++h) {
        for (index_t c = 0; c < channels; ++c) {
          key.view()(b, h, layer.lengths(b, h), c) = new_key(b, h, 0, c);
          value.view()(b, h, layer.lengths(b, h), c) = new_value(b, h, 0, c);
        }
      }
    }
    REQUIRE(append_tokens(backend, plan, layer, 1).ok());
  }

 private:
  std::vector<std::int32_t> lengths_;
};

/// The same tokens into sessions and into a device layer, one after the other, with attention rows where the policy
/// says so and with queries elsewhere. Scores of queries differ in rounding, by `tolerance` of their size.
template <class Policy>
void compare(const Policy& policy, index_t kv_heads, index_t group, index_t tokens, unsigned seed, index_t batch = 1,
             double tolerance = 0) {
  random_engine random(seed);
  problem_shape shape{.query_heads = kv_heads * group, .kv_heads = kv_heads, .head_dim = channels};
  eigen_backend cpu(1);
  session_plan<Policy> wanted_plan;
  REQUIRE(make_session_plan<float>(cpu, policy, shape, wanted_plan).ok());
  std::vector<std::vector<std::byte>> memory(static_cast<std::size_t>(batch));
  std::vector<session<eigen_backend, Policy, float>> sessions(memory.size());
  for (std::size_t b = 0; b < sessions.size(); ++b) {
    memory[b].resize(wanted_plan.memory_bytes);
    REQUIRE(sessions[b].open(cpu, wanted_plan, memory[b]).ok());
  }
  running_plan<Policy> plan;
  shape.batch = batch;
  REQUIRE(make_running_plan(device_like_backend(std::uint64_t{1}), policy, shape, plan).ok());
  CHECK(plan.shape.tokens == wanted_plan.shape.tokens);
  device_layer<running_plan<Policy>> found(random, plan, seed);

  index_t differences = 0;
  const auto count = [&](bool same) { differences += same ? 0 : 1; };
  for (index_t t = 0; t < tokens; ++t) {
    CAPTURE(t);
    for (auto& wanted : sessions) REQUIRE(wanted.evict_if_due(0).ok());
    if (running_room(plan, found.layer) == 0) found.evict();
    CHECK(running_room(plan, found.layer) == sessions[0].room(0));
    const guarded_tensor<float, 4> key(random, {batch, kv_heads, 1, channels}, {});
    const guarded_tensor<float, 4> value(random, {batch, kv_heads, 1, channels}, {});
    const guarded_tensor<float, 4> query(random, {batch, shape.query_heads, 1, channels}, {});
    for (const auto* tensor : {&key, &value, &query}) {
      for_each(tensor->view(), [&](float& x) { x = static_cast<float>(normal(random)); });
    }
    // Few different numbers, so that scores tie.
    guarded_tensor<float, 4> attention(random, {batch, shape.query_heads, 1, plan.shape.tokens + 3}, {});
    for_each(attention.view(), [&](float& a) { a = static_cast<float>(pick(random, 0, 8)) / 8.0f; });
    found.append(key.read(), value.read());
    if (policy.attention_rows) {
      const auto& rows = attention.read();
      const tensor_view<const float, 3, device> scores(rows.data, {batch, shape.query_heads, rows.extent(3)},
                                                       {rows.stride(0), rows.stride(1), rows.stride(3)});
      REQUIRE(observe_scores(found.backend, plan, found.layer, scores).ok());
    } else {
      layer_view<float, device> view = found.view();
      view.query = on_device(query.read());
      REQUIRE(observe(found.backend, plan, found.layer, view, found.scratch()).ok());
    }
    for (index_t b = 0; b < batch; ++b) {
      auto& wanted = sessions[static_cast<std::size_t>(b)];
      REQUIRE((policy.attention_rows ? wanted.append_attention(0, attention.read()[b], key.read()[b], value.read()[b])
                                     : wanted.append(0, query.read()[b], key.read()[b], value.read()[b]))
                  .ok());
      const auto cache = wanted.cache(0);
      for (index_t h = 0; h < kv_heads; ++h) {
        const index_t length = wanted.length(0, h);
        REQUIRE(found.layer.lengths(b, h) == length);
        count(found.layer.alike ? length == found.layer.longest : length <= found.layer.longest);
        for (index_t n = 0; n < length; ++n) {
          count(found.layer.positions(b, h, n) == wanted.positions(0, h)[static_cast<std::size_t>(n)]);
          for (index_t c = 0; c < channels; ++c) {
            count(same_bits(found.key.view()(b, h, n, c), cache.key.chunk(0)(0, h, n, c)));
            count(same_bits(found.value.view()(b, h, n, c), cache.value.chunk(0)(0, h, n, c)));
          }
          const index_t seen_by = found.layer.observers(b, h, n);
          for (index_t q = h * group; q < (h + 1) * group; ++q) {
            const double kept = seen_by == 0 ? 0.0 : found.layer.running(b, q, n);
            const double score = plan.policy.running.score(kept, seen_by);
            const double expected = wanted.running_score_of(0, q, n);
            count(tolerance == 0 ? same_bits(score, expected)
                                 : std::abs(score - expected) <= tolerance * std::abs(expected));
          }
        }
      }
    }
  }
  CHECK(sessions[0].evictions(0) > 2);
  CHECK(differences == 0);
}

// One type, whatever is chosen of its parts: heads compete without a floor, and have the same budget with one of 1.
using running_policy = session_policy<eviction_policy<observed_attention, mean, no_pool, ada_kv>, any_running>;

running_policy policy_of(const any_running& running, index_t budget, index_t high_water, float floor = 1) {
  running_policy policy;
  policy.policy.budget = {.budget = budget, .floor = floor};
  policy.policy.group = group_reduce::mean;
  policy.policy.protect = {.sink = 2, .recent = 3};
  policy.policy.window = 1;
  policy.running = running;
  policy.high_water = high_water;
  policy.attention_rows = true;
  return policy;
}

}  // namespace

TEST_CASE("a decode loop over kernels evicts as a session with attention rows does") {
  compare(policy_of({running_sum{}}, 20, 28), 2, 2, 120, 1);
  compare(policy_of({running_ema{.decay = 0.7f}}, 12, 13), 3, 1, 90, 2);
  running_policy lazy = policy_of({running_mean{}}, 15, 40);
  lazy.refresh = 3;
  lazy.evict_every = 7;
  lazy.policy.group = group_reduce::l2;
  compare(lazy, 2, 3, 150, 3);
  // Heads that compete: the engine copies their lengths back.
  compare(policy_of({running_maximum{}}, 16, 24, 0), 3, 2, 120, 4);
  running_policy chunks = policy_of({running_ema{}}, 24, 48);
  chunks.policy.granularity.tokens = 4;
  compare(chunks, 2, 2, 150, 5);
  running_policy shared = policy_of({running_last{}}, 10, 14);
  shared.policy.granularity.shared = true;
  compare(shared, 2, 2, 60, 6);
  compare(policy_of({running_sum{}}, 16, 20), 2, 2, 60, 7, 3);
}

TEST_CASE("a decode loop over kernels asks its queries as a session does") {
  running_policy by_attention = policy_of({running_ema{}}, 16, 22);
  by_attention.attention_rows = false;
  compare(by_attention, 2, 2, 70, 11, 2, 1e-5);
}

TEST_CASE("a score that is not attention alone leaves the newest token unscored, as in a session") {
  session_policy<eviction_policy<vatp, mean, no_pool, uniform>, running_sum> policy;
  policy.policy.budget.budget = 14;
  policy.policy.protect = {.sink = 1, .recent = 4};
  policy.policy.window = 1;
  policy.high_water = 20;
  policy.refresh = 2;
  compare(policy, 2, 2, 60, 12, 1, 1e-4);
}

TEST_CASE("running scores on a kernel backend refuse what does not fit") {
  random_engine random(3);
  const running_policy policy = policy_of({running_ema{}}, 8, 12);
  const problem_shape shape{.query_heads = 4, .kv_heads = 2, .head_dim = channels};
  const device_like_backend planning(std::uint64_t{1});
  running_plan<running_policy> plan;
  // In a session's words.
  const auto refused = [&](const auto& change) {
    running_policy bad = policy;
    change(bad);
    session_plan<running_policy> of_session;
    const status wanted = make_session_plan<float>(eigen_backend(1), bad, shape, of_session);
    const status found = make_running_plan(planning, bad, shape, plan);
    INFO(found.message());
    CHECK(!wanted.ok());
    CHECK(found.code() == wanted.code());
    CHECK(std::string(found.message()) == wanted.message());
  };
  refused([](running_policy& bad) { bad.running.choice = running_ema{.decay = 1}; });
  refused([](running_policy& bad) { bad.high_water = 8; });
  refused([](running_policy& bad) { bad.refresh = 0; });
  refused([](running_policy& bad) { bad.refresh = 5; });
  refused([](running_policy& bad) { bad.policy.budget.budget = 2; });
  refused([](running_policy& bad) { bad.policy.group = group_reduce::none; });
  running_policy speculating = policy;
  speculating.speculation = 2;
  check_error(make_running_plan(planning, speculating, shape, plan), errc::unsupported, {2}, "speculation");

  REQUIRE(make_running_plan(planning, policy, shape, plan).ok());
  device_layer<running_plan<running_policy>> made(random, plan, 1);
  const running_layer<device> before = made.layer;
  std::vector<std::byte> small(plan.state_bytes / 2);
  running_layer<device> other;
  check_error(begin_running(made.backend, plan, workspace(small), other), errc::workspace_too_small,
              {static_cast<index_t>(plan.state_bytes)});
  check_error(begin_running(made.backend, plan, workspace(), other), errc::workspace_too_small,
              {static_cast<index_t>(plan.state_bytes)});
  CHECK(other.running.data == nullptr);
  check_error(append_tokens(made.backend, plan, other, 1), errc::shape_mismatch, {0, 1}, "running");
  check_error(append_tokens(made.backend, plan, made.layer, plan.shape.tokens + 1), errc::shape_mismatch,
              {plan.shape.tokens + 1, 0, plan.shape.tokens});
  check_error(append_tokens(made.backend, plan, made.layer, -1), errc::invalid_argument, {-1});
  CHECK(made.layer.longest == before.longest);
  REQUIRE(append_tokens(made.backend, plan, made.layer, 10).ok());

  std::vector<float> memory(4 * 16);
  const tensor_view<const float, 3, device> scores(memory.data(), {1, 4, 16});
  check_error(observe_scores(made.backend, plan, made.layer, scores.slice(2, 0, 9)), errc::shape_mismatch, {9, 10});
  check_error(observe_scores(made.backend, plan, made.layer, scores.slice(1, 0, 2)), errc::shape_mismatch, {2, 4});
  check_error(observe_scores(made.backend, plan, made.layer, {nullptr, {1, 4, 16}}), errc::missing_input, {64});
  check_error(observe_scores(made.backend, plan, made.layer,
                             {reinterpret_cast<const float*>(made.layer.running.data), {1, 4, 16}}),
              errc::aliasing, {}, "scores");

  running_choice<device> choice;
  const auto chosen = [&](const layer_view<float, device>& view, workspace space) {
    return choose(made.backend, plan, made.layer, view, space, choice);
  };
  layer_view<float, device> view = made.view();
  view.key = on_device(made.key.read().slice(2, 0, 9));
  check_error(chosen(view, made.scratch()), errc::shape_mismatch, {9, 10}, "view");
  check_error(chosen(made.view(), workspace(made.space.data(), 64)), errc::workspace_too_small, {64});
  view = made.view();
  const std::vector<std::int32_t> lengths{10, 10};
  view.lengths = {lengths.data(), {1}};
  check_error(chosen(view, made.scratch()), errc::unsupported, {1}, "head_lengths");
  view = made.view();
  view.head_lengths = {lengths.data(), {1, 2}};
  check_error(chosen(view, made.scratch()), errc::invalid_argument, {10}, "padding::right");
  check_error(observe(made.backend, plan, made.layer, made.view(), made.scratch()), errc::shape_mismatch, {0, 1},
              "query");
  made.layer.alike = false;
  check_error(chosen(
                  [&] {
                    layer_view<float, device> plain = made.view();
                    plain.head_lengths = {};
                    return plain;
                  }(),
                  made.scratch()),
              errc::missing_input, {10}, "head_lengths");
  made.layer.alike = true;
  CHECK(choice.kept.positions.data == nullptr);
  check_error(keep(made.backend, plan, made.layer, choice), errc::shape_mismatch, {0, 1}, "kept");
}
