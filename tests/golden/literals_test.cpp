// SPDX-License-Identifier: Apache-2.0
// Numbers that other projects' own tests expect of their selectors, where they mean the same as ours: OpenVINO's cache
// eviction (tests/cpp/cache_eviction.cpp, its max pooling of block scores) and KVCache-Factory's selectors (tests/).
#include "support/catch.hpp"

#include <restkv/policy.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/score/given_scores.hpp>
#include <restkv/select.hpp>

#include <array>

using namespace restkv;

namespace {

/// OpenVINO's pool looks ahead: its element n is the maximum of n .. n + 2, ours that of n - 1 .. n + 1.
std::vector<float> pool_ahead(const std::vector<float>& scores) {
  std::vector<float> padded = scores;
  padded.insert(padded.begin(), -1e9f);
  padded.push_back(-1e9f);
  std::vector<float> pooled(padded.size());
  max_pool{.width = 3}(std::span<const float>(padded), std::span<float>(pooled), row_context{});
  return {pooled.begin() + 2, pooled.begin() + 2 + static_cast<std::ptrdiff_t>(scores.size())};
}

/// What is kept of one head with these scores.
std::vector<position_t> keep(const std::vector<double>& scores, index_t budget, const protection& protect) {
  const auto tokens = static_cast<index_t>(scores.size());
  const std::vector<float> cache(scores.size());
  layer_view<float> layer;
  layer.query = {cache.data(), {1, 1, 1, 1}};
  layer.key = tensor_view<const float, 4>(cache.data(), {1, 1, tokens, 1});
  layer.value = layer.key;
  using given = given_scores<score_rows::kv_heads, double>;
  const eviction_policy<given, mean, no_pool, uniform> policy{
      .score = {{scores.data(), {1, 1, tokens}}}, .budget = uniform{budget}, .protect = protect};
  reference_backend backend;
  owned_selection chosen;
  const status outcome = chosen.run(backend, policy, layer);
  INFO(outcome.message());
  REQUIRE(outcome.ok());
  const kept_tokens& kept = chosen.kept();
  return {kept.positions.data, kept.positions.data + kept.lengths(0, 0)};
}

}  // namespace

TEST_CASE("OpenVINO's pooled block scores") {
  const std::vector<float> first = pool_ahead({1.5f, -0.8f, 4.1f, 7.7f, 3.6f, -7.4f});
  CHECK(first == std::vector<float>{4.1f, 7.7f, 7.7f, 7.7f, 3.6f, -7.4f});
  CHECK(pool_ahead({-0.9f, 1.4f, 6.4f, -9.0f, 8.1f, 2.6f}) ==
        std::vector<float>{6.4f, 6.4f, 8.1f, 8.1f, 8.1f, 2.6f});
  // Accumulated over two steps, the second a token longer.
  const std::vector<float> second = pool_ahead({-7.4f, 2.6f, 8.9f, 3.5f, 7.4f, -3.8f, 0.1f});
  const std::array expected{13.0f, 16.6f, 16.6f, 15.1f, 11.0f, -7.3f, 0.1f};
  for (std::size_t n = 0; n < expected.size(); ++n) {
    const std::array rows{n < first.size() ? first[n] : 0.0f, second[n]};
    CHECK(std::fabs(sum{}(std::span<const float>(rows)) - expected[n]) < 1e-5f);
  }
}

TEST_CASE("KVCache-Factory's group reductions") {
  const double rows[2][2][2] = {{{1, 2}, {3, 6}}, {{10, 0}, {20, 4}}};  // [kv_heads, group, tokens]
  const auto reduce = [&](group_reduce how, int head, int token) {
    double folded = 0;
    for (int j = 0; j < 2; ++j) folded = group_fold(how, folded, rows[head][j][token], j == 0);
    return group_finish(how, folded, index_t{2});
  };
  const double mean_of[2][2] = {{2, 4}, {15, 2}};
  const double largest[2][2] = {{3, 6}, {20, 4}};
  const double sums[2][2] = {{4, 8}, {30, 4}};
  for (int head = 0; head < 2; ++head) {
    for (int token = 0; token < 2; ++token) {
      CHECK(reduce(group_reduce::mean, head, token) == mean_of[head][token]);
      CHECK(reduce(group_reduce::max, head, token) == largest[head][token]);
      CHECK(reduce(group_reduce::sum, head, token) == sums[head][token]);
    }
  }
}

TEST_CASE("KVCache-Factory's selections with protected tokens") {
  const std::vector<double> scores{.1, .9, .2, .8, .3, .4};
  CHECK(keep(scores, 4, {.sink = 0, .recent = 2}) == std::vector<position_t>{1, 3, 4, 5});  // NACL
  CHECK(keep(scores, 4, {.sink = 1, .recent = 1}) == std::vector<position_t>{0, 1, 3, 5});  // Scissorhands
}
