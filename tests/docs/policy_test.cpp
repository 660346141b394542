// SPDX-License-Identifier: Apache-2.0
// The snippets of docs/policy-authors.md, compiled and run.
#include "support/arranged_layer.hpp"
#include "support/catch.hpp"

#include <restkv/presets.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/runtime_parts.hpp>
#include <restkv/select.hpp>
#include <restkv/smoothing/key_links.hpp>
#include <restkv/smoothing/segment_pool.hpp>

#include <algorithm>
#include <array>
#include <vector>

using restkv::index_t;

//! [score]
/// Attention times the norm of the value it brings.
struct attention_times_value {
  static constexpr restkv::feature needs = restkv::feature::attention | restkv::feature::value_norm;

  template <std::floating_point Real>
  Real operator()(const restkv::token_features<Real>& token) const noexcept {
    return token.attention * token.value_norm;
  }
};
//! [score]

//! [optional_members]
/// The squared change of the layer's output when a token is deleted, for each query; then the smoothing.
struct squared_deletion {
  restkv::query_order order = restkv::query_order::before;
  restkv::metric metric_of_distance = restkv::metric::projection;
  float most_odds = 1e6f;

  static constexpr restkv::feature needs = restkv::feature::odds | restkv::feature::distance;
  static constexpr bool monotone_in_distance = true;  // so that certified pruning may act

  template <std::floating_point Real>
  Real operator()(const restkv::token_features<Real>& token) const noexcept {
    const Real change = std::min(token.odds, static_cast<Real>(most_odds)) * token.distance;
    return change * change;
  }

  restkv::status check() const noexcept {
    if (!(most_odds > 0)) {
      return restkv::status::error(restkv::errc::invalid_argument, "squared_deletion.most_odds is %g, must be above 0",
                                   static_cast<double>(most_odds));
    }
    return {};
  }
};
//! [optional_members]

//! [temporal]
/// The mean over the newer half of the window's queries: a weighted sum.
struct newer_half {
  static constexpr bool monotone = true;

  double weight(int i, int count) const noexcept {
    const int newer = count - count / 2;
    return i < count / 2 ? 0.0 : 1.0 / newer;
  }
  template <std::floating_point Real>
  Real operator()(std::span<const Real> rows) const noexcept {
    Real sum = 0;
    const int count = static_cast<int>(rows.size());
    for (int i = 0; i < count; ++i) sum += static_cast<Real>(weight(i, count)) * rows[static_cast<std::size_t>(i)];
    return sum;
  }
};
//! [temporal]

//! [spatial]
/// Every token of a chunk gets the chunk's largest score, so that chunks live or die as a whole.
struct whole_chunks {
  index_t tokens = 16;

  template <std::floating_point Real>
  void operator()(std::span<const Real> in, std::span<Real> out, const restkv::row_context&) const noexcept {
    const auto length = static_cast<index_t>(in.size());
    for (index_t begin = 0; begin < length; begin += tokens) {
      const auto chunk = in.subspan(static_cast<std::size_t>(begin),
                                    static_cast<std::size_t>(std::min(tokens, length - begin)));
      std::fill_n(out.begin() + begin, chunk.size(), *std::max_element(chunk.begin(), chunk.end()));
    }
  }
};
//! [spatial]

//! [head_score]
/// How far a key lies from the first one: what the prompt begins with is not kept twice.
struct unlike_the_first {
  static constexpr restkv::cache_part reads = restkv::cache_part::keys;

  index_t scratch_size(const restkv::problem_shape& shape) const noexcept { return 2 * shape.head_dim; }

  template <restkv::element T, std::floating_point Real>
  void score_head(const restkv::head_view<T>& head, std::span<Real> scores, std::span<Real> scratch) const noexcept {
    const auto channels = static_cast<std::size_t>(head.head_dim());
    const std::span<Real> first = scratch.first(channels), key = scratch.subspan(channels, channels);
    for (index_t n = 0; n < head.length(); ++n) {
      head.key(n, n == 0 ? first : key);
      Real sum = 0;
      for (std::size_t c = 0; c < channels && n > 0; ++c) sum += (key[c] - first[c]) * (key[c] - first[c]);
      scores[static_cast<std::size_t>(n)] = sum;
    }
  }
};
//! [head_score]

//! [rescorer]
/// Scores above `limit` times the row's mean count as that: no single token may shape the neighbourhood of a choice.
struct limited {
  float limit = 100.0f;

  template <restkv::element T, std::floating_point Real>
  void rescore(const restkv::head_view<T>&, const restkv::rescoring_context<Real>&, std::span<Real> scores,
               std::span<Real>) const noexcept {
    double sum = 0;
    for (const Real score : scores) sum += static_cast<double>(score);
    const auto most = static_cast<Real>(static_cast<double>(limit) * sum / static_cast<double>(scores.size()));
    for (Real& score : scores) score = std::min(score, most);
  }
};
//! [rescorer]

//! [budget]
/// Heads get fixed parts of the layer's budget, measured beforehand: retrieval heads more, local heads less.
struct fixed_parts {
  index_t tokens = 1024;        ///< mean over the heads, protected ones included
  std::array<double, 2> parts;  ///< of each KV head; they add up to 1

  index_t tokens_per_head(const restkv::budget_problem& problem) const noexcept {
    return std::min(tokens, problem.length);
  }
  index_t most_per_head(const restkv::budget_problem& problem) const noexcept { return problem.length; }

  template <std::unsigned_integral Key>
  void allocate(const restkv::budget_problem& problem, restkv::tensor_view<const Key, 2>, std::span<index_t> counts,
                std::span<double> scratch) const noexcept {
    const index_t total = problem.heads * restkv::chosen_per_head(*this, problem);
    for (std::size_t h = 0; h < counts.size(); ++h) scratch[h] = parts[h % parts.size()] * static_cast<double>(total);
    restkv::round_to_total(
        scratch, total, [&](std::size_t h) { return problem.candidates_of(static_cast<index_t>(h)); }, counts);
  }
};
//! [budget]

namespace {

restkv_test::arranged_layer<float> some_layer() {
  return restkv_test::arranged_layer<float>({.query_heads = 4, .kv_heads = 2, .head_dim = 8, .tokens = 160});
}

}  // namespace

TEST_CASE("a policy of custom parts", "[docs]") {
  const auto made = some_layer();
  const restkv::layer_view<float> layer = made.view();

  //! [compose]
  const auto policy = restkv::eviction_policy{.score = attention_times_value{},
                                              .temporal = newer_half{},
                                              .spatial = whole_chunks{.tokens = 16},
                                              .group = restkv::group_reduce::max,
                                              .budget = fixed_parts{.tokens = 64, .parts = {0.75, 0.25}},
                                              .protect = {.sink = 4, .recent = 32}};
  restkv::reference_backend backend;
  const restkv::owned_selection chosen = restkv::select(backend, policy, layer);
  //! [compose]

  const auto& kept = chosen.kept();
  CHECK(kept.lengths(0, 0) == 36 + 42);
  CHECK(kept.lengths(0, 1) == 36 + 14);
  CHECK(kept.total() == 2 * 64);
}

TEST_CASE("a score of whole heads, a rescorer, pages that heads share", "[docs]") {
  const auto made = some_layer();
  const restkv::layer_view<float> layer = made.view();
  restkv::reference_backend backend;

  //! [whole_heads]
  const auto policy = restkv::eviction_policy{.score = unlike_the_first{},
                                              .spatial = restkv::no_pool{},
                                              .group = restkv::group_reduce::mean,
                                              .rescoring = limited{.limit = 10},
                                              .budget = restkv::uniform{80},
                                              .protect = {.sink = 4, .recent = 16},
                                              .granularity = {.tokens = 16, .shared = true}};
  const restkv::owned_selection chosen = restkv::select(backend, policy, layer);
  //! [whole_heads]

  const auto& kept = chosen.kept();
  CHECK(kept.lengths(0, 0) == 80);  // five pages of 16: the first, the last, and three that were chosen
  for (index_t slot = 0; slot < kept.lengths(0, 0); ++slot) {
    CHECK(kept.positions(0, 0, slot) == kept.positions(0, 1, slot));
    CHECK(kept.positions(0, 0, slot) % 16 == slot % 16);
  }
}

TEST_CASE("a score with optional members", "[docs]") {
  CHECK(restkv::needs_metric(squared_deletion{}));
  CHECK(restkv::monotone_in_distance<squared_deletion>());
  CHECK(squared_deletion{}.check().ok());
  CHECK(std::string(squared_deletion{.most_odds = -1}.check().message()).find("-1") != std::string::npos);
  auto made = some_layer();
  auto layer = made.view();
  restkv::reference_backend backend;
  auto policy = restkv::eviction_policy{.score = squared_deletion{.metric_of_distance = restkv::metric::identity},
                                        .budget = restkv::uniform{50}};
  const auto chosen = restkv::select(backend, policy, layer);
  CHECK(chosen.kept().total() == 2 * 50);
}

TEST_CASE("presets are values to change", "[docs]") {
  //! [preset]
  auto policy = restkv::presets::snap_kv(512);
  policy.window = 64;
  policy.spatial.width = 7;
  policy.protect.sink = 4;
  //! [preset]
  CHECK(policy.recent() == 64);
  CHECK(policy.check().ok());
}

TEST_CASE("segments found by the keys of all layers", "[docs]") {
  const auto first = some_layer();
  const auto second = some_layer();
  const std::array<restkv::layer_view<float>, 2> layers{first.view(), second.view()};
  restkv::reference_backend backend;

  //! [segments]
  const index_t batch = layers[0].key.extent(0), tokens = layers[0].key.extent(2);
  std::vector<double> links(static_cast<std::size_t>(batch * tokens)), scratch(links.size());
  for (const auto& layer : layers) {
    restkv::throw_if_failed(restkv::add_key_links(layer, {links.data(), {batch, tokens}}, scratch));
  }
  std::vector<std::uint8_t> begins(links.size());
  restkv::throw_if_failed(restkv::find_segments({links.data(), {batch, tokens}}, {},
                                                {begins.data(), {batch, tokens}}, scratch, 0.05));
  const auto policy = restkv::eviction_policy{.score = restkv::snap_kv{},
                                              .spatial = restkv::segment_pool{{begins.data(), {batch, tokens}}},
                                              .budget = restkv::ada_kv{.budget = 64}};
  const restkv::owned_selection chosen = restkv::select(backend, policy, layers[0]);
  //! [segments]

  CHECK(std::count(begins.begin(), begins.end(), 1) == 1 + 7);  // floor(0.05 * 159) links are cut
  CHECK(chosen.kept().total() == 2 * 64);
}

TEST_CASE("looking at the scores", "[docs]") {
  const auto made = some_layer();
  const restkv::layer_view<float> layer = made.view();
  restkv::reference_backend backend;
  const auto policy = restkv::presets::snap_kv(64);

  //! [details]
  const auto plan = restkv::make_plan(backend, policy, restkv::shape_of(layer));
  const auto [batch, heads, tokens] = std::array{plan.shape.batch, plan.heads, plan.shape.tokens};
  const auto count = static_cast<std::size_t>(batch * heads * tokens);
  std::vector<double> score(count), smoothed(count), drift(static_cast<std::size_t>(batch * heads));
  const restkv::selection_details<double> details{{score.data(), {batch, heads, tokens}},
                                                  {smoothed.data(), {batch, heads, tokens}},
                                                  {drift.data(), {batch, heads}}};
  std::vector<std::byte> memory(plan.workspace_bytes);
  restkv::kept_tokens kept;
  restkv::throw_if_failed(restkv::select(backend, plan, layer, restkv::workspace(memory), kept, &details));
  //! [details]

  // Everything chosen by its score is at least as good as everything that was not.
  for (index_t h = 0; h < heads; ++h) {
    double worst_kept = 1, best_left = 0;
    index_t slot = 0;
    for (index_t n = 0; n < tokens - 32; ++n) {
      const bool is_kept = slot < kept.lengths(0, h) && kept.positions(0, h, slot) == n;
      if (is_kept) ++slot;
      (is_kept ? worst_kept : best_left) = is_kept ? std::min(worst_kept, details.smoothed(0, h, n))
                                                   : std::max(best_left, details.smoothed(0, h, n));
    }
    CHECK(worst_kept >= best_left);
    CHECK(best_left > 0);
  }
}

TEST_CASE("parts chosen at run time", "[docs]") {
  const auto made = some_layer();
  const restkv::layer_view<float> layer = made.view();
  restkv::reference_backend backend;

  //! [runtime]
  const auto from_settings = [](bool pool, bool adaptive) {
    auto policy = restkv::eviction_policy{.score = restkv::snap_kv{},
                                          .temporal = restkv::any_temporal{restkv::ema{.alpha = 0.3f}},
                                          .spatial = restkv::any_spatial{restkv::no_pool{}},
                                          .budget = restkv::any_budget{restkv::uniform{64}}};
    if (pool) policy.spatial.choice = restkv::average_pool{.width = 7};
    if (adaptive) policy.budget.choice = restkv::ada_kv{.budget = 64};
    return policy;
  };
  //! [runtime]

  for (const bool pool : {false, true}) {
    for (const bool adaptive : {false, true}) {
      const auto chosen = restkv::select(backend, from_settings(pool, adaptive), layer);
      CHECK(chosen.kept().total() == 2 * 64);
    }
  }
}
