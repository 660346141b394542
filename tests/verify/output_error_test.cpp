// SPDX-License-Identifier: Apache-2.0
// output_error against deleting the tokens and attending again, and what must hold for any kept set.
#include "verify/verify_support.hpp"

#include <restkv/reference/backend.hpp>
#include <restkv/reference/window_attention.hpp>

#include <algorithm>
#include <numeric>
#include <thread>

using namespace restkv;
using namespace restkv_test;

namespace {

/// Runs loops on three threads, each from its own end or middle.
struct three_threads : reference_backend {
  template <class Body>
  void parallel_for(index_t n, const Body& body) const {
    std::vector<std::thread> threads;
    for (index_t t = 0; t < 3; ++t) {
      threads.emplace_back([=, &body] {
        for (index_t i = n - 1 - t; i >= 0; i -= 3) body(i);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

template <class T>
void copy(const tensor_view<T, 4>& to, const tensor_view<const half, 4>& from) {
  for (index_t b = 0; b < to.extent(0); ++b) {
    for (index_t h = 0; h < to.extent(1); ++h) {
      for (index_t n = 0; n < to.extent(2); ++n) {
        for (index_t c = 0; c < to.extent(3); ++c) to(b, h, n, c) = static_cast<T>(from(b, h, n, c));
      }
    }
  }
}

/// G[h] = W[h]^T W[h].
std::vector<double> gram_of(const arranged_layer<float>& layer) {
  const index_t d = layer.sizes.head_dim;
  const auto weights = layer.projection_view();
  std::vector<double> gram;
  for (index_t h = 0; h < layer.sizes.query_heads; ++h) {
    for (index_t r = 0; r < d; ++r) {
      for (index_t c = 0; c < d; ++c) {
        double sum = 0;
        for (index_t i = 0; i < weights.extent(0); ++i) {
          sum += double(weights(i, h * d + r)) * double(weights(i, h * d + c));
        }
        gram.push_back(sum);
      }
    }
  }
  return gram;
}

reference_backend backend;

}  // namespace

TEST_CASE("every number equals deleting tokens and attending again in long double") {
  struct problem {
    layer_sizes sizes;
    index_t kept_heads;
    int percent;
  };
  const auto [sizes, kept_heads, percent] = GENERATE(
      problem{{.batch = 2, .tokens = 40, .queries = 19, .hidden = 24}, 2, 40},   // KV heads, two blocks
      problem{{.head_dim = 5, .tokens = 37, .queries = 4, .hidden = 9}, 4, 30},  // query heads
      problem{{.query_heads = 3, .kv_heads = 1, .head_dim = 33, .tokens = 66, .queries = 2}, 1, 10},  // no W_O
      problem{{.query_heads = 2, .kv_heads = 1, .head_dim = 70, .tokens = 35, .queries = 2, .hidden = 11}, 1, 60},
      problem{{.query_heads = 2, .kv_heads = 2, .tokens = 33, .queries = 3, .hidden = 4, .sharpness = 30}, 2, 50},
      problem{{.tokens = 1, .queries = 1, .hidden = 8}, 2, 0});
  CAPTURE(sizes.batch, sizes.query_heads, sizes.head_dim, sizes.tokens, kept_heads, percent);
  const arranged_layer<float> layer(sizes, 7);
  random_engine random(5);
  const owned_kept_tokens kept = keep_some(random, layer.view(), kept_heads, percent);
  const output_errors errors = output_error(backend, kept, layer.view());
  CHECK(errors.projected() == (sizes.hidden > 0));
  CHECK(errors.head_projected().empty() == (sizes.hidden == 0));
  CHECK(errors.head_projected_predicted().empty() == (sizes.hidden == 0));
  REQUIRE(errors.batch() == sizes.batch);
  REQUIRE(errors.queries() == sizes.queries);
  for (index_t b = 0; b < sizes.batch; ++b) {
    for (index_t row = 0; row < sizes.queries; ++row) {
      check_row(errors, oracle_row(layer.view(), kept, b, row), b, row);
    }
  }
}

TEST_CASE("fewer queries than the layer has are its last ones") {
  const arranged_layer<float> layer({.tokens = 50, .queries = 40, .hidden = 8}, 3);
  random_engine random(1);
  const owned_kept_tokens kept = keep_some(random, layer.view(), 2, 30);
  const output_errors all = output_error(backend, kept, layer.view());
  const output_errors last = output_error(backend, kept, layer.view(), 7);
  REQUIRE(last.queries() == 7);
  REQUIRE(all.queries() == 40);
  for (index_t i = 0; i < 7; ++i) {
    CHECK(last.layer()(0, i) == all.layer()(0, 33 + i));
    CHECK(last.head_projected_predicted()(0, 3, i) == all.head_projected_predicted()(0, 3, 33 + i));
  }
}

TEST_CASE("one evicted token costs exactly its single deletion") {
  const arranged_layer<float> layer({.tokens = 48, .queries = 16, .hidden = 20, .sharpness = 6}, 11);
  for (const index_t victim : {0, 20, 32}) {
    CAPTURE(victim);
    const auto kept = keep_where(1, 2, 48, [&](index_t, index_t, index_t n) { return n != victim; });
    const output_errors errors = output_error(backend, kept, layer.view());
    for (index_t h = 0; h < 4; ++h) {
      for (index_t i = 0; i < 16; ++i) {
        CHECK(errors.head()(0, h, i) > 0);
        CHECK(errors.head()(0, h, i) == Approx(errors.head_predicted()(0, h, i)).epsilon(1e-12));
        CHECK(errors.head_projected()(0, h, i) == Approx(errors.head_projected_predicted()(0, h, i)).epsilon(1e-9));
      }
    }
    for (index_t i = 0; i < 16; ++i) CHECK(errors.layer()(0, i) <= errors.layer_predicted()(0, i) * (1 + 1e-9));
  }
}

TEST_CASE("keeping everything costs nothing, and a token nobody sees yet costs nothing") {
  const arranged_layer<float> layer({.tokens = 30, .queries = 8, .hidden = 12}, 2);
  const auto check_free = [&](const const_kept_tokens& kept, index_t rows) {
    const output_errors errors = output_error(backend, kept, layer.view());
    for (index_t i = 0; i < rows; ++i) {
      for (index_t h = 0; h < 4; ++h) {
        CHECK(errors.head()(0, h, i) == 0);
        CHECK(errors.head_predicted()(0, h, i) == 0);
        CHECK(errors.head_projected()(0, h, i) == 0);
        CHECK(errors.head_projected_predicted()(0, h, i) == 0);
        CHECK(errors.evicted_mass()(0, h, i) == 0);
        CHECK(errors.head_output_norm()(0, h, i) > 0);
      }
      CHECK(errors.layer()(0, i) == 0);
      CHECK(errors.layer_output_norm()(0, i) > 0);
    }
    return errors;
  };
  const auto all = check_free(keep_where(1, 4, 30, [](auto, auto, auto) { return true; }), 8);
  CHECK(all.mean_relative() == 0);
  CHECK(all.worst_relative() == 0);
  // The newest token is seen by the newest query alone.
  const auto but_newest = check_free(keep_where(1, 2, 30, [](auto, auto, index_t n) { return n < 29; }), 7);
  CHECK(but_newest.layer()(0, 7) > 0);
}

TEST_CASE("where no visible token is kept the remaining output is 0") {
  const arranged_layer<float> layer({.tokens = 20, .queries = 4, .hidden = 12}, 2);
  const auto only_newest = keep_where(1, 2, 20, [](auto, auto, index_t n) { return n == 19; });
  const output_errors errors = output_error(backend, only_newest, layer.view());
  for (index_t h = 0; h < 4; ++h) {
    for (index_t i = 0; i < 3; ++i) {
      CHECK(errors.evicted_mass()(0, h, i) == 1);
      CHECK(errors.head()(0, h, i) == Approx(errors.head_output_norm()(0, h, i)).epsilon(1e-14));
    }
    CHECK(errors.evicted_mass()(0, h, 3) < 1);
  }
  for (index_t i = 0; i < 3; ++i) {
    CHECK(errors.layer()(0, i) == Approx(errors.layer_output_norm()(0, i)).epsilon(1e-14));
  }
  const auto nothing = keep_where(1, 2, 20, [](auto, auto, auto) { return false; });
  CHECK(output_error(backend, nothing, layer.view()).mean_relative() == Approx(1.0).epsilon(1e-14));
}

TEST_CASE("one token that holds nearly all attention, evicted and kept") {
  arranged_layer<float> layer({.query_heads = 2, .kv_heads = 1, .tokens = 60, .queries = 2, .hidden = 10}, 4);
  // Every other logit is about 0, so that this one's share is 1 - 1e-9, then beyond the reach of double.
  const double gap = GENERATE(25.0, 900.0);
  const bool evicted = GENERATE(true, false);
  CAPTURE(gap, evicted);
  for (index_t i = 0; i < 2; ++i) {
    for (index_t h = 0; h < 2; ++h) {
      for (index_t c = 0; c < 16; ++c) layer.query(0, h, i, c) = c == 0 ? 4.0f : 0.01f * float(c % 3);
    }
  }
  for (index_t n = 0; n < 60; ++n) layer.key(0, 0, n, 0) = n == 17 ? static_cast<float>(gap) : 0.0f;
  const auto kept = keep_where(1, 1, 60, [&](auto, auto, index_t n) { return n == 17 ? !evicted : n % 3 == 0; });
  const output_errors errors = output_error(backend, kept, layer.view());
  CHECK(errors.evicted_mass()(0, 0, 1) == (evicted ? Approx(1.0).epsilon(1e-8) : Approx(0.0).margin(1e-8)));
  for (index_t row = 0; row < 2; ++row) {
    const oracle_row expected(layer.view(), kept, 0, row);
    REQUIRE(std::isfinite(expected.layer_predicted));
    check_row(errors, expected, 0, row);
  }
}

TEST_CASE("strides, chunks, threads and element types change no bit") {
  const layer_sizes sizes{.batch = 2, .head_dim = 24, .tokens = 70, .queries = 20, .hidden = 30};
  const arranged_layer<half> plain(sizes, 9);
  random_engine random(3);
  const owned_kept_tokens kept = keep_some(random, plain.view(), 2, 30);
  const output_errors expected = output_error(backend, kept, plain.view());
  REQUIRE(expected.layer()(1, 19) > 0);
  const auto check_same = [&](const output_errors& errors) {
    CHECK(same_bits(errors, 0, expected, 0));
    CHECK(same_bits(errors, 1, expected, 1));
  };

  for (const memory_order order :
       {memory_order::tokens_heads, memory_order::padded_rows, memory_order::channels, memory_order::interleaved}) {
    CAPTURE(static_cast<int>(order));
    check_same(output_error(backend, kept, arranged_layer<half>(sizes, 9, order).view()));
  }
  // Chunks in memory of their own, an empty one among them.
  const auto cut = [](const tensor_view<const half, 4>& cache, const std::vector<index_t>& counts) {
    std::pair<std::vector<std::vector<half>>, std::vector<tensor_view<const half, 4>>> pieces;
    index_t begin = 0;
    for (const index_t count : counts) {
      std::vector<half>& memory = pieces.first.emplace_back(static_cast<std::size_t>(2 * 2 * count * 24 + 1));
      const tensor_view<half, 4> piece(memory.data(), {2, 2, count, 24});
      copy(piece, cache.slice(2, begin, count));
      pieces.second.push_back(piece);
      begin += count;
    }
    return pieces;
  };
  const auto keys = cut(plain.key, {1, 0, 40, 29});
  const auto values = cut(plain.value, {33, 37});
  layer_view<half> chunked = plain.view();
  chunked.key = {keys.second.data(), 4};
  chunked.value = {values.second.data(), 2};
  check_same(output_error(backend, kept, chunked));
  three_threads threads;
  check_same(output_error(threads, kept, plain.view()));

  // Half and float hold the same numbers here, so only their widening could differ.
  arranged_layer<float> wide(sizes, 9);
  copy(wide.query, tensor_view<const half, 4>(plain.query));
  copy(wide.key, tensor_view<const half, 4>(plain.key));
  copy(wide.value, tensor_view<const half, 4>(plain.value));
  for (std::size_t i = 0; i < wide.projection.size(); ++i) wide.projection[i] = static_cast<float>(plain.projection[i]);
  check_same(output_error(backend, kept, wide.view()));
}

TEST_CASE("a padded sequence of a batch costs what it costs alone") {
  const padding pad = GENERATE(padding::left, padding::right);
  const index_t rows = GENERATE(24, 70);  // as many as tokens: with right padding, row i is the query of token i
  const layer_sizes sizes{.batch = 4, .tokens = 70, .queries = rows, .hidden = 18};
  CAPTURE(static_cast<int>(pad), rows);
  arranged_layer<float> layer(sizes, 5);
  layer.pad_to({70, 31, 9, 0}, pad);
  random_engine random(3);
  const owned_kept_tokens kept = keep_some(random, layer.view(), 4, 40);
  constexpr index_t asked = 20;
  const output_errors errors = output_error(backend, kept, layer.view(), asked);
  REQUIRE(errors.queries() == asked);
  double error_square = 0;
  double norm_square = 0;
  double worst = 0;
  for (index_t b = 0; b < 4; ++b) {
    CAPTURE(b);
    const sequence_span span = sequence(layer.view(), b, 0);
    REQUIRE(errors.rows(b) == std::min(asked, span.length));
    for (index_t i = 0; i < asked - errors.rows(b); ++i) {
      CHECK(errors.layer()(b, i) == 0);
      CHECK(errors.layer_output_norm()(b, i) == 0);
      CHECK(errors.head()(b, 0, i) == 0);
    }
    for (index_t i = asked - errors.rows(b); i < asked; ++i) {
      error_square += errors.layer()(b, i) * errors.layer()(b, i);
      norm_square += errors.layer_output_norm()(b, i) * errors.layer_output_norm()(b, i);
      worst = std::max(worst, errors.layer()(b, i) / errors.layer_output_norm()(b, i));
    }
    if (span.length == 0) continue;
    layer_view<float> alone = layer.view();
    alone.lengths = {};
    const bool follows = pad == padding::right && rows == 70;
    const index_t query_rows = follows ? span.length : rows;
    alone.query = tensor_view<const float, 4>(layer.query).slice(0, b, 1).slice(2, 0, query_rows);
    alone.key = tensor_view<const float, 4>(layer.key).slice(0, b, 1).slice(2, span.begin, span.length);
    alone.value = tensor_view<const float, 4>(layer.value).slice(0, b, 1).slice(2, span.begin, span.length);
    const auto kept_alone =
        keep_where(1, 4, span.length, [&](index_t, index_t h, index_t n) { return keeps(kept, b, h, span.begin + n); });
    CHECK(same_bits(errors, b, output_error(backend, kept_alone, alone, errors.rows(b)), 0));
  }
  CHECK(errors.mean_relative() == Approx(std::sqrt(error_square / norm_square)).epsilon(1e-13));
  CHECK(errors.worst_relative() == worst);
}

TEST_CASE("a metric alone measures the heads through W_O, not the layer") {
  arranged_layer<float> layer({.tokens = 44, .queries = 18, .hidden = 40}, 6);
  const std::vector<double> gram = gram_of(layer);
  random_engine random(8);
  const owned_kept_tokens kept = keep_some(random, layer.view(), 2, 40);
  const output_errors through = output_error(backend, kept, layer.view());
  layer_view<float> view = layer.view();
  // The verifier reads the Gram matrices alone; NaN would show that it reads more.
  const std::vector<float> unread(gram.size(), std::numeric_limits<float>::quiet_NaN());
  view.metric = {{gram.data(), {4, 16, 16}}, {unread.data(), {4, 16, 16}}, {unread.data(), {4, 16}}};
  CHECK(output_error(backend, kept, view).head_projected()(0, 1, 3) == through.head_projected()(0, 1, 3));
  view.projection = {};
  const output_errors errors = output_error(backend, kept, view);
  layer_view<float> plain = layer.view();
  plain.projection = {};
  const output_errors without = output_error(backend, kept, plain);
  CHECK_FALSE(errors.projected());
  for (index_t i = 0; i < 18; ++i) {
    for (index_t h = 0; h < 4; ++h) {
      CHECK(errors.head_projected()(0, h, i) == Approx(through.head_projected()(0, h, i)).epsilon(1e-9));
      CHECK(errors.head_projected_predicted()(0, h, i) ==
            Approx(through.head_projected_predicted()(0, h, i)).epsilon(1e-9));
    }
    CHECK(errors.layer()(0, i) == without.layer()(0, i));
    CHECK(errors.layer_predicted()(0, i) == without.layer_predicted()(0, i));
  }
}

TEST_CASE("values that coincide with the output keep their exact distance") {
  // Evicted tokens whose values are copies of the one that holds the attention, and of each other.
  arranged_layer<float> layer({.query_heads = 2, .kv_heads = 1, .tokens = 40, .queries = 1, .hidden = 12}, 4);
  for (index_t h = 0; h < 2; ++h) {
    for (index_t c = 0; c < 16; ++c) layer.query(0, h, 0, c) = c == 0 ? 4.0f : 0.1f;
  }
  layer.key(0, 0, 3, 0) = 20.0f;
  for (index_t n = 10; n < 20; ++n) {
    for (index_t c = 0; c < 16; ++c) layer.value(0, 0, n, c) = layer.value(0, 0, 3, c);
  }
  const auto kept = keep_where(1, 1, 40, [](auto, auto, index_t n) { return n < 10 || n >= 20; });
  const output_errors errors = output_error(backend, kept, layer.view());
  const layer_view<float> view = layer.view();
  for (index_t h = 0; h < 2; ++h) {
    // a/(1-a) ||o - v_n|| with o - v_n = sum_m a_m (v_m - v_n), which does not cancel.
    std::vector<long double> share;
    long double sum = 0;
    for (index_t n = 0; n < 40; ++n) {
      long double dot = 0;
      for (index_t c = 0; c < 16; ++c)
        dot += (long double)(layer.query(0, h, 0, c)) * (long double)(layer.key(0, 0, n, c));
      share.push_back(std::exp(dot / 4));
      sum += share.back();
    }
    long double predicted = 0;
    long double projected = 0;
    for (index_t n = 10; n < 20; ++n) {
      std::vector<long double> change(32);  // W_O's columns of both heads; the other head's stay 0
      for (index_t m = 0; m < 40; ++m) {
        for (index_t c = 0; c < 16; ++c) {
          change[static_cast<std::size_t>(h * 16 + c)] +=
              share[static_cast<std::size_t>(m)] / sum *
              ((long double)(layer.value(0, 0, m, c)) - (long double)(layer.value(0, 0, n, c)));
        }
      }
      const long double odds = share[static_cast<std::size_t>(n)] / (sum - share[static_cast<std::size_t>(n)]);
      predicted += odds * oracle_row::norm(change);
      projected += odds * oracle_row::norm(oracle_row::whole(view, change));
    }
    REQUIRE(predicted > 0);
    REQUIRE(predicted < 1e-12);
    CHECK(errors.head_predicted()(0, h, 0) == Approx(double(predicted)).epsilon(1e-7).margin(0));
    CHECK(errors.head_projected_predicted()(0, h, 0) == Approx(double(projected)).epsilon(1e-7).margin(0));
  }
}

TEST_CASE("damaged keys and queries: logits that are no numbers count as the lowest, as in the reference") {
  arranged_layer<float> layer({.query_heads = 2, .kv_heads = 1, .tokens = 24, .queries = 3, .hidden = 6}, 4);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  layer.key(0, 0, 5, 2) = nan;
  layer.key(0, 0, 8, 0) = infinity;
  layer.key(0, 0, 9, 0) = -infinity;
  layer.query(0, 1, 2, 3) = nan;  // every logit of this row
  const auto kept = keep_where(1, 1, 24, [](auto, auto, index_t n) { return n % 2 == 1; });
  const output_errors errors = output_error(backend, kept, layer.view());
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < 3; ++i) {
      CAPTURE(h, i);
      const auto row = reference::window_attention(layer.view(), 0, h, 3, i);
      double mass = 0;
      for (index_t n = 0; n < 24; n += 2) mass += row.share[static_cast<std::size_t>(n)];
      CHECK(errors.evicted_mass()(0, h, i) == Approx(mass).epsilon(1e-12));
      CHECK(std::isfinite(errors.head_projected_predicted()(0, h, i)));
    }
  }
  CHECK(std::isfinite(errors.mean_relative()));
}

TEST_CASE("summaries say how far single deletions predict the exact error") {
  const layer_sizes sizes{.batch = 2, .tokens = 40, .queries = 9, .hidden = GENERATE(0, 14)};
  arranged_layer<float> layer(sizes, 8);
  layer.pad_to({40, 5}, padding::left);
  random_engine random(8);
  const output_errors errors = output_error(backend, keep_some(random, layer.view(), 2, 40), layer.view());
  const auto head_error = sizes.hidden > 0 ? errors.head_projected() : errors.head();
  const auto head_predicted = sizes.hidden > 0 ? errors.head_projected_predicted() : errors.head_predicted();
  double exact = 0;
  double predicted = 0;
  for (index_t h = 0; h < 4; ++h) {
    double head_exact = 0;
    double head_sum = 0;
    double mass = 0;
    double worst = 0;
    double squares = 0;
    double norms = 0;
    for (index_t b = 0; b < 2; ++b) {
      for (index_t i = b == 0 ? 0 : 4; i < 9; ++i) {
        head_exact += head_error(b, h, i);
        head_sum += head_predicted(b, h, i);
        mass += errors.evicted_mass()(b, h, i) / 14;
        worst = std::max(worst, errors.evicted_mass()(b, h, i));
        squares += std::pow(errors.head()(b, h, i), 2);
        norms += std::pow(errors.head_output_norm()(b, h, i), 2);
        exact += h == 0 ? errors.layer()(b, i) : 0;
        predicted += h == 0 ? errors.layer_predicted()(b, i) : 0;
      }
    }
    const head_error_summary summary = errors.summary(h);
    CHECK(summary.relative == Approx(std::sqrt(squares / norms)).epsilon(1e-13));
    CHECK(summary.greedy_ratio == Approx(head_exact / head_sum).epsilon(1e-13));
    CHECK(summary.mean_evicted_mass == Approx(mass).epsilon(1e-13));
    CHECK(summary.worst_evicted_mass == worst);
    CHECK(worst > mass);
  }
  CHECK(errors.greedy_ratio() == Approx(exact / predicted).epsilon(1e-13));
  CHECK(errors.greedy_ratio() < 1);  // many random changes cancel

  // Evicting nearly everything of equal value but one: renormalising makes the rest cost more than the sum.
  arranged_layer<float> uneven({.query_heads = 1, .kv_heads = 1, .tokens = 10, .queries = 1}, 8);
  for (index_t n = 0; n < 10; ++n) {
    for (index_t c = 0; c < 16; ++c) {
      uneven.key(0, 0, n, c) = 0;
      uneven.value(0, 0, n, c) = n == 0 ? 1.0f : 2.0f;
    }
  }
  const auto first = keep_where(1, 1, 10, [](auto, auto, index_t n) { return n == 0; });
  CHECK(output_error(backend, first, uneven.view()).summary(0).greedy_ratio > 1);
  const auto all = keep_where(1, 1, 10, [](auto, auto, auto) { return true; });
  CHECK(output_error(backend, all, uneven.view()).greedy_ratio() == 1);
  CHECK(output_error(backend, all, uneven.view()).summary(0).greedy_ratio == 1);
}

TEST_CASE("relative errors without an output to relate to") {
  arranged_layer<float> layer({.query_heads = 1, .kv_heads = 1, .head_dim = 2, .tokens = 2, .queries = 1}, 4);
  for (index_t c = 0; c < 2; ++c) {
    layer.query(0, 0, 0, c) = 0;  // equal attention
    layer.value(0, 0, 0, c) = 1;
    layer.value(0, 0, 1, c) = -1;
  }
  const auto one = keep_where(1, 1, 2, [](auto, auto, index_t n) { return n == 1; });
  CHECK(output_error(backend, one, layer.view()).mean_relative() == std::numeric_limits<double>::infinity());
  CHECK(output_error(backend, one, layer.view()).worst_relative() == std::numeric_limits<double>::infinity());
  for (index_t c = 0; c < 2; ++c) layer.value(0, 0, 0, c) = layer.value(0, 0, 1, c) = 0;
  CHECK(output_error(backend, one, layer.view()).mean_relative() == 0);
  CHECK(output_errors().mean_relative() == 0);
  CHECK(output_errors().worst_relative() == 0);
}
