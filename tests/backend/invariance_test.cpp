// SPDX-License-Identifier: Apache-2.0
// What must not change a result, bit by bit: where numbers lie in memory, how a prompt was cut, how many threads work,
// which other sequences share the batch, the order of heads; and what must change it in a known way.
#include "support/arranged_layer.hpp"
#include "support/catch.hpp"
#include "support/layer_metric.hpp"
#include "support/selection_outcome.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/runtime_parts.hpp>

#include <bit>

using namespace restkv_test;
using namespace restkv;

namespace {

constexpr index_t window = 7;

/// Every primitive in one policy: attention, outputs, distances through W_O, drift, groups.
eviction_policy<rest_kv, any_temporal, any_spatial, any_budget> make_policy(query_order order) {
  return {.score = {.order = order, .metric_of_distance = metric::projection},
          .window = window,
          .temporal = {ema{0.3f}},
          .spatial = {adaptive_window{.min_width = 3, .scale = 4.0f}},
          .group = group_reduce::l2,
          .budget = {ada_kv{.budget = 40}},
          .protect = {.sink = 2, .recent = 0}};
}

const layer_sizes sizes{.batch = 2,
                        .query_heads = 6,
                        .kv_heads = 2,
                        .head_dim = 24,
                        .tokens = 203,
                        .queries = 9,
                        .hidden = 40,
                        .sharpness = 2.0};

/// Bits, so that NaN equals itself and -0 is not 0.
bool same_bits(std::span<const float> a, std::span<const float> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) {
    return std::bit_cast<std::uint32_t>(x) == std::bit_cast<std::uint32_t>(y);
  });
}

void check_same(const selection_outcome<float>& a, const selection_outcome<float>& b) {
  INFO(a.result.message() << b.result.message());
  REQUIRE(a.result.ok());
  REQUIRE(b.result.ok());
  CHECK(same_bits(a.score, b.score));
  CHECK(same_bits(a.smoothed, b.smoothed));
  CHECK(a.drift == b.drift);
  CHECK(a.kept == b.kept);
}

/// Sequence `from` of one outcome against sequence `to` of another: the tokens of `length` from the beginning.
void check_same_sequence(const selection_outcome<float>& whole, index_t from, index_t begin,
                         const selection_outcome<float>& alone, index_t to, index_t length) {
  INFO(whole.result.message() << alone.result.message());
  REQUIRE(whole.result.ok());
  REQUIRE(alone.result.ok());
  for (index_t h = 0; h < whole.heads; ++h) {
    CAPTURE(from, h);
    const auto count = static_cast<std::size_t>(length);
    CHECK(same_bits(whole.scores_of(from, h).first(count), alone.scores_of(to, h).first(count)));
    CHECK(same_bits(whole.smoothed_of(from, h).first(count), alone.smoothed_of(to, h).first(count)));
    CHECK(whole.drift[static_cast<std::size_t>(from * whole.heads + h)] ==
          alone.drift[static_cast<std::size_t>(to * alone.heads + h)]);
    auto moved = alone.kept_of(to, h);
    for (position_t& n : moved) n += static_cast<position_t>(begin);
    CHECK(whole.kept_of(from, h) == moved);
  }
}

/// One sequence of a layer as a layer of its own: tokens [begin, begin + length), and query rows [first_row, + rows).
template <class T>
layer_view<T> alone(const layer_view<T>& layer, index_t batch, index_t begin, index_t length, index_t first_row,
                    index_t rows) {
  layer_view<T> one = layer;
  one.query = layer.query.slice(0, batch, 1).slice(2, first_row, rows);
  one.key = layer.key.chunk(0).slice(0, batch, 1).slice(2, begin, length);
  one.value = layer.value.chunk(0).slice(0, batch, 1).slice(2, begin, length);
  one.lengths = {};
  return one;
}

}  // namespace

TEST_CASE("strides change no bit") {
  const auto order = GENERATE(query_order::before, query_order::after);
  const auto policy = make_policy(order);
  eigen_backend backend;
  const auto check_type = [&]<class T>(T) {
    arranged_layer<T> plain(sizes, 3);
    const output_metric metric = attach_metric(plain);
    const auto expected = select_tokens(backend, policy, plain.view());
    for (const auto arrangement :
         {memory_order::tokens_heads, memory_order::padded_rows, memory_order::channels, memory_order::interleaved}) {
      CAPTURE(int(arrangement));
      arranged_layer<T> other(sizes, 3, arrangement);
      other.metric = metric.view();
      check_same(expected, select_tokens(backend, policy, other.view()));
    }
    // Backwards in memory: negative strides of tokens and channels.
    arranged_layer<T> reversed(sizes, 3);
    for (tensor_view<T, 4>* tensor : {&reversed.query, &reversed.key, &reversed.value}) {
      std::reverse(tensor->data, tensor->data + tensor->size());
      tensor->data += tensor->size() - 1;
      for (index_t& stride : tensor->strides) stride = -stride;
    }
    reversed.metric = metric.view();
    check_same(expected, select_tokens(backend, policy, reversed.view()));
  };
  check_type(float{});
  check_type(half{});
}

TEST_CASE("a prompt in chunks gives the bits of the whole prompt") {
  const auto order = GENERATE(query_order::before, query_order::after);
  const auto policy = make_policy(order);
  eigen_backend backend;
  arranged_layer<float> whole(sizes, 4);
  const output_metric metric = attach_metric(whole);
  const auto expected = select_tokens(backend, policy, whole.view());
  const std::vector<std::vector<index_t>> cuts{
      {96},         {1},        {202},           {0, 0, 100, 100, 203},
      {50, 95, 97}, {192, 193}, {196, 197, 200}, {13, 26, 39, 52, 65, 78, 91, 104, 117, 130, 143, 156, 169, 182, 195}};
  for (std::size_t i = 0; i < cuts.size(); ++i) {
    CAPTURE(i);
    const auto keys = cut_tokens(whole.key, cuts[i]);
    const auto values = cut_tokens(whole.value, cuts[(i + 1) % cuts.size()]);  // cut elsewhere
    layer_view<float> layer = whole.view();
    layer.key = {keys.data(), static_cast<index_t>(keys.size())};
    layer.value = {values.data(), static_cast<index_t>(values.size())};
    check_same(expected, select_tokens(backend, policy, layer));
  }
}

TEST_CASE("the number of threads changes no bit") {
  const auto order = GENERATE(query_order::before, query_order::after);
  const auto policy = make_policy(order);
  arranged_layer<float> layer(sizes, 5);
  const output_metric metric = attach_metric(layer);
  eigen_backend one(1);
  const auto expected = select_tokens(one, policy, layer.view());
  const auto pruned = select_tokens(one, policy, layer.view(), false);
  CHECK(pruned.kept == expected.kept);
  for (const int threads : {0, 2, 3, 8}) {
    CAPTURE(threads);
    eigen_backend backend(threads);
    CHECK(backend.threads() == std::max(threads, 1));
    for (int round = 0; round < 3; ++round) {
      check_same(expected, select_tokens(backend, policy, layer.view()));
      CHECK(select_tokens(backend, policy, layer.view(), false).kept == pruned.kept);
    }
  }
}

TEST_CASE("a sequence in a padded batch gives the bits of the sequence alone") {
  const auto order = GENERATE(query_order::before, query_order::after);
  const auto side = GENERATE(padding::left, padding::right);
  const auto policy = make_policy(order);
  eigen_backend backend(2);
  layer_sizes four = sizes;
  four.batch = 5;
  // The whole axis; a usual one; one below the budget; one below the window; an empty one.
  const std::vector<std::int32_t> lengths{203, 101, 30, 5, 0};
  arranged_layer<float> layer(four, 6);
  const output_metric metric = attach_metric(layer);
  layer.pad_to(lengths, side);
  const auto batch = select_tokens(backend, policy, layer.view());
  CHECK(select_tokens(backend, policy, layer.view(), false).kept == batch.kept);
  for (index_t b = 0; b < four.batch; ++b) {
    const index_t length = lengths[static_cast<std::size_t>(b)];
    const index_t begin = side == padding::left ? four.tokens - length : 0;
    const auto single = select_tokens(backend, policy, alone(layer.view(), b, begin, length, 0, four.queries));
    check_same_sequence(batch, b, begin, single, 0, length);
    for (index_t h = 0; h < batch.heads; ++h) {
      if (length <= 40) CHECK(static_cast<index_t>(batch.kept_of(b, h).size()) == length);
    }
  }
}

TEST_CASE("only the window's rows of a longer query tensor count") {
  const auto order = GENERATE(query_order::before, query_order::after);
  const auto policy = make_policy(order);
  eigen_backend backend;
  arranged_layer<float> layer(sizes, 7);
  const output_metric metric = attach_metric(layer);
  const auto expected = select_tokens(backend, policy, layer.view());
  for (const index_t rows : {window, window + 1}) {
    layer_view<float> shorter = layer.view();
    shorter.query = shorter.query.slice(2, sizes.queries - rows, rows);
    check_same(expected, select_tokens(backend, policy, shorter));
  }
}

TEST_CASE("with right padding, a query tensor of all tokens gives row i to token i") {
  const auto order = GENERATE(query_order::before, query_order::after);
  const auto policy = make_policy(order);
  eigen_backend backend;
  layer_sizes all = sizes;
  all.queries = all.tokens;
  const std::vector<std::int32_t> lengths{150, 203};
  arranged_layer<float> layer(all, 8);
  const output_metric metric = attach_metric(layer);
  layer.pad_to(lengths, padding::right);
  for (index_t h = 0; h < all.query_heads; ++h) {  // queries of padding must not be read, either
    for (index_t i = 150; i < all.tokens; ++i) layer.query(0, h, i, 0) = std::numeric_limits<float>::quiet_NaN();
  }
  const auto batch = select_tokens(backend, policy, layer.view());
  for (index_t b = 0; b < all.batch; ++b) {
    const index_t length = lengths[static_cast<std::size_t>(b)];
    const auto single = select_tokens(backend, policy, alone(layer.view(), b, 0, length, length - window, window));
    check_same_sequence(batch, b, 0, single, 0, length);
  }
  // With left padding the last rows are the window's, however many there are.
  layer_sizes left_sizes = all;
  arranged_layer<float> left(left_sizes, 8);
  left.metric = metric.view();
  left.pad_to(lengths, padding::left);
  const auto left_batch = select_tokens(backend, policy, left.view());
  const auto single = select_tokens(backend, policy, alone(left.view(), 0, 53, 150, all.tokens - window, window));
  check_same_sequence(left_batch, 0, 53, single, 0, 150);
}

TEST_CASE("heads in another order give the same results in that order") {
  const auto order = GENERATE(query_order::before, query_order::after);
  auto policy = make_policy(order);
  policy.budget = {uniform{40}};  // ties between heads would go to the smaller head
  eigen_backend backend;
  layer_sizes three = sizes;
  three.kv_heads = 3;
  arranged_layer<float> layer(three, 9);
  const output_metric metric = attach_metric(layer);
  const auto expected = select_tokens(backend, policy, layer.view());

  // All heads backwards: those of a group are swapped, too, but two summands commute.
  REQUIRE(three.query_heads / three.kv_heads == 2);
  const auto turn = [](auto view) {
    view.data += (view.extents[1] - 1) * view.strides[1];
    view.strides[1] = -view.strides[1];
    return view;
  };
  layer_view<float> turned = layer.view();
  turned.key = turn(turned.key.chunk(0));
  turned.value = turn(turned.value.chunk(0));
  turned.query = turn(turned.query);
  std::vector<float> weights;
  const index_t d = three.head_dim;
  for (index_t row = 0; row < three.hidden; ++row) {
    for (index_t h = three.query_heads; h-- > 0;) {
      for (index_t c = 0; c < d; ++c) weights.push_back(layer.projection_view()(row, h * d + c));
    }
  }
  const output_metric turned_metric =
      build_metric({weights.data(), {three.hidden, three.query_heads * d}}, three.query_heads, d);
  turned.metric = turned_metric.view();
  const auto outcome = select_tokens(backend, policy, turned);
  REQUIRE(expected.result.ok());
  REQUIRE(outcome.result.ok());
  for (index_t b = 0; b < three.batch; ++b) {
    for (index_t h = 0; h < 3; ++h) {
      CHECK(same_bits(outcome.scores_of(b, h), expected.scores_of(b, 2 - h)));
      CHECK(outcome.kept_of(b, h) == expected.kept_of(b, 2 - h));
    }
  }
}

TEST_CASE("values scaled by a power of two scale the scores by it and change no choice") {
  const auto order = GENERATE(query_order::before, query_order::after);
  const auto policy = make_policy(order);
  eigen_backend backend;
  arranged_layer<float> layer(sizes, 10);
  const output_metric metric = attach_metric(layer);
  const auto expected = select_tokens(backend, policy, layer.view());
  for (const float factor : {0.25f, 4096.0f}) {
    CAPTURE(factor);
    arranged_layer<float> scaled(sizes, 10);
    scaled.metric = metric.view();
    for (index_t i = 0; i < scaled.value.size(); ++i) scaled.value.data[i] *= factor;
    const auto outcome = select_tokens(backend, policy, scaled.view());
    REQUIRE(outcome.result.ok());
    std::vector<float> wanted;
    for (const float score : expected.score) wanted.push_back(score * factor);
    CHECK(same_bits(outcome.score, wanted));
    CHECK(outcome.kept == expected.kept);
  }
  // Keys times 2 and queries times 1/2 are the same attention.
  arranged_layer<float> traded(sizes, 10);
  traded.metric = metric.view();
  for (index_t i = 0; i < traded.key.size(); ++i) traded.key.data[i] *= 2.0f;
  for (index_t i = 0; i < traded.query.size(); ++i) traded.query.data[i] *= 0.5f;
  check_same(expected, select_tokens(backend, policy, traded.view()));
}
