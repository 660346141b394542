// SPDX-License-Identifier: Apache-2.0
// What a session refuses, and sessions as bytes.
#include "session/session_support.hpp"
#include "support/check_error.hpp"

#include <cstring>
#include <limits>

using namespace restkv_test;
using restkv::errc;

namespace {

constexpr restkv::problem_shape shape{.query_heads = 4, .kv_heads = 2, .head_dim = channels, .layers = 2};

running_policy sums() {
  auto policy = make_policy<running_policy>(7, 0.0f, {.sink = 1, .recent = 2}, 10);
  policy.speculation = 2;
  return policy;
}

window_policy windows() {
  auto policy = make_policy<window_policy>(7, 1.0f, {.sink = 1, .recent = 2}, 10);
  policy.policy.window = 3;
  policy.speculation = 2;
  return policy;
}

template <class Policy>
status plan_error(const Policy& policy, const restkv::problem_shape& of = shape) {
  restkv::session_plan<Policy> plan;
  plan.memory_bytes = 77;
  const status outcome = restkv::make_session_plan<float>(reference_backend(), policy, of, plan);
  CHECK(plan.memory_bytes == 77);
  return outcome;
}

template <class Policy, class Change>
status plan_error_with(Policy policy, const Change& change) {
  change(policy);
  return plan_error(policy);
}

template <class Session>
status append_all(Session& session, index_t layer, const token_stream& tokens) {
  return session.append(layer, tokens.queries(), tokens.keys(), tokens.values());
}

/// Both layers hold something after evictions.
template <class Policy>
void fill(owned_session<Policy>& owner, unsigned seed, index_t tokens = 25) {
  random_engine random(seed);
  for (index_t l = 0; l < 2; ++l) {
    REQUIRE(append_all(owner.session, l, token_stream(random, 4, 2, tokens + l)).ok());
  }
}

std::uint64_t checksum_of(const std::vector<std::byte>& bytes, std::size_t count) {
  std::uint64_t hash = 14695981039346656037ull;
  for (std::size_t i = 0; i < count; ++i) {
    hash ^= static_cast<std::uint64_t>(bytes[i]);
    hash *= 1099511628211ull;
  }
  return hash;
}

void sign(std::vector<std::byte>& bytes) {
  const std::uint64_t hash = checksum_of(bytes, bytes.size() - 8);
  for (std::size_t i = 0; i < 8; ++i) bytes[bytes.size() - 8 + i] = static_cast<std::byte>(hash >> (8 * i) & 0xff);
}

}  // namespace

TEST_CASE("plans that cannot be") {
  CHECK(restkv::make_session_plan<float>(reference_backend(), sums(), shape).memory_bytes > 0);
  check_error(plan_error_with(sums(), [](auto& p) { p.high_water = 7; }), errc::invalid_argument, {7, 7}, "mark");
  check_error(plan_error_with(sums(), [](auto& p) { p.high_water = 0; }), errc::invalid_argument, {0}, "high_water");
  check_error(plan_error_with(sums(), [](auto& p) { p.evict_every = -1; }), errc::invalid_argument, {-1},
              "evict_every");
  check_error(plan_error_with(sums(), [](auto& p) { p.refresh = 0; }), errc::invalid_argument, {0}, "refresh");
  check_error(plan_error_with(sums(), [](auto& p) { p.refresh = 4; }), errc::invalid_argument, {2, 3}, "recent");
  check_error(plan_error_with(sums(), [](auto& p) { p.speculation = 5000; }), errc::invalid_argument, {5000},
              "speculation");
  check_error(plan_error_with(sums(), [](auto& p) { p.policy.group = restkv::group_reduce::none; }), errc::unsupported,
              {}, "group");
  check_error(plan_error_with(sums(), [](auto& p) { p.running.choice = restkv::running_ema{.decay = 1.0f}; }),
              errc::invalid_argument, {1}, "decay");
  check_error(plan_error_with(sums(), [](auto& p) { p.policy.protect.recent = 7; }), errc::invalid_argument, {7, 8},
              "protected");
  check_error(plan_error_with(sums(), [](auto& p) { p.policy.budget.budget = restkv::budget_size::keep_ratio(0.9); }),
              errc::invalid_argument, {10}, "mark");
  check_error(plan_error_with(windows(), [](auto& p) { p.policy.window = 2000; }), errc::invalid_argument, {2000},
              "window");
  check_error(plan_error_with(windows(), [](auto& p) { p.refresh = 2; }), errc::invalid_argument, {2}, "refresh");
  check_error(plan_error_with(windows(), [](auto& p) { p.attention_rows = true; }), errc::unsupported, {}, "running");
  auto batched = shape;
  batched.batch = 2;
  check_error(plan_error(sums(), batched), errc::invalid_argument, {1, 2}, "sequence");
  auto heads = shape;
  heads.kv_heads = 3;
  check_error(plan_error(sums(), heads), errc::shape_mismatch, {4, 3});
  auto layers = shape;
  layers.layers = 0;
  check_error(plan_error(sums(), layers), errc::invalid_argument, {0}, "layers");
  auto huge = shape;
  huge.layers = 65536;
  huge.query_heads = huge.kv_heads = 65536;
  huge.head_dim = 4096;
  auto large = sums();
  large.high_water = 500000000;
  CHECK(!plan_error(large, huge).ok());
}

TEST_CASE("calls that cannot be change nothing") {
  reference_backend backend;
  const auto plan = plan_for(windows(), shape);
  owned_session<window_policy> owner(backend, plan);
  auto& session = owner.session;
  fill(owner, 1);
  const auto before = owner.bytes();
  const auto unchanged = [&](const status& outcome, errc code, const std::vector<index_t>& numbers,
                             const std::string& word) {
    check_error(outcome, code, numbers, word);
    CHECK(owner.bytes() == before);
  };
  random_engine random(2);
  const token_stream tokens(random, 4, 2, 3);
  const token_stream fewer(random, 3, 1, 2);
  const auto q = tokens.queries();
  const auto k = tokens.keys();
  const auto v = tokens.values();
  unchanged(session.append(2, q, k, v), errc::invalid_argument, {2, 2}, "layer");
  unchanged(session.append(-1, q, k, v), errc::invalid_argument, {-1, 2}, "layer");
  unchanged(session.append(0, q, fewer.keys(), v), errc::shape_mismatch, {1, 2, 2}, "key");
  unchanged(session.append(0, q, k, v.slice(1, 0, 2)), errc::shape_mismatch, {2, 3}, "value");
  unchanged(session.append(0, q.slice(0, 0, 3), k, v), errc::shape_mismatch, {3, 4}, "query");
  unchanged(session.append(0, q, k.slice(2, 0, 3), v), errc::shape_mismatch, {3, 4}, "key");
  unchanged(session.append(0, {nullptr, {4, 3, channels}}, k, v), errc::missing_input, {48}, "query");
  unchanged(session.append(0, q, {nullptr, {2, 3, channels}}, v), errc::missing_input, {24}, "key");
  unchanged(session.append(0, q, session.cache(1).key.chunk(0)[0].slice(1, 0, 3), v), errc::aliasing, {}, "key");
  unchanged(session.append_attention(0, q, k, v), errc::invalid_argument, {}, "attention_rows");
  unchanged(session.evict(2), errc::invalid_argument, {2}, "layer");
  unchanged(session.evict_if_due(5), errc::invalid_argument, {5}, "layer");
  unchanged(session.commit(0), errc::invalid_argument, {}, "begin_speculation");
  unchanged(session.rollback(), errc::invalid_argument, {}, "begin_speculation");
  unchanged(session.append(0, q.slice(1, 0, 0), k.slice(1, 0, 0), v.slice(1, 0, 0)), errc::ok, {}, "");

  REQUIRE(session.begin_speculation().ok());
  check_error(session.append(0, q, k, v), errc::invalid_argument, {3, 0, 2}, "speculation");
  check_error(session.evict(0), errc::invalid_argument, {}, "speculation");
  owned_session<window_policy> other(backend, plan);
  check_error(session.fork_to(other.session), errc::invalid_argument, {}, "speculation");
  std::size_t written = 5;
  std::vector<std::byte> room(before.size());
  check_error(restkv::serialise(session, room, written), errc::invalid_argument, {}, "speculation");
  CHECK(written == 5);
  check_error(session.commit(-1), errc::invalid_argument, {-1}, "accepted");
  REQUIRE(append_all(session, 0, token_stream(random, 4, 2, 2)).ok());
  check_error(session.commit(1), errc::invalid_argument, {1, 0}, "layer 1");  // the other layer has none
  REQUIRE(session.rollback().ok());
  CHECK(owner.bytes() == before);

  check_error(restkv::serialise(session, std::span(room).first(before.size() - 1), written), errc::workspace_too_small,
              {static_cast<index_t>(before.size()), static_cast<index_t>(before.size()) - 1});

  auto longer = windows();
  longer.high_water = 11;
  owned_session<window_policy> different(backend, plan_for(longer, shape));
  check_error(session.fork_to(different.session), errc::shape_mismatch, {13, 14});
  check_error(restkv::restore(different.session, before), errc::shape_mismatch, {13, 14}, "tokens per head");
  CHECK(session.fork_to(session).ok());
  CHECK(owner.bytes() == before);
}

TEST_CASE("a session that is not open") {
  reference_backend backend;
  const auto plan = plan_for(sums(), shape);
  owned_session<running_policy>::session_type closed;
  const token_stream tokens = [] {
    random_engine random(3);
    return token_stream(random, 4, 2, 1);
  }();
  check_error(append_all(closed, 0, tokens), errc::invalid_argument, {}, "not open");
  check_error(closed.evict(0), errc::invalid_argument, {}, "not open");
  check_error(closed.begin_speculation(), errc::invalid_argument, {}, "not open");
  check_error(closed.rollback(), errc::invalid_argument, {}, "not open");
  check_error(closed.commit(0), errc::invalid_argument, {}, "not open");
  check_error(closed.fork_to(closed), errc::invalid_argument, {}, "not open");
  check_error(restkv::restore(closed, {}), errc::invalid_argument, {}, "not open");
  CHECK(closed.layers() == 0);
  closed.clear();
  std::vector<std::byte> memory(plan.memory_bytes);
  check_error(closed.open(backend, plan, std::span(memory).first(memory.size() - 1)), errc::workspace_too_small,
              {static_cast<index_t>(memory.size()), static_cast<index_t>(memory.size()) - 1});
  check_error(closed.open(backend, plan, {}), errc::workspace_too_small, {0});
  CHECK(closed.layers() == 0);
  auto doubles = plan;
  doubles.element_bytes = 8;
  check_error(closed.open(backend, doubles, memory), errc::shape_mismatch, {8, 4});
  // Memory that begins anywhere.
  std::vector<std::byte> shifted(plan.memory_bytes + 3);
  REQUIRE(closed.open(backend, plan, std::span(shifted).subspan(3)).ok());
  CHECK(append_all(closed, 1, tokens).ok());
  auto moved = std::move(closed);
  CHECK(moved.tokens_seen(1) == 1);
  CHECK(!append_all(closed, 1, tokens).ok());  // NOLINT(bugprone-use-after-move)
}

TEST_CASE("bytes bring a session back, which then goes on alike") {
  reference_backend backend;
  const auto check = [&](const auto& policy) {
    using policy_t = std::remove_cvref_t<decltype(policy)>;
    const auto plan = plan_for(policy, shape);
    owned_session<policy_t> first(backend, plan);
    fill(first, 4);
    const auto bytes = first.bytes();
    owned_session<policy_t> second(backend, plan);
    fill(second, 5, 40);
    REQUIRE(second.session.begin_speculation().ok());
    REQUIRE(restkv::restore(second.session, bytes).ok());
    CHECK(!second.session.speculating());
    CHECK(second.bytes() == bytes);
    owned_session<policy_t> forked(backend, plan);
    fill(forked, 6, 3);
    REQUIRE(first.session.fork_to(forked.session).ok());
    fill(first, 7);
    fill(second, 7);
    CHECK(forked.bytes() == bytes);
    fill(forked, 7);
    CHECK(first.bytes() != bytes);
    CHECK(second.bytes() == first.bytes());
    CHECK(forked.bytes() == first.bytes());
    CHECK(first.session.evictions(0) == second.session.evictions(0));
    // An empty one.
    first.session.clear();
    const auto empty = first.bytes();
    CHECK(restkv::restore(second.session, empty).ok());
    CHECK(second.session.tokens_seen(1) == 0);
    CHECK(second.bytes() == empty);
  };
  check(sums());
  check(windows());
}

TEST_CASE("numbers that are not finite come back bit for bit") {
  reference_backend backend;
  owned_session<window_policy> owner(backend, plan_for(windows(), shape));
  random_engine random(8);
  token_stream tokens(random, 4, 2, 9);
  tokens.key[3] = std::numeric_limits<float>::quiet_NaN();
  tokens.value[5] = -std::numeric_limits<float>::infinity();
  tokens.query[tokens.query.size() - 1] = -std::numeric_limits<float>::quiet_NaN();
  tokens.value[6] = -0.0f;
  REQUIRE(append_all(owner.session, 0, tokens).ok());
  REQUIRE(append_all(owner.session, 0, tokens).ok());
  const auto bytes = owner.bytes();
  owned_session<window_policy> other(backend, plan_for(windows(), shape));
  REQUIRE(restkv::restore(other.session, bytes).ok());
  CHECK(other.bytes() == bytes);
}

TEST_CASE("the layout of the bytes") {
  reference_backend backend;
  owned_session<running_policy> owner(backend, plan_for(sums(), shape));
  random_engine random(9);
  REQUIRE(append_all(owner.session, 0, token_stream(random, 4, 2, 1)).ok());
  const auto bytes = owner.bytes();
  // Header, then layer 0: counts, lengths, a token of each KV head, running scores of 4 query heads; layer 1 is empty.
  const std::size_t head = 4 + 2 * channels * 4 + 4;
  REQUIRE(bytes.size() == 72 + (24 + 8 + 2 * head + 4 * 8) + (24 + 8) + 8);
  CHECK(std::memcmp(bytes.data(), "restkv-s\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0\4\0\0\0", 28) == 0);
  CHECK(bytes[72] == std::byte{1});                // tokens seen
  CHECK(bytes[72 + 24] == std::byte{1});           // length of head 0
  CHECK(bytes[72 + 32 + head - 4] == std::byte{1});  // the query that saw its token
  const std::size_t running = 72 + 32 + 2 * head;
  double share = 0;
  std::uint64_t bits = 0;
  for (std::size_t i = 0; i < 8; ++i) bits |= static_cast<std::uint64_t>(bytes[running + i]) << (8 * i);
  std::memcpy(&share, &bits, 8);
  CHECK(share == 1.0);  // all attention is its own
  std::uint64_t stored = 0;
  for (std::size_t i = 0; i < 8; ++i) stored |= static_cast<std::uint64_t>(bytes[bytes.size() - 8 + i]) << (8 * i);
  CHECK(stored == checksum_of(bytes, bytes.size() - 8));
}

TEST_CASE("damaged bytes are refused, and the session stays as it is") {
  reference_backend backend;
  owned_session<running_policy> source(backend, plan_for(sums(), shape));
  fill(source, 10);
  const auto bytes = source.bytes();
  owned_session<running_policy> target(backend, plan_for(sums(), shape));
  fill(target, 11, 5);
  const auto before = target.bytes();
  index_t refused = 0;
  for (std::size_t i = 0; i < bytes.size(); ++i) {  // one bit
    auto damaged = bytes;
    damaged[i] ^= static_cast<std::byte>(1u << (i % 8));
    refused += restkv::restore(target.session, damaged).ok() ? 0 : 1;
  }
  CHECK(refused == static_cast<index_t>(bytes.size()));
  for (std::size_t n = 0; n < bytes.size(); ++n) {  // cut, in memory of just that size
    const std::vector<std::byte> cut(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(n));
    refused += restkv::restore(target.session, cut).ok() ? 0 : 1;
  }
  CHECK(refused == 2 * static_cast<index_t>(bytes.size()));
  CHECK(target.bytes() == before);

  auto longer = bytes;
  longer.push_back(std::byte{});
  check_error(restkv::restore(target.session, longer), errc::invalid_argument,
              {static_cast<index_t>(bytes.size()), static_cast<index_t>(bytes.size()) + 1});
  check_error(restkv::restore(target.session, {}), errc::invalid_argument, {0, 80}, "cut");

  // Forged with a right checksum: every number is checked all the same.
  random_engine random(12);
  index_t outcomes[2] = {0, 0};
  for (int trial = 0; trial < 3000; ++trial) {
    auto forged = bytes;
    for (index_t n = pick(random, 1, 3); n > 0; --n) {
      const index_t last = static_cast<index_t>(bytes.size()) - 9;
      const auto at = static_cast<std::size_t>(pick(random, 0, chance(random, 50) ? 120 : pick(random, 1, last)));
      forged[at] = static_cast<std::byte>(chance(random, 30) ? 0xff : pick(random, 0, 255));
    }
    if (chance(random, 20)) {
      forged.resize(static_cast<std::size_t>(pick(random, 8, static_cast<index_t>(forged.size()))));
    }
    sign(forged);
    const bool accepted = restkv::restore(target.session, forged).ok();
    ++outcomes[accepted ? 1 : 0];
    if (accepted) {  // then it is a session like any other
      fill(target, 13, 9);
    }
  }
  CHECK(outcomes[0] > 500);
  CHECK(outcomes[1] > 100);

  auto version = bytes;
  version[8] = std::byte{2};
  sign(version);
  check_error(restkv::restore(target.session, version), errc::unsupported, {2, 1}, "version");
  auto kind = bytes;
  kind[0] = std::byte{'R'};
  sign(kind);
  check_error(restkv::restore(target.session, kind), errc::invalid_argument, {}, "begin");
  auto elements = bytes;
  elements[12] = std::byte{3};
  sign(elements);
  check_error(restkv::restore(target.session, elements), errc::shape_mismatch, {3, 0}, "elements");
  auto layers = bytes;
  layers[16] = std::byte{9};
  sign(layers);
  check_error(restkv::restore(target.session, layers), errc::shape_mismatch, {9, 2}, "layers");
  // Layer 0 begins behind 72 bytes; its positions behind 3 counts and 2 lengths.
  const auto forge = [&](std::size_t at, std::int32_t number) {
    auto forged = bytes;
    const auto bits = static_cast<std::uint32_t>(number);
    for (std::size_t i = 0; i < 4; ++i) forged[at + i] = static_cast<std::byte>(bits >> (8 * i) & 0xff);
    sign(forged);
    return restkv::restore(target.session, forged);
  };
  constexpr std::size_t positions = 72 + 24 + 8;
  const auto length = static_cast<std::size_t>(source.session.length(0, 0));
  const index_t second = source.session.positions(0, 0)[1];
  CHECK(forge(positions, 0).ok());  // as it was: a sink
  check_error(forge(positions + 8, static_cast<std::int32_t>(second)), errc::invalid_argument, {second, 2}, "position");
  check_error(forge(positions + 4 * (length - 1), 25), errc::invalid_argument, {25}, "position");
  check_error(forge(positions, -1), errc::invalid_argument, {-1}, "position");
  const std::size_t observers = positions + length * (4 + 2 * channels * 4);
  CHECK(forge(observers, 25).ok());
  check_error(forge(observers, 26), errc::invalid_argument, {26, 25}, "seen");
  check_error(forge(observers, -1), errc::invalid_argument, {-1, 25}, "seen");
  check_error(forge(72 + 24, -1), errc::invalid_argument, {-1}, "head 0");
  check_error(forge(72, -1), errc::invalid_argument, {}, "seen");

  auto higher = sums();
  higher.policy.budget = {.budget = 8, .floor = 1.0f};  // as many slots for a head, and a mark above
  higher.high_water = 14;
  owned_session<running_policy> fuller(backend, plan_for(higher, shape));
  REQUIRE(fuller.session.plan_of().shape.tokens == target.session.plan_of().shape.tokens);
  REQUIRE(append_all(fuller.session, 0, token_stream(random, 4, 2, 12)).ok());
  check_error(restkv::restore(target.session, fuller.bytes()), errc::invalid_argument, {24, 20}, "mark");

  auto sum = bytes;
  sum.back() ^= std::byte{1};
  check_error(restkv::restore(target.session, sum), errc::invalid_argument, {}, "checksum");
}

TEST_CASE("attention rows must fit the cache as it is") {
  auto policy = sums();
  policy.attention_rows = true;
  reference_backend backend;
  owned_session<running_policy> owner(backend, plan_for(policy, shape));
  auto& session = owner.session;
  random_engine random(14);
  const token_stream tokens(random, 4, 2, 11);
  std::vector<restkv::half> shares(static_cast<std::size_t>(4 * 11 * 11), restkv::half(0.125f));
  const tensor_view<const restkv::half, 3> rows(shares.data(), {4, 11, 11});
  const auto k = tokens.keys();
  const auto v = tokens.values();
  check_error(session.append(0, tokens.queries(), k, v), errc::invalid_argument, {}, "append_attention");
  check_error(session.append_attention(0, rows, k, v), errc::invalid_argument, {11, 10}, "eviction");
  const auto part = [](const auto& tensor, index_t n) { return tensor.slice(1, 0, n); };
  check_error(session.append_attention(0, part(rows, 9), part(k, 10), part(v, 10)), errc::shape_mismatch, {9, 10});
  const auto narrow = part(rows, 10).slice(2, 0, 9);
  check_error(session.append_attention(0, narrow, part(k, 10), part(v, 10)), errc::shape_mismatch, {9, 10});
  CHECK(session.tokens_seen(0) == 0);
  REQUIRE(session.append_attention(0, part(rows, 10), part(k, 10), part(v, 10)).ok());
  CHECK(session.room(0) == 0);
  CHECK(session.running_score_of(0, 3, 2) == 8 * 0.125);  // seen by the queries 2 .. 9
  CHECK(session.running_score_of(0, 0, 9) == 0.125);
  check_error(session.append_attention(0, part(rows, 1), part(k, 1), part(v, 1)), errc::invalid_argument, {1, 0});
  REQUIRE(session.evict_if_due(0).ok());
  CHECK(session.length(0, 0) + session.length(0, 1) == 14);
  CHECK(session.append_attention(0, part(rows, 1), part(k, 1), part(v, 1)).ok());
}
