// SPDX-License-Identifier: Apache-2.0
// Key channels: scores by their definition, the choice, and products over what is left.
#include "support/arranged_layer.hpp"
#include "cache/cache_support.hpp"

#include <restkv/cache/channel_pruning.hpp>

#include <cmath>

using namespace restkv_test;
using restkv::errc;

namespace {

using channel_view = tensor_view<const position_t, 3>;

}  // namespace

TEST_CASE("channels that stay are counted as ThinK counts", "[cache][channels]") {
  CHECK(restkv::kept_channels(128, 0.4) == 77);  // 128 - int(51.2)
  CHECK(restkv::kept_channels(64, 0.5) == 32);
  CHECK(restkv::kept_channels(64, 0) == 64);
  CHECK(restkv::kept_channels(64, 0.99) == 1);
  CHECK(restkv::kept_channels(64, 1) == 64);
  CHECK(restkv::kept_channels(64, -0.5) == 64);
  CHECK(restkv::kept_channels(64, std::nan("")) == 64);
  CHECK(restkv::kept_channels(0, 0.5) == 0);
}

TEST_CASE("a channel's score is what zeroing it takes from the logits", "[cache][channels]") {
  arranged_layer<float> layer({.batch = 2, .query_heads = 6, .kv_heads = 2, .head_dim = 10, .tokens = 37, .queries = 9},
                              41, memory_order::channels);
  layer.pad_to({37, 5}, restkv::padding::left);
  auto view = layer.view();
  const auto chunks = cut_tokens(layer.key, std::array<index_t, 2>{11, 34});
  view.key = {chunks.data(), 3};
  std::vector<double> memory(2 * 2 * 10, -1.0);
  const tensor_view<double, 3> scores(memory.data(), {2, 2, 10});
  REQUIRE(restkv::score_channels(view, 7, scores, backward_for{}).ok());
  for (index_t b = 0; b < 2; ++b) {
    const index_t length = b == 0 ? 37 : 5;
    const index_t rows = std::min<index_t>(7, length);
    for (index_t h = 0; h < 2; ++h) {
      for (index_t c = 0; c < 10; ++c) {
        // || q_c k_c^T ||_F^2 over all pairs, one by one.
        double squares = 0;
        for (index_t q = 3 * h; q < 3 * h + 3; ++q) {
          for (index_t i = 9 - rows; i < 9; ++i) {
            for (index_t n = 37 - length; n < 37; ++n) {
              const double product = double{layer.query(b, q, i, c)} * double{layer.key(b, h, n, c)};
              squares += product * product;
            }
          }
        }
        CHECK(scores(b, h, c) == Approx(squares / static_cast<double>(3 * rows * length)).epsilon(1e-12));
      }
    }
  }
}

TEST_CASE("the best channels, ascending, ties to the smaller, NaN last", "[cache][channels]") {
  const double nan = std::nan("");
  const std::vector<double> memory{1, 5, 5, nan, 5, 0, nan, nan, nan, -1, nan, 2};
  const tensor_view<const double, 3> scores(memory.data(), {1, 2, 6});
  std::vector<position_t> chosen(6);
  REQUIRE(restkv::select_channels(scores, {chosen.data(), {1, 2, 3}}).ok());
  CHECK(chosen == std::vector<position_t>{1, 2, 4, 0, 3, 5});
  REQUIRE(restkv::select_channels(scores, {chosen.data(), {1, 2, 2}}).ok());
  CHECK(std::vector<position_t>(chosen.begin(), chosen.begin() + 4) == std::vector<position_t>{1, 2, 3, 5});
  REQUIRE(restkv::select_channels(scores, {chosen.data(), {1, 2, 0}}).ok());
  random_engine random(42);
  for (int trial = 0; trial < 200; ++trial) {
    const index_t d = pick(random, 1, 12);
    const index_t most = pick(random, 1, d);
    std::vector<double> drawn;
    for (index_t c = 0; c < d; ++c) drawn.push_back(static_cast<double>(pick(random, 0, 4)));
    std::vector<position_t> best(static_cast<std::size_t>(most));
    REQUIRE(restkv::select_channels(tensor_view<const double, 3>(drawn.data(), {1, 1, d}), {best.data(), {1, 1, most}})
                .ok());
    std::vector<position_t> order(static_cast<std::size_t>(d));
    std::iota(order.begin(), order.end(), position_t{0});
    std::sort(order.begin(), order.end(), [&](position_t a, position_t b) {
      return drawn[static_cast<std::size_t>(a)] > drawn[static_cast<std::size_t>(b)];
    });
    order.resize(static_cast<std::size_t>(most));
    std::sort(order.begin(), order.end());
    CHECK(best == order);
  }
}

TEST_CASE("products over the kept channels are those with the others at zero", "[cache][channels]") {
  const index_t tokens = 20, recent = 6, d = 12;
  const arranged_layer<restkv::half> layer(
      {.query_heads = 4, .kv_heads = 2, .head_dim = d, .tokens = tokens, .queries = 5}, 43, memory_order::interleaved);
  std::vector<double> score_memory(2 * d);
  const tensor_view<double, 3> scores(score_memory.data(), {1, 2, d});
  REQUIRE(restkv::score_channels(layer.view(), 5, scores).ok());
  const index_t left = restkv::kept_channels(d, 0.4);
  REQUIRE(left == 8);
  std::vector<position_t> chosen(static_cast<std::size_t>(2 * left));
  const tensor_view<position_t, 3> channels(chosen.data(), {1, 2, left});
  REQUIRE(restkv::select_channels(scores, channels).ok());
  // The old keys lose channels, the last six stay whole.
  std::vector<restkv::half> key_memory(static_cast<std::size_t>(2 * (tokens - recent) * left));
  const tensor_view<restkv::half, 4> keys(key_memory.data(), {1, 2, tokens - recent, left});
  REQUIRE(restkv::gather_channels(channel_view(channels), layer.key.slice(2, 0, tokens - recent), keys).ok());
  std::vector<restkv::half> query_memory(static_cast<std::size_t>(4 * 5 * left));
  const tensor_view<restkv::half, 4> queries(query_memory.data(), {1, 4, 5, left});
  REQUIRE(restkv::gather_channels(channel_view(channels), layer.query, queries, backward_for{}).ok());
  for (index_t q = 0; q < 4; ++q) {
    for (index_t i = 0; i < 5; ++i) {
      for (index_t n = 0; n < tokens - recent; ++n) {
        double pruned = 0, zeroed = 0;
        for (index_t c = 0; c < left; ++c) {
          pruned += restkv::widen<double>(queries(0, q, i, c)) * restkv::widen<double>(keys(0, q / 2, n, c));
        }
        for (index_t c = 0; c < d; ++c) {
          bool stays = false;
          for (index_t j = 0; j < left; ++j) stays = stays || channels(0, q / 2, j) == c;
          const double key = stays ? restkv::widen<double>(layer.key(0, q / 2, n, c)) : 0.0;
          zeroed += restkv::widen<double>(layer.query(0, q, i, c)) * key;
        }
        CHECK(pruned == zeroed);
      }
    }
  }
  CHECK(key_memory.size() * sizeof(restkv::half) == 2u * 14 * 8 * 2);
}

TEST_CASE("channels that do not fit are named, and nothing is written", "[cache][channels]") {
  const arranged_layer<float> layer({.query_heads = 4, .kv_heads = 2, .head_dim = 6, .tokens = 10, .queries = 3}, 44);
  std::vector<double> memory(12, 7.0);
  const tensor_view<double, 3> scores(memory.data(), {1, 2, 6});
  auto view = layer.view();
  check_error(restkv::score_channels(view, 0, scores), errc::invalid_argument, {0, 1}, "window");
  check_error(restkv::score_channels(view, 3, tensor_view<double, 3>(memory.data(), {1, 2, 5})), errc::shape_mismatch,
              {5, 6}, "channels");
  check_error(restkv::score_channels(view, 3, tensor_view<double, 3>(memory.data(), {1, 2, 6}, {0, 0, 1})),
              errc::aliasing, {12}, "overlaps");
  view.query = {};
  check_error(restkv::score_channels(view, 3, scores), errc::missing_input, {3}, "query");
  view.key = {};
  check_error(restkv::score_channels(view, 3, scores), errc::missing_input, {}, "key");
  CHECK(memory == std::vector<double>(12, 7.0));
  std::vector<position_t> chosen{0, 3, 5, 1, 2, 6};
  check_error(restkv::select_channels(scores, {chosen.data(), {1, 2, 7}}), errc::invalid_argument, {7, 6}, "channels");
  check_error(restkv::select_channels(scores, {chosen.data(), {1, 1, 3}}), errc::shape_mismatch, {1, 2}, "heads");
  std::vector<float> out(2 * 10 * 3, 9.0f);
  const tensor_view<float, 4> keys(out.data(), {1, 2, 10, 3});
  const channel_view channels(chosen.data(), {1, 2, 3});
  check_error(restkv::gather_channels(channels, layer.key, keys), errc::invalid_argument, {6, 1, 2}, "channel");
  chosen[5] = 4;
  check_error(restkv::gather_channels(channels, layer.key, keys.slice(2, 0, 9)), errc::shape_mismatch, {9, 10},
              "tokens");
  check_error(restkv::gather_channels(channels, layer.query, keys), errc::shape_mismatch, {2, 4}, "heads");
  check_error(restkv::gather_channels(channel_view(chosen.data(), {1, 3, 2}), layer.key, keys), errc::shape_mismatch,
              {2, 3}, "heads");
  check_error(restkv::gather_channels(channels, layer.key, layer.key.slice(3, 0, 3)), errc::aliasing, {}, "source");
  CHECK(out == std::vector<float>(out.size(), 9.0f));
  CHECK(restkv::gather_channels(channels, layer.key, keys).ok());
  CHECK(out[3] == layer.key(0, 0, 1, 0));
}
