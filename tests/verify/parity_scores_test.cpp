// SPDX-License-Identifier: Apache-2.0
// A kernel that scores tokens by attention, right and wrong in the usual ways; and the bounds it is held to.
#include "support/catch.hpp"

#include <restkv/smoothing/spatial.hpp>
#include <restkv/verify/parity/token_scores.hpp>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

using namespace restkv;
using parity::problem;

namespace {

enum class fault { none, last_tile, heads, no_scale, strides, no_mask, padding, small_error, oldest_query, overflow };

/// SnapKV's score in float, one query after the other: the mean over the window of softmax(q k / sqrt(d)).
template <class T, class Request>
void score(const parity::score_call<T, Request>& call, fault what) {
  const auto& request = call.request;
  const auto& layer = call.layer;
  const index_t group = request.shape.group();
  const index_t members = request.shape.query_heads / request.heads();
  const bool dense = what == fault::strides;
  const auto keys = layer.key.chunk(0);
  const auto key = dense ? tensor_view<const T, 4>(keys.data, keys.extents) : keys;
  const float scale = what == fault::no_scale ? 1.0f : 1.0f / std::sqrt(static_cast<float>(request.shape.head_dim));
  for (index_t b = 0; b < request.shape.batch; ++b) {
    for (index_t row = 0; row < request.heads(); ++row) {
      sequence_span span = sequence(layer, b, 0);
      if (what == fault::padding) span.begin = 0;
      const index_t window = request.window_of(span.length);
      const index_t past = span.length - window;
      std::vector<float> folded(static_cast<std::size_t>(past));
      for (index_t j = 0; j < members; ++j) {
        const index_t head = row * members + j;
        const index_t kv_head = what == fault::heads ? head % request.shape.kv_heads : head / group;
        const auto queries = window_queries(layer, b, head, window);
        std::vector<float> sum(static_cast<std::size_t>(past));
        for (index_t i = what == fault::oldest_query ? 1 : 0; i < window; ++i) {
          const index_t visible = what == fault::no_mask ? span.length : past + i + 1;
          std::vector<float> logits(static_cast<std::size_t>(visible));
          float largest = -std::numeric_limits<float>::max();
          for (index_t n = 0; n < visible; ++n) {
            float dot = 0;
            for (index_t c = 0; c < request.shape.head_dim; ++c) {
              dot += widen<float>(queries(i, c)) * widen<float>(key(b, kv_head, span.begin + n, c));
            }
            dot = dot != dot
                      ? -std::numeric_limits<float>::max()
                      : std::clamp(dot * scale, -std::numeric_limits<float>::max(), std::numeric_limits<float>::max());
            logits[static_cast<std::size_t>(n)] = dot;
            largest = std::max(largest, dot);
          }
          if (what == fault::overflow) largest = 0;
          float all = 0;
          for (float& logit : logits) all += logit = std::exp(logit - largest);
          for (index_t n = 0; n < past; ++n) {
            sum[static_cast<std::size_t>(n)] += logits[static_cast<std::size_t>(n)] / all / static_cast<float>(window);
          }
        }
        for (index_t n = 0; n < past; ++n) {
          const auto at = static_cast<std::size_t>(n);
          folded[at] = group_fold(request.group, folded[at], sum[at], j == 0);
        }
      }
      for (index_t n = 0; n < past; ++n) {
        if (what == fault::last_tile && n >= past / 32 * 32 && past > 32) continue;
        float result = group_finish(request.group, folded[static_cast<std::size_t>(n)], members);
        if (what == fault::small_error && n == 17) result *= 1.001f;
        call.scores(b, row, n) = result;
      }
    }
  }
}

using policy_t = eviction_policy<snap_kv, mean, no_pool, uniform>;
const policy_t policy{.score = {}, .window = 8, .group = group_reduce::mean};

parity::report check(fault what, index_t cases = 80, bool strides = true) {
  reference_backend reference;
  return parity::compare_token_scores<float>(reference, [what](const auto& call) { score(call, what); }, policy,
                                             {.cases = cases, .accepts = [=](const problem& p) {
                                                return p.order == parity::memory_order::heads_tokens ||
                                                       (strides && p.order != parity::memory_order::reversed);
                                              }});
}

void check_found(const parity::report& report, index_t most_tokens, const char* words) {
  INFO(report.text());
  REQUIRE_FALSE(report.ok());
  REQUIRE(report.smallest);
  CHECK(report.smallest->tokens <= most_tokens);
  CHECK(report.smallest->batch == 1);
  CHECK(std::string(report.text()).find(words) != std::string::npos);
}

}  // namespace

TEST_CASE("a right kernel of token scores passes, in float and half") {
  const auto report = check(fault::none, 120);
  INFO(report.text());
  CHECK(report.ok());
  CHECK(report.values_compared > 10000);
  CHECK(report.counts.values_unbounded < report.values_compared / 2);
  reference_backend reference;
  const auto usual = parity::compare_token_scores<float>(
      reference, [](const auto& call) { score(call, fault::none); }, policy,
      {.cases = 30, .accepts = [](const problem& p) { return p.values == parity::distribution::normal; }});
  INFO(usual.text());
  CHECK(usual.ok());
  CHECK(usual.cases == 30);
  CHECK(usual.counts.values_unbounded == 0);
  CHECK(usual.counts.largest_part < 0.5);
  CHECK(usual.counts.largest_part > 1e-2);  // a bound that is never approached would say little
  const auto in_half = parity::compare_token_scores<half>(reference, [](const auto& call) { score(call, fault::none); },
                                                          policy, {.cases = 30});
  INFO(in_half.text());
  CHECK(in_half.ok());
}

TEST_CASE("usual mistakes are found, shown on a small problem, and named") {
  check_found(check(fault::no_scale), 3, "without the division of q k by sqrt(head_dim)");
  check_found(check(fault::heads), 3, "query head h reads KV head h % kv_heads");
  check_found(check(fault::last_tile), 36, "are not written");
  check_found(check(fault::strides), 4, "strides are ignored");
}

TEST_CASE("mistakes without a name are found, too") {
  check_found(check(fault::no_mask), 4, "rounding allows");
  check_found(check(fault::padding), 12, "rounding allows");
  check_found(check(fault::oldest_query), 3, "rounding allows");
  check_found(check(fault::overflow), 4, "rounding allows");
  check_found(check(fault::small_error), 20, "score of token 17");
}

TEST_CASE("a kernel may say that it cannot, where the reference cannot, and only there") {
  reference_backend reference;
  const auto report = parity::compare_token_scores<float>(reference,
                                                          [](const auto& call) -> status {
                                                            if (call.request.shape.head_dim % 8 != 0)
                                                              return status::error(errc::unsupported,
                                                                                   "head_dim must be a multiple of 8");
                                                            score(call, fault::none);
                                                            return {};
                                                          },
                                                          policy, {.cases = 40});
  check_found(report, 0, "refused: head_dim must be a multiple of 8");
}

TEST_CASE("bounds know the arithmetic") {
  // What a kernel loses that multiplies in bfloat16 passes with the roundoff of bfloat16, and does not with float's.
  const auto rough = [](const auto& call) {
    score(call, fault::none);
    for (index_t i = 0; i < call.scores.size(); ++i) {
      call.scores.data[i] = widen<float>(narrow<bfloat16>(call.scores.data[i]));
    }
  };
  reference_backend reference;
  CHECK_FALSE(parity::compare_token_scores<float>(reference, rough, policy, {.cases = 20}));
  const auto report =
      parity::compare_token_scores<float>(reference, rough, policy, {.cases = 60, .unit_roundoff = 0x1p-8});
  INFO(report.text());
  CHECK(report.ok());
}

TEST_CASE("bounds of attention hold, and are as sharp as rounding is") {
  const problem p{.seed = 3, .kv_heads = 1, .group = 1, .head_dim = 64, .tokens = 200, .window = 4};
  const parity::layer_data<float> data(p);
  const auto a = parity::bound_attention(data.view(), 0, 0, 4, 1, {}, {});
  double largest = 0;
  for (std::size_t n = 0; n < a.row.logit.size(); ++n) {
    CHECK(a.logit_error[n] > 0);
    CHECK(a.logit_error[n] < 1e-4);
    CHECK(a.share_error[n] >= 0x1p-126);
    largest = std::max(largest, a.share_error[n] / a.row.share[n]);
  }
  CHECK(largest < 5e-4);
  // One token with nearly all of the attention: its odds are known as well as the others' shares.
  problem sharp = p;
  sharp.values = parity::distribution::dominant_token;
  const parity::layer_data<float> one(sharp);
  const auto b = parity::bound_attention(one.view(), 0, 0, 4, 1, {}, {});
  CHECK(b.row.top == 0);
  CHECK(b.row.top_rest < 1e-6);
  CHECK(b.odds_error[0] < 1e-3);
  CHECK(b.top_rest_error < 1e-3 * b.row.top_rest);
}
