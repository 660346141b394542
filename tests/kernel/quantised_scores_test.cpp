// SPDX-License-Identifier: Apache-2.0
// Scores straight from codes are, bit by bit, those of the tensors that `dequantise` makes.
#include "kernel/quantised_support.hpp"
#include "support/catch.hpp"
#include "support/check_error.hpp"
#include "support/random_layer.hpp"
#include "support/selection_outcome.hpp"

#include <restkv/backend/host/backend.hpp>
#include <restkv/backend/kernel_quantised.hpp>
#include <restkv/cache/quantise.hpp>
#include <restkv/runtime_parts.hpp>
#include <restkv/score/rest_kv.hpp>
#include <restkv/smoothing/mean_variance.hpp>

#include <cmath>

using namespace restkv;
using namespace restkv_test;

namespace {

template <class Scale>
using coded_backend = quantised_kernel_backend<kernel::host_executor, Scale>;
static_assert(bulk_backend<coded_backend<float>>);
static_assert(bounding_backend<coded_backend<float>, score_request<rest_kv, mean>>);

/// Every kernel that reads a cache, with as few instances as that takes: scores without bounds.
using tested_policy = eviction_policy<rest_kv, mean_variance, any_spatial, uniform>;

quantised_recipe cache_of(random_engine& random, const layer_recipe& layer, index_t turn) {
  quantised_recipe how = random_recipe(random, turn);
  how.batch = layer.batch;
  how.heads = layer.kv_heads;
  how.tokens = layer.tokens;
  how.channels = layer.head_dim;
  how.channels_per_group = std::min(how.channels_per_group, how.channels);
  if (turn % 4 == 3) how.format = {.bits = 8, .e4m3 = true};
  return how;
}

/// Random codes, few of them NaN, whose numbers are of size 1, and the tensor of T that they stand for.
template <class T, class Scale>
struct coded_cache {
  quantised_memory<Scale> memory;
  std::vector<T> numbers;
  tensor_view<T, 4> tensor;

  coded_cache(random_engine& random, const quantised_recipe& how, bool damaged)
      : memory(random, how, false),
        numbers(static_cast<std::size_t>(how.batch * how.heads * how.tokens * how.channels)),
        tensor(numbers.data(), {how.batch, how.heads, how.tokens, how.channels}) {
    const double size = how.format.e4m3 ? 20.0 : how.format.highest();
    const auto shrink = [&](Scale& x) { x = narrow<Scale>(widen<double>(x) / size); };
    for_each(memory.scale.view(), shrink);
    if (how.format.e4m3) {
      for_each(memory.codes.view(), [&](std::uint8_t& code) {
        if ((code & 0x7f) == 0x7f && !(damaged && chance(random, 3))) code = 0x38;
      });
    }
    throw_if_failed(dequantise(memory.view(), tensor));
  }
};

bool same_numbers(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](float x, float y) {
           return same_bits(x, y) || (std::isnan(x) && std::isnan(y));
         });
}

template <class T, class Scale>
void check_layer(const tested_policy& policy, const layer_recipe& recipe, index_t turn) {
  random_engine random(static_cast<unsigned>(turn + 1));
  const random_layer<T> layer(random, recipe);
  const coded_cache<T, Scale> key(random, cache_of(random, recipe, turn), turn % 3 == 0);
  const coded_cache<T, Scale> value(random, cache_of(random, recipe, turn + 5), turn % 3 == 0);
  layer_view<T> dense = layer.view();
  dense.key = tensor_view<const T, 4>(key.tensor);
  dense.value = tensor_view<const T, 4>(value.tensor);
  layer_view<T> rest = layer.view();
  rest.key = {};
  rest.value = {};
  host_kernel_backend backend(static_cast<std::uint64_t>(turn));
  coded_backend<Scale> coded(backend, key.memory.view(), value.memory.view());
  CAPTURE(turn, recipe.head_dim, recipe.tokens);
  const auto expected = select_tokens(backend, policy, dense);
  const auto found = select_tokens(coded, policy, coded.layer(rest));
  INFO(expected.result.message());
  INFO(found.result.message());
  REQUIRE(expected.result.ok());
  REQUIRE(found.result.ok());
  CHECK(same_numbers(found.score, expected.score));
  CHECK(same_numbers(found.smoothed, expected.smoothed));
  CHECK(found.drift == expected.drift);
  CHECK(found.kept == expected.kept);
}

tested_policy policy_of(index_t turn) {
  tested_policy policy;
  policy.score.order = turn % 2 == 0 ? query_order::before : query_order::after;
  policy.score.metric_of_distance = turn % 3 == 0 ? metric::identity : metric::projection;
  policy.window = 4 + turn % 5;
  policy.spatial.choice =
      turn % 4 == 0 ? decltype(policy.spatial.choice)(adaptive_window{5, 3.0f}) : average_pool{.width = 3};
  policy.budget.budget = 30;
  policy.group = group_reduce::mean;
  policy.protect = {.sink = 2, .recent = 8};
  return policy;
}

}  // namespace

TEST_CASE("an 8-bit float is the number that its exponent and fraction say", "[kernel]") {
  CHECK(e4m3_to_float(0x7e) == 448.0f);
  CHECK(e4m3_to_float(0x01) == 0x1p-9f);
  CHECK(same_bits(e4m3_to_float(0x80), -0.0f));
  for (int code = 0; code < 256; ++code) {
    const int exponent = code >> 3 & 15;
    const double fraction = (code & 7) / 8.0;
    const double size = exponent == 0 ? std::ldexp(fraction, -6) : std::ldexp(1 + fraction, exponent - 7);
    const float number = e4m3_to_float(static_cast<std::uint8_t>(code));
    CAPTURE(code);
    const bool is_nan = (code & 0x7f) == 0x7f;
    CHECK(std::isnan(number) == is_nan);
    if (!is_nan) CHECK(number == static_cast<float>(code < 128 ? size : -size));
  }
}

TEST_CASE("scores of codes of every format are those of the dequantised tensors", "[kernel]") {
  constexpr index_t channels[] = {8, 33, 64, 40};
  for (index_t turn = 0; turn < 16; ++turn) {
    random_engine random(static_cast<unsigned>(turn));
    layer_recipe recipe{.batch = 1 + turn % 2,
                        .group = 1 + turn % 3,
                        .head_dim = channels[turn % 4],
                        .tokens = pick(random, 50, 150),
                        .hidden = 20,
                        .padded = turn % 5 == 4,
                        .masked_percent = turn % 7 == 6 ? 5 : 0};
    recipe.strided = turn % 2 == 1;
    check_layer<restkv::half, float>(policy_of(turn), recipe, turn);
  }
}

TEST_CASE("a quantised backend says what does not fit", "[kernel]") {
  random_engine random(1);
  const layer_recipe recipe{.head_dim = 8, .tokens = 60, .query_rows = 8};
  const random_layer<restkv::half> layer(random, recipe);
  quantised_recipe how = cache_of(random, recipe, 3);
  const coded_cache<restkv::half, float> key(random, how, false);
  how.tokens = 59;
  const coded_cache<restkv::half, float> shorter(random, how, false);
  const tested_policy policy = policy_of(1);
  host_kernel_backend backend(std::uint64_t{1});
  const auto outcome_of = [&](const quantised_view<const float>& keys, const quantised_view<const float>& values) {
    coded_backend<float> coded(backend, keys, values);
    return select_tokens(coded, policy, coded.layer(layer.view())).result;
  };
  CHECK(outcome_of(key.memory.view(), key.memory.view()).ok());
  check_error(outcome_of(key.memory.view(), shorter.memory.view()), errc::shape_mismatch, {59, 60}, "value");
  quantised_view<const float> broken = key.memory.view();
  broken.format.bits = 4;
  check_error(outcome_of(broken, key.memory.view()), errc::invalid_argument, {4, 8}, "e4m3");
  broken = key.memory.view();
  broken.scale = broken.scale.slice(3, 0, 0);
  CHECK_FALSE(outcome_of(broken, key.memory.view()).ok());
  CHECK_FALSE(outcome_of(key.memory.view(), {}).ok());

  // e4m3 codes are not made: numbers are not rounded to them.
  const quantised_view<float> out = key.memory.view();
  CHECK(quantise(layer.key.read(), out).code() == errc::unsupported);
}
