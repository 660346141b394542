// SPDX-License-Identifier: Apache-2.0
// Kernels for selection and compaction, right and wrong in the usual ways: the wrong ones must be found, and shown on a
// small problem.
#include "support/catch.hpp"

#include <restkv/selection/top_k.hpp>
#include <restkv/verify/parity/gather.hpp>
#include <restkv/verify/parity/top_k.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <numeric>
#include <string>

using namespace restkv;
using parity::distribution;
using parity::problem;

namespace {

using scores_t = std::span<const float>;
using slots_t = std::span<position_t>;

/// The library's own.
void right_top_k(scores_t scores, index_t k, slots_t out) {
  std::vector<std::uint32_t> keys;
  for (const float score : scores) keys.push_back(order_key(score));
  top_k<std::uint32_t>(keys, k, out.data());
}

/// By sorting, with an order of the test's.
template <class Before>
void sorted_top_k(scores_t scores, index_t k, slots_t out, const Before& before) {
  std::vector<position_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](position_t a, position_t b) {
    return before(a, b) || (!before(b, a) && a < b);
  });
  const index_t count = std::min<index_t>(k, static_cast<index_t>(scores.size()));
  std::copy_n(order.begin(), count, out.begin());
  std::sort(out.begin(), out.begin() + count);
}

auto key_of(scores_t scores) {
  return [scores](position_t n) { return order_key(scores[static_cast<std::size_t>(n)]); };
}

bool says(const parity::report& report, const char* words) {
  return std::string(report.text()).find(words) != std::string::npos;
}

/// Found, made small, and told.
void check_found(const parity::report& report, index_t most_tokens, const char* words) {
  INFO(report.text());
  REQUIRE_FALSE(report.ok());
  CHECK_FALSE(static_cast<bool>(report));
  REQUIRE(report.smallest);
  REQUIRE(report.first);
  CHECK(report.smallest->tokens <= most_tokens);
  CHECK(report.smallest->tokens <= report.first->tokens);
  CHECK(report.smallest->batch == 1);
  CHECK(says(report, words));
  CHECK(says(report, to_string(*report.smallest).c_str()));
}

}  // namespace

TEST_CASE("a problem prints as the expression that makes it") {
  CHECK(to_string(problem{}) == "restkv::parity::problem{.seed = 1}");
  CHECK(to_string(problem{.seed = 7,
                          .batch = 2,
                          .tokens = 65,
                          .type = parity::element_type::float16,
                          .values = distribution::five_values,
                          .order = parity::memory_order::gaps,
                          .lengths = parity::sequence_lengths::left_padded}) ==
        "restkv::parity::problem{.seed = 7, .batch = 2, .tokens = 65, .type = restkv::parity::element_type::float16, "
        ".values = restkv::parity::distribution::five_values, .order = restkv::parity::memory_order::gaps, "
        ".lengths = restkv::parity::sequence_lengths::left_padded}");
}

TEST_CASE("a right top-k passes, and what was compared is counted") {
  const auto report = parity::compare_top_k(right_top_k, {.cases = 300});
  INFO(report.text());
  CHECK(report.ok());
  CHECK(report.cases == 300);
  CHECK(report.counts.sets_compared > 300);
  CHECK(says(report, "no difference (300 cases"));
}

TEST_CASE("problems reach the sizes, numbers and arrangements that break kernels") {
  index_t empty = 0, below = 0, equal = 0, above = 0, behind_tile = 0, padded = 0, gaps = 0;
  std::array<index_t, 8> values{};
  const auto look = [&](const problem& p) {
    empty += p.tokens == 0;
    below += p.tokens == p.k - 1;
    equal += p.tokens == p.k;
    above += p.tokens == p.k + 1;
    behind_tile += p.tokens == 65 || p.tokens == 129 || p.tokens == 257 || p.tokens == 1025;
    padded += p.lengths != parity::sequence_lengths::whole;
    gaps += p.order == parity::memory_order::gaps;
    ++values[static_cast<std::size_t>(p.values)];
    return true;
  };
  CHECK(parity::compare_top_k(right_top_k, {.cases = 400, .accepts = look}));
  for (const index_t count : {empty, below, equal, above, behind_tile, padded, gaps}) CHECK(count > 3);
  for (const index_t count : values) CHECK(count == 50);
}

TEST_CASE("ties to the larger index are found") {
  const auto mine = [](scores_t scores, index_t k, slots_t out) {
    const auto key = key_of(scores);
    sorted_top_k(scores, k, out,
                 [&](position_t a, position_t b) { return key(a) != key(b) ? key(a) > key(b) : a > b; });
  };
  const auto report = parity::compare_top_k(mine);
  check_found(report, 2, "ties go to the smaller index");
  // A kernel that does not promise an order of ties is right.
  const auto lenient = parity::compare_top_k(mine, {}, {.smaller_index = false});
  INFO(lenient.text());
  CHECK(lenient.ok());
  CHECK(lenient.counts.near_ties > 0);
}

TEST_CASE("a NaN that ranks highest is found") {
  const auto report = parity::compare_top_k([](scores_t scores, index_t k, slots_t out) {
    const auto key = [&](position_t n) {
      const float score = scores[static_cast<std::size_t>(n)];
      return score != score ? ~0u : order_key(score);
    };
    sorted_top_k(scores, k, out, [&](position_t a, position_t b) { return key(a) > key(b); });
  });
  check_found(report, 2, "NaN ranks below every number");
}

TEST_CASE("-0 below 0 is found") {
  const auto report = parity::compare_top_k([](scores_t scores, index_t k, slots_t out) {
    const auto key = [&](position_t n) {
      const float score = scores[static_cast<std::size_t>(n)];
      const auto bits = std::bit_cast<std::uint32_t>(score);
      return score != score ? 0u : (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
    };
    sorted_top_k(scores, k, out, [&](position_t a, position_t b) { return key(a) > key(b); });
  });
  check_found(report, 2, "ties go to the smaller index");
  CHECK((says(report, "-0") || says(report, "(score 0)")));
}

TEST_CASE("a last tile that is not finished is found") {
  // Whole tiles of 64, and what is left without its last score.
  const auto report = parity::compare_top_k([](scores_t scores, index_t k, slots_t out) {
    const bool whole = scores.size() % 64 == 0 || scores.size() < 64;
    right_top_k(scores, k, out);
    if (whole) return;
    const index_t count = std::min<index_t>(k, static_cast<index_t>(scores.size()));
    if (out[static_cast<std::size_t>(count - 1)] == static_cast<position_t>(scores.size()) - 1) {
      right_top_k(scores.first(scores.size() - 1), k, out);
    }
  });
  check_found(report, 66, "the last score of the row was not seen");
  CHECK(report.smallest->tokens >= 65);
  CHECK(report.smallest->k < report.first->k + 1);
}

TEST_CASE("digits that a radix select leaves out are found") {
  const auto report = parity::compare_top_k([](scores_t scores, index_t k, slots_t out) {
    const auto key = [&](position_t n) { return order_key(scores[static_cast<std::size_t>(n)]) >> 8; };
    sorted_top_k(scores, k, out, [&](position_t a, position_t b) { return key(a) > key(b); });
  });
  check_found(report, 4, "is missing");
}

TEST_CASE("indices in another order, or outside, or written elsewhere are found") {
  check_found(parity::compare_top_k([](scores_t scores, index_t k, slots_t out) {
                right_top_k(scores, k, out);
                std::reverse(out.begin(), out.begin() + std::min<index_t>(k, static_cast<index_t>(scores.size())));
              }),
              2, "do not ascend");
  check_found(parity::compare_top_k([](scores_t, index_t, slots_t) {}), 1, "it was not written");
  check_found(parity::compare_top_k([](scores_t scores, index_t k, slots_t out) {
                right_top_k(scores, k, out);
                if (scores.size() > 40) out.data()[out.size()] = 0;
              }),
              41, "outside of the rows");
}

TEST_CASE("a kernel for all rows that takes rows for dense is found, and only then") {
  const auto with_stride = [](bool right) {
    return [right](const parity::top_k_call& call) {
      const index_t tokens = call.scores.extent(1);
      for (index_t r = 0; r < call.scores.extent(0); ++r) {
        const float* const row = call.scores.data + r * (right ? call.scores.stride(0) : tokens);
        right_top_k({row, static_cast<std::size_t>(call.lengths(r))}, call.k,
                    {call.positions[r].data, static_cast<std::size_t>(call.k)});
      }
    };
  };
  CHECK(parity::compare_top_k(with_stride(true)));
  const auto report = parity::compare_top_k(with_stride(false));
  INFO(report.text());
  REQUIRE(report.smallest);
  CHECK(report.smallest->order == parity::memory_order::gaps);
  CHECK(report.smallest->batch == 2);
  CHECK(report.smallest->tokens <= 3);
}

TEST_CASE("what is reported can be run again, and is the same every time") {
  const auto mine = [](scores_t scores, index_t k, slots_t out) {
    const auto key = key_of(scores);
    sorted_top_k(scores, k, out,
                 [&](position_t a, position_t b) { return key(a) != key(b) ? key(a) > key(b) : a > b; });
  };
  const auto first = parity::compare_top_k(mine, {.cases = 60, .seed = 5});
  const auto second = parity::compare_top_k(mine, {.cases = 60, .seed = 5});
  CHECK(std::string(first.text()) == second.text());
  REQUIRE(first.smallest);
  const auto again = parity::compare_top_k(mine, {.only = first.smallest});
  CHECK(again.difference == first.difference);
  CHECK(again.smallest == first.smallest);
  CHECK(again.cases == 1);
  CHECK(parity::compare_top_k(right_top_k, {.only = first.smallest}));
}

TEST_CASE("an implementation is asked for nothing that it does not accept") {
  index_t steps = 0;
  const auto report = parity::compare_top_k(
      [](scores_t scores, index_t, slots_t out) {
        if (scores.size() < 16) FAIL("too small");
        out[0] = -3;
      },
      {.cases = 20,
       .shrink_steps = 30,
       .accepts = [](const problem& p) { return p.tokens >= 16 && p.lengths == parity::sequence_lengths::whole; },
       .progress = [&](index_t) { ++steps; }});
  REQUIRE(report.smallest);
  CHECK(report.smallest->tokens == 16);
  CHECK(report.shrink_steps <= 30);
  CHECK(steps == 1);
  const auto nothing = parity::compare_top_k(right_top_k, {.accepts = [](const problem&) { return false; }});
  CHECK_FALSE(nothing.ok());
  CHECK(says(nothing, "no problem was tried"));
}

namespace {

/// A compaction kernel with faults to choose from.
enum class fault { none, heads, strides, last_channel, behind_length, off_by_one };

template <class T>
void gather(const parity::gather_call<T>& call, fault what) {
  const index_t group = call.kept.heads() / call.source.extent(1);
  const auto source =
      what == fault::strides ? tensor_view<const T, 4>(call.source.data, call.source.extents) : call.source;
  const index_t channels = source.extent(3);
  for (index_t b = 0; b < call.kept.batch(); ++b) {
    for (index_t h = 0; h < call.kept.heads(); ++h) {
      const index_t kv_head = what == fault::heads ? h % source.extent(1) : h / group;
      const index_t end = what == fault::behind_length ? call.kept.capacity() : call.kept.lengths(b, h);
      for (index_t i = 0; i < end; ++i) {
        index_t n = std::max<index_t>(0, i < call.kept.lengths(b, h) ? call.kept.positions(b, h, i) : 0);
        if (what == fault::off_by_one && i == 31) n = std::max<index_t>(0, n - 1);
        for (index_t c = 0; c < channels - (what == fault::last_channel && channels % 4 == 3 ? 1 : 0); ++c) {
          call.out(b, h, i, c) = n < source.extent(2) ? source(b, kv_head, n, c) : T{};
        }
      }
    }
  }
}

parity::report check_gather(fault what) {
  return parity::compare_gather([what](const auto& call) { gather(call, what); }, {.cases = 150});
}

}  // namespace

TEST_CASE("compaction kernels, right and wrong") {
  const auto right = check_gather(fault::none);
  INFO(right.text());
  CHECK(right.ok());
  CHECK(right.values_compared > 100000);
  check_found(check_gather(fault::heads), 2, "KV head 0 (instead of 1)");
  check_found(check_gather(fault::last_channel), 2, "it was not written");
  check_found(check_gather(fault::behind_length), 2, "the slot behind them was written");
  check_found(check_gather(fault::off_by_one), 80, "of slot 31");
}

TEST_CASE("a compaction kernel that ignores strides is found") {
  // Negative strides would make it read outside of the tensor.
  const auto report =
      parity::compare_gather([](const parity::gather_call<half>& call) { gather(call, fault::strides); },
                             {.accepts = [](const problem& p) { return p.order != parity::memory_order::reversed; }});
  check_found(report, 3, "is not that of token");
  CHECK(report.smallest->order != parity::memory_order::heads_tokens);
  CHECK(report.smallest->type == parity::element_type::float16);
}
