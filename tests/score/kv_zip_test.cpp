// SPDX-License-Identifier: Apache-2.0
// Scores by replay: the largest attention of any replayed query, written out; and what the array then selects.
#include "score/head_support.hpp"
#include "support/check_error.hpp"

#include <restkv/reference/backend.hpp>
#include <restkv/score/given_scores.hpp>
#include <restkv/score/kv_zip.hpp>
#include <restkv/select.hpp>

using namespace restkv_test;
using restkv::errc;
using restkv::kv_zip_chunk;

namespace {

/// A prompt, a replay of it and everything KVzip+ wants.
struct zip_case {
  zip_case(random_engine& random, const cache_recipe& recipe, index_t rows)
      : prompt(random, recipe),
        query(random, {recipe.batch, recipe.kv_heads * recipe.group, rows, recipe.head_dim}, {.reversed_axes = true}),
        key(random, {recipe.batch, recipe.kv_heads, rows, recipe.head_dim}, {.reversed_axes = true}),
        value(random, {recipe.batch, recipe.kv_heads, rows, recipe.head_dim}, {}),
        norm(random, {recipe.batch, rows}, {.reversed_axes = true}),
        gram(random, {recipe.kv_heads * recipe.group, recipe.head_dim, recipe.head_dim}, dense),
        factor(random, {recipe.kv_heads * recipe.group, recipe.head_dim, recipe.head_dim},
               {.row_major = true, .gaps = false}),
        spectrum(random, {recipe.kv_heads * recipe.group, recipe.head_dim}, {.row_major = true, .gaps = false}),
        scores(random, {recipe.batch, recipe.kv_heads, recipe.tokens}, {.reversed_axes = true}) {
    for_each(query.view(), [&](float& x) { x = static_cast<float>(1.5 * normal(random)); });
    for_each(key.view(), [&](float& x) { x = static_cast<float>(normal(random)); });
    for_each(value.view(), [&](float& x) { x = static_cast<float>(normal(random)); });
    for_each(norm.view(), [&](float& x) { x = static_cast<float>(uniform_real(random, 0.5, 20)); });
    for_each(spectrum.view(), [&](float& x) { x = 1; });
    // Positive definite, another for each head.
    for (index_t h = 0; h < gram.view().extent(0); ++h) {
      for (index_t r = 0; r < recipe.head_dim; ++r) {
        for (index_t c = 0; c < recipe.head_dim; ++c) {
          gram.view()(h, r, c) = static_cast<double>(h + 1) * (std::cos(static_cast<double>(r - c)) + (r == c ? 1 : 0));
          double entry = gram.view()(h, r, c);
          for (index_t i = 0; i < c; ++i) entry -= static_cast<double>(factor.view()(h, r, i) * factor.view()(h, c, i));
          factor.view()(h, r, c) = static_cast<float>(r < c    ? 0
                                                      : r == c ? std::sqrt(entry)
                                                               : entry / static_cast<double>(factor.view()(h, c, c)));
        }
      }
    }
    prompt.layer.metric = {gram.read(), factor.read(), spectrum.read()};
    for_each(scores.view(), [&](float& x) { x = -7; });
  }

  [[nodiscard]] restkv::kv_zip_replay<float> replay(bool plus) const {
    restkv::kv_zip_replay<float> out{.query = query.read(), .key = key.read()};
    if (plus) {
      out.value = value.read();
      out.hidden_norm = norm.read();
    }
    return out;
  }

  template <class Backend>
  [[nodiscard]] restkv::status run(Backend& backend, const kv_zip_chunk& chunk, bool plus) const {
    std::size_t bytes = 0;
    if (auto outcome = restkv::kv_zip_bytes(backend, prompt.layer, chunk, replay(plus), bytes); !outcome.ok()) {
      return outcome;
    }
    std::vector<std::byte> memory(bytes);
    return restkv::kv_zip(backend, prompt.layer, chunk, replay(plus), scores.view(), restkv::workspace(memory));
  }

  /// Token n's score of one head, by the formula: all logits of each query, then the largest share.
  [[nodiscard]] row wanted(index_t b, index_t kv, index_t begin, index_t count, index_t sinks, bool plus) const {
    const matrix keys = prompt.rows(prompt.key, b, kv);
    const matrix values = prompt.rows(prompt.value, b, kv);
    row largest(static_cast<std::size_t>(count));
    const index_t group = prompt.shape.group();
    for (index_t h = kv * group; h < (kv + 1) * group; ++h) {
      for (index_t t = 0; t < query.view().extent(2); ++t) {
        const auto weight = [&](const row& k) {
          double sum = 0;
          for (std::size_t c = 0; c < k.size(); ++c) {
            sum += k[c] * static_cast<double>(query.view()(b, h, t, static_cast<index_t>(c)));
          }
          return std::exp(sum / std::sqrt(static_cast<double>(k.size())));
        };
        double total = 0;
        for (index_t n = 0; n < sinks; ++n) total += weight(keys[static_cast<std::size_t>(n)]);
        for (index_t n = begin; n < begin + count; ++n) total += weight(keys[static_cast<std::size_t>(n)]);
        for (index_t s = 0; s <= t; ++s) {
          row k;
          for (index_t c = 0; c < key.view().extent(3); ++c) {
            k.push_back(static_cast<double>(key.view()(b, kv, s, c)));
          }
          total += weight(k);
        }
        for (index_t i = 0; i < count; ++i) {
          double share = weight(keys[static_cast<std::size_t>(begin + i)]) / total;
          if (plus) {
            const row& v = values[static_cast<std::size_t>(begin + i)];
            double square = 0;
            for (std::size_t r = 0; r < v.size(); ++r) {
              for (std::size_t c = 0; c < v.size(); ++c) {
                square += v[r] * gram.view()(h, static_cast<index_t>(r), static_cast<index_t>(c)) * v[c];
              }
            }
            share *= std::sqrt(square) / static_cast<double>(norm.view()(b, t));
          }
          largest[static_cast<std::size_t>(i)] = std::max(largest[static_cast<std::size_t>(i)], share);
        }
      }
    }
    return largest;
  }

  static constexpr guarded_tensor<double, 3>::options dense{.row_major = true, .gaps = false};
  random_cache<float> prompt;
  guarded_tensor<float, 4> query, key, value;
  guarded_tensor<float, 2> norm;
  guarded_tensor<double, 3> gram;
  guarded_tensor<float, 3> factor;
  guarded_tensor<float, 2> spectrum;
  guarded_tensor<float, 3> scores;
};

}  // namespace

TEST_CASE("kv_zip: chunk by chunk, each against sinks, chunk and replay") {
  random_engine random(1);
  restkv::reference_backend backend;
  for (const bool plus : {false, true}) {
    for (const index_t rows : {1, 5, 150}) {  // one row, one block, three blocks of which two overlap
      for (const bool padded : {false, true}) {
        CAPTURE(plus, rows, padded);
        cache_recipe recipe{.batch = 2, .head_dim = 4, .tokens = 23, .strided = true, .chunks = 3};
        if (padded) {
          recipe.batch = 3;
          recipe.lengths = {23, 2, 14};
          recipe.pad = rows == 5 ? restkv::padding::right : restkv::padding::left;
        }
        const zip_case test(random, recipe, rows);
        for (const index_t begin : {0, 9, 18}) {
          const auto outcome = test.run(backend, {.begin = begin, .length = 9, .sink = 4}, plus);
          INFO(outcome.message());
          REQUIRE(outcome.ok());
        }
        for (index_t b = 0; b < recipe.batch; ++b) {
          const index_t length = padded ? recipe.lengths[static_cast<std::size_t>(b)] : 23;
          const index_t offset = recipe.pad == restkv::padding::left ? 23 - length : 0;
          for (index_t h = 0; h < 2; ++h) {
            CAPTURE(b, h);
            row want(23, -7.0);  // sinks and padding are not written
            for (const index_t begin : {index_t{4}, index_t{9}, index_t{18}}) {
              const index_t end = std::min(length, begin == 4 ? 9 : begin + 9);
              if (end <= begin) continue;
              const row part = test.wanted(b, h, begin, end - begin, 4, plus);
              std::copy(part.begin(), part.end(), want.begin() + static_cast<std::ptrdiff_t>(offset + begin));
            }
            std::vector<float> got;
            for (index_t n = 0; n < 23; ++n) got.push_back(test.scores.view()(b, h, n));
            check_row(got, want, 1e-7);
          }
        }
      }
    }
  }
}

TEST_CASE("kv_zip's array selects: the best of the prompt by what the replay looked at") {
  random_engine random(2);
  restkv::reference_backend backend;
  const zip_case test(random, {.kv_heads = 1, .head_dim = 4, .tokens = 40}, 12);
  REQUIRE(test.run(backend, {.begin = 0, .length = 40, .sink = 2}, false).ok());
  const auto policy = restkv::eviction_policy{.score = restkv::given_scores<>{test.scores.read()},
                                              .spatial = restkv::no_pool{},
                                              .group = restkv::group_reduce::mean,
                                              .budget = restkv::uniform{10},
                                              .protect = {.sink = 2, .recent = 1}};
  restkv::layer_view<float> layer = test.prompt.layer;
  layer.query = tensor_view<const float, 4>(test.query.view().data, {1, 2, 0, 4});
  const auto chosen = restkv::select(backend, policy, layer);
  const row all = test.wanted(0, 0, 2, 38, 2, false);
  row ranked(all.begin(), all.end() - 1);  // without the protected last one
  std::sort(ranked.rbegin(), ranked.rend());
  std::vector<index_t> wanted{0, 1};
  for (std::size_t i = 0; i + 1 < all.size(); ++i) {
    if (all[i] >= ranked[6]) wanted.push_back(static_cast<index_t>(i) + 2);
  }
  wanted.push_back(39);
  std::vector<index_t> kept;
  for (index_t i = 0; i < chosen.kept().lengths(0, 0); ++i) kept.push_back(chosen.kept().positions(0, 0, i));
  CHECK(kept == wanted);
}

TEST_CASE("scaled_maximum: rows over norms, NaN stays, norms that are none count 0") {
  const std::vector<float> norms{2, 9, 4, 9, 0, 9, -1, 9};
  const restkv::scaled_maximum smoother{norms.data(), 2};
  const std::vector<double> rows{3, 8, 1e9, 1e9};
  CHECK(smoother(std::span<const double>(rows)) == 2);
  CHECK(restkv::scaled_maximum{}(std::span<const double>(rows)) == 1e9);
  const std::vector<float> broken{std::nanf(""), 8};
  CHECK(std::isnan(smoother(std::span<const float>(broken))));
  static_assert(restkv::temporal_smoother<restkv::scaled_maximum>);
}

TEST_CASE("Replays that do not fit are refused, and nothing is written") {
  random_engine random(3);
  restkv::reference_backend backend;
  zip_case test(random, {.batch = 2, .head_dim = 4, .tokens = 23}, 6);
  const kv_zip_chunk chunk{.begin = 4, .length = 9};
  std::vector<std::byte> memory(1 << 20);
  const auto run = [&](const restkv::kv_zip_replay<float>& replay, const kv_zip_chunk& how) {
    return restkv::kv_zip(backend, test.prompt.layer, how, replay, test.scores.view(), restkv::workspace(memory));
  };
  const auto good = test.replay(true);
  check_error(run(good, {.begin = -1, .length = 9}), errc::invalid_argument, {-1, 9}, "chunk");
  auto bad = good;
  bad.query.extents[2] = 0;
  check_error(run(bad, chunk), errc::invalid_argument, {0, 1}, "rows");
  bad = good;
  bad.key.extents[2] = 5;
  check_error(run(bad, chunk), errc::shape_mismatch, {5, 6}, "key");
  bad = good;
  bad.value = {};
  check_error(run(bad, chunk), errc::missing_input, {}, "value");
  bad = good;
  bad.hidden_norm.extents[1] = 4;
  check_error(run(bad, chunk), errc::shape_mismatch, {4, 6}, "hidden_norm");
  bad = good;
  bad.query.extents[1] = 3;
  check_error(run(bad, chunk), errc::shape_mismatch, {3, 2}, "multiple");
  bad = good;
  bad.query.extents[3] = 3;
  check_error(run(bad, chunk), errc::shape_mismatch, {3, 4}, "channels");
  bad = good;
  bad.key.extents[3] = 3;
  check_error(run(bad, chunk), errc::shape_mismatch, {3, 4}, "channels");
  bad = good;
  bad.key.extents[0] = 1;
  check_error(run(bad, chunk), errc::shape_mismatch, {1, 2}, "sequences");
  const auto small = test.scores.view().slice(2, 0, 22);
  check_error(restkv::kv_zip(backend, test.prompt.layer, chunk, good, small, restkv::workspace(memory)),
              errc::shape_mismatch, {22, 23}, "tokens");
  check_error(restkv::kv_zip(backend, test.prompt.layer, chunk, good, test.scores.view(), restkv::workspace()),
              errc::workspace_too_small, {}, "memory");
  std::size_t bytes = 0;
  REQUIRE(restkv::kv_zip_bytes(backend, test.prompt.layer, chunk, good, bytes).ok());
  check_error(restkv::kv_zip(backend, test.prompt.layer, chunk, good, test.scores.view(),
                             restkv::workspace(memory.data(), bytes - 65)),
              errc::workspace_too_small, {static_cast<index_t>(bytes)}, "workspace");
  test.prompt.layer.metric = {};
  check_error(run(good, chunk), errc::missing_input, {}, "metric");
  std::vector<std::int32_t> lengths{3, 99};
  test.prompt.layer.lengths = {lengths.data(), {2}};
  check_error(run(good, chunk), errc::invalid_argument, {1, 99, 23}, "length");
  test.prompt.layer.lengths = {};
  test.prompt.layer.head_lengths = {lengths.data(), {1, 2}};
  check_error(run(good, chunk), errc::unsupported, {}, "lengths");
  for_each(test.scores.view(), [](const float& x) { CHECK(x == -7); });
}
