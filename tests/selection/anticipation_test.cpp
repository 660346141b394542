// SPDX-License-Identifier: Apache-2.0
#include "support/check_error.hpp"
#include "support/random_layer.hpp"

#include <restkv/selection/set_error/anticipation.hpp>

#include <cmath>
#include <limits>
#include <vector>

using namespace restkv_test;
using restkv::anticipated_layer;
using restkv::anticipation;
using restkv::errc;
using restkv::layer_view;
using restkv::query_block;
using restkv::widen;
using restkv::workspace;

namespace {

/// An anticipated layer with its memory.
template <class T>
struct owned_anticipation {
  owned_anticipation(const anticipation& options, const layer_view<T>& layer)
      : memory(restkv::anticipation_workspace_bytes(options, layer)) {
    const auto outcome = restkv::anticipate(options, layer, workspace(memory.data(), memory.size()), made);
    INFO(outcome.message());
    REQUIRE(outcome.ok());
  }

  std::vector<std::byte> memory;
  anticipated_layer<T> made;
};

/// q . k of a row of queries and a token, in double.
template <class T>
double logit(const layer_view<T>& layer, index_t b, index_t query_head, index_t row, index_t token) {
  const index_t kv_head = query_head / (layer.query.extent(1) / layer.key.extent(1));
  const auto key = layer.key.from_token(token);
  double sum = 0;
  for (index_t c = 0; c < layer.key.extent(3); ++c) {
    sum += widen<double>(layer.query(b, query_head, row, c)) * widen<double>(key(b, kv_head, 0, c));
  }
  return sum;
}

/// The logit of the query of `age` against a token, turned apart by `shift` more positions, pair by pair.
double turned_logit(const layer_view<float>& layer, index_t query_head, index_t age, index_t token, double shift,
                    const std::vector<double>& frequencies, bool interleaved) {
  const index_t kv_head = query_head / (layer.query.extent(1) / layer.key.extent(1));
  const index_t row = layer.query.extent(2) - 1 - age;
  const auto key = layer.key.from_token(token);
  const auto pairs = static_cast<index_t>(frequencies.size());
  double sum = 0;
  for (index_t i = 0; i < pairs; ++i) {
    const index_t x = interleaved ? 2 * i : i;
    const index_t y = interleaved ? 2 * i + 1 : i + pairs;
    const double q0 = layer.query(0, query_head, row, x), q1 = layer.query(0, query_head, row, y);
    const double k0 = key(0, kv_head, 0, x), k1 = key(0, kv_head, 0, y);
    const double angle = shift * frequencies[static_cast<std::size_t>(i)];
    // Re(q conj(k) e^(i angle)) with pairs as complex numbers.
    sum += (q0 * k0 + q1 * k1) * std::cos(angle) - (q1 * k0 - q0 * k1) * std::sin(angle);
  }
  for (index_t c = 2 * pairs; c < layer.key.extent(3); ++c) {
    sum += static_cast<double>(layer.query(0, query_head, row, c)) * static_cast<double>(key(0, kv_head, 0, c));
  }
  return sum;
}

}  // namespace

TEST_CASE("anticipate: rows of queries and copies of tokens stand where they should", "[anticipation]") {
  random_engine random(1);
  const std::vector<query_block> blocks{
      {0, 4, 0.5f, 2.0f}, {3, 20, 1.0f, 1.0f}, {8, 8, 0.25f, 3.0f}, {0, 8, 1.0f, 1.0f}};
  for (int trial = 0; trial < 8; ++trial) {
    const bool interleaved = chance(random, 50);
    const random_layer<float> owner(random, {.head_dim = 10,
                                             .tokens = 30,
                                             .query_rows = 16,
                                             .strided = chance(random, 50),
                                             .chunks = pick(random, 1, 3)});
    const auto& layer = owner.view();
    const std::vector<double> frequencies{1.0, 0.3, 0.02, 0.001};
    const owned_anticipation<float> coming(
        {.horizon = 8,
         .blocks = blocks,
         .frequencies = frequencies,
         .pairing = interleaved ? restkv::rotary_pairs::interleaved : restkv::rotary_pairs::half_split},
        layer);
    const auto& made = coming.made.layer;
    CHECK(restkv::check_layer(made, restkv::shape_of(made), 24, true, true, false).ok());
    REQUIRE(made.query.extent(2) == 24);  // the second block needs 23 queries, there are 16
    REQUIRE(made.key.extent(2) == 38);
    const index_t ages[] = {0, 8, 0};
    const index_t counts[] = {4, 8, 8};
    for (index_t row = 0; row < 24; ++row) {
      const index_t i = row % 8;
      const index_t age = ages[row / 8] + (7 - i) % counts[row / 8];
      CHECK(coming.made.weights[static_cast<std::size_t>(row)] == (row < 8 ? 0.5f : row < 16 ? 0.25f : 1.0f));
      CHECK(coming.made.noise_weights[static_cast<std::size_t>(row)] == (row < 8 ? 2.0f : row < 16 ? 3.0f : 1.0f));
      const auto expected_logit = [&](index_t token, index_t shift) {
        return turned_logit(layer, 3, age, token, static_cast<double>(shift), frequencies, interleaved);
      };
      for (const index_t token : {index_t{0}, index_t{13}, index_t{29}}) {
        const double expected = expected_logit(token, age + 1 + i);
        CHECK(logit(made, 0, 3, row, token) == Approx(expected).margin(1e-4));
      }
      // The copy of a token is as far from the row as the token was from a query `8` positions before the row.
      for (index_t j = 0; j < 8; ++j) {
        const double expected = expected_logit(22 + j, age + 1 + i - 8);
        CHECK(logit(made, 0, 3, row, 30 + j) == Approx(expected).margin(1e-4));
      }
    }
    for (index_t j = 0; j < 8; ++j) {
      for (index_t c = 0; c < 10; ++c) {
        CHECK(made.value.from_token(30 + j)(0, 1, 0, c) == layer.value.from_token(22 + j)(0, 1, 0, c));
      }
    }
  }
}

TEST_CASE("anticipate: sequences of any length end with what is to come", "[anticipation]") {
  random_engine random(2);
  for (int trial = 0; trial < 10; ++trial) {
    random_layer<restkv::half> owner(
        random, {.batch = 3, .tokens = pick(random, 8, 20), .query_rows = 8, .padded = true});
    const auto& layer = owner.view();
    const std::vector<query_block> one{{0, 8}};
    const owned_anticipation<restkv::half> coming({.horizon = 12, .blocks = one}, layer);
    const auto& made = coming.made.layer;
    for (index_t b = 0; b < 3; ++b) {
      const auto was = restkv::sequence(layer, b, 0);
      const auto is = restkv::sequence(made, b, 0);
      CHECK(is.begin == was.begin);
      CHECK(is.length == was.length + 12);
      for (index_t j = 0; j < 12; ++j) {
        const auto copy = made.key.from_token(layer.key.extent(2) + j);
        const index_t from = std::max(was.begin, layer.key.extent(2) + j - 12);
        for (index_t c = 0; c < 8; ++c) {
          const float expected = was.length == 0 ? 0.0f : widen<float>(layer.key.from_token(from)(b, 1, 0, c));
          CHECK(widen<float>(copy(b, 1, 0, c)) == expected);
        }
      }
    }
  }
  restkv::position_t positions[] = {0, 3, 7, 8, 9, 0, 1, 2, 3, 4};
  restkv::position_t lengths[] = {5, 5};
  restkv::kept_tokens kept({positions, {1, 2, 5}}, {lengths, {1, 2}});
  restkv::drop_anticipated(kept, 8);
  CHECK(lengths[0] == 3);
  CHECK(lengths[1] == 5);
  restkv::drop_anticipated(kept, 0);
  CHECK(kept.total() == 0);
}

TEST_CASE("anticipate: what does not fit is named", "[anticipation]") {
  random_engine random(3);
  random_layer<float> owner(random, {.tokens = 40, .query_rows = 10});
  auto layer = owner.view();
  std::vector<std::byte> memory(1 << 16);
  anticipated_layer<float> made;
  const auto run = [&](const anticipation& options, std::size_t bytes = 1 << 16) {
    return restkv::anticipate(options, layer, workspace(memory.data(), bytes), made);
  };
  const std::vector<query_block> one{{0, 10}};
  const std::vector<query_block> negative{{-2, 10}};
  const std::vector<double> many(5, 1.0);
  const std::vector<double> endless{std::numeric_limits<double>::infinity()};
  check_error(run({}), errc::shape_mismatch, {10, 32});
  check_error(run({.horizon = 0, .blocks = one}), errc::invalid_argument, {0});
  check_error(run({.blocks = {}}), errc::invalid_argument, {0});
  check_error(run({.blocks = negative}), errc::invalid_argument, {-2});
  check_error(run({.blocks = one, .frequencies = many}), errc::shape_mismatch, {5, 8});
  check_error(run({.blocks = one, .frequencies = endless}), errc::invalid_argument, {});
  check_error(run({.blocks = one}, 100), errc::workspace_too_small, {100});
  CHECK(made.layer.key.missing());
  const std::int32_t lengths[] = {20};
  layer.lengths = {lengths, {1}};
  layer.pad = restkv::padding::right;
  check_error(run({.blocks = one}), errc::unsupported, {20, 40});
  layer.pad = restkv::padding::left;
  CHECK(run({.blocks = one}).ok());
  CHECK(made.layer.lengths(0) == 52);
}
