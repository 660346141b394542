// SPDX-License-Identifier: Apache-2.0
// The snippets of docs/verification.md about generated problems, compiled and run.
#include "support/catch.hpp"

#include <restkv/verify/parity.hpp>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

using restkv::index_t;
using restkv::position_t;

namespace {

void my_top_k(const float* scores, index_t length, index_t k, position_t* out) {
  std::vector<position_t> order(static_cast<std::size_t>(length));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](position_t a, position_t b) {
    const auto key_a = restkv::order_key(scores[a]);
    const auto key_b = restkv::order_key(scores[b]);
    return key_a != key_b ? key_a > key_b : a < b;
  });
  order.resize(static_cast<std::size_t>(std::min(k, length)));
  std::sort(order.begin(), order.end());
  std::copy(order.begin(), order.end(), out);
}

void my_compaction(const restkv::parity::gather_call<restkv::half>& call) {
  throw_if_failed(
      restkv::gather_tokens(call.kept, restkv::chunked_tensor_view(call.source), restkv::dense_layout{call.out}));
}

/// Stands in for a backend of a user's own.
class my_backend : public restkv::reference_backend {};

}  // namespace

TEST_CASE("documentation of generated problems") {
  bool said = false;
  const auto puts = [&](const char* text) { said = std::strlen(text) > 0; };

  //! [parity_top_k]
  auto report = restkv::parity::compare_top_k(
      [](std::span<const float> scores, index_t k, std::span<position_t> out) {
        my_top_k(scores.data(), static_cast<index_t>(scores.size()), k, out.data());
      },
      {.cases = 200, .seed = 1});
  if (!report) puts(report.text());
  //! [parity_top_k]
  CHECK(report);
  CHECK_FALSE(said);

  //! [parity_gather]
  report = restkv::parity::compare_gather(my_compaction, {.accepts = [](const restkv::parity::problem& p) {
                                            return p.head_dim % 8 == 0 &&  // what the kernel does not claim to do
                                                   p.order != restkv::parity::memory_order::reversed;
                                          }});
  //! [parity_gather]
  INFO(report.text());
  CHECK(report);

  //! [parity_backend]
  const restkv::eviction_policy<restkv::snap_kv, restkv::mean, restkv::max_pool, restkv::uniform> policy{
      .window = 16, .spatial = {.width = 5}};
  restkv::reference_backend reference;
  my_backend mine;
  report = restkv::parity::compare_token_scores<float>(reference, mine, policy, {.cases = 40});  // before pooling
  report = restkv::parity::compare_selection<float>(reference, mine, policy, {.cases = 40});     // what is kept
  //! [parity_backend]
  INFO(report.text());
  CHECK(report);
  CHECK(report.counts.largest_part == 0);

  //! [parity_again]
  report = restkv::parity::compare_top_k(
      [](std::span<const float>, index_t, std::span<position_t> out) { std::fill(out.begin(), out.end(), 0); });
  const auto again = restkv::parity::compare_top_k(
      [](std::span<const float>, index_t, std::span<position_t> out) { std::fill(out.begin(), out.end(), 0); },
      {.only = report.smallest});
  //! [parity_again]
  CHECK(again.difference == report.difference);
  CHECK(report.smallest->tokens == 2);
}
