// SPDX-License-Identifier: Apache-2.0
// Every finite input gives finite scores, and the right ones where the definition still says what is right: however
// large the gap between logits, however large or small the numbers.
#include "oracle/deletion_oracle.hpp"
#include "support/catch.hpp"
#include "support/layer_metric.hpp"
#include "support/selection_outcome.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/runtime_parts.hpp>

#include <functional>

using namespace restkv_test;
using namespace restkv;
using oracle::real;

namespace {

constexpr index_t window = 4;
const layer_sizes sizes{.batch = 1,
                        .query_heads = 4,
                        .kv_heads = 2,
                        .head_dim = 16,
                        .tokens = 110,
                        .queries = 6,
                        .hidden = 20,
                        .sharpness = 2.0};
const index_t past = sizes.tokens - window;

template <class Temporal>
using policy_of = eviction_policy<rest_kv, Temporal, no_pool, uniform>;

template <class Temporal>
policy_of<Temporal> make_policy(const rest_kv& score, const Temporal& temporal) {
  return {.score = score,
          .window = window,
          .temporal = temporal,
          .spatial = {},
          .group = group_reduce::none,
          .budget = {30},
          .protect = {.sink = 0, .recent = 0}};
}

/// Replaces every number x of a tensor, in token n and channel c, by change(x, n, c).
template <class T, class Change>
void change_all(const tensor_view<T, 4>& tensor, const Change& change) {
  for (index_t b = 0; b < tensor.extent(0); ++b) {
    for (index_t h = 0; h < tensor.extent(1); ++h) {
      for (index_t n = 0; n < tensor.extent(2); ++n) {
        for (index_t c = 0; c < tensor.extent(3); ++c) {
          T& element = tensor(b, h, n, c);
          element = arranged_layer<T>::element(change(widen<double>(element), n, c));
        }
      }
    }
  }
}

/// Scores that are all finite, and kept sets of the right size that ascend.
template <class Real>
void check_usable(const selection_outcome<Real>& outcome) {
  INFO(outcome.result.message());
  REQUIRE(outcome.result.ok());
  for (index_t h = 0; h < outcome.heads; ++h) {
    index_t finite = 0;
    for (index_t n = 0; n < past; ++n) {
      finite += std::isfinite(outcome.scores_of(0, h)[static_cast<std::size_t>(n)]) ? 1 : 0;
    }
    CHECK(finite == past);
    const auto& kept = outcome.kept_of(0, h);
    CHECK(kept.size() == 30);
    CHECK(std::adjacent_find(kept.begin(), kept.end(), std::greater_equal<>{}) == kept.end());
    CHECK((kept.front() >= 0 && kept.back() == sizes.tokens - 1));
  }
}

template <class T, class Temporal>
void check_usable(const arranged_layer<T>& layer, const Temporal& temporal) {
  reference_backend reference;
  eigen_backend eigen;
  for (const auto order : {query_order::before, query_order::after}) {
    for (const auto how : {metric::identity, metric::projection}) {
      for (const bool normalised : {false, true}) {
        CAPTURE(int(order), int(how), normalised);
        const auto policy = make_policy(
            rest_kv{.order = order, .metric_of_distance = how, .tau = 1.0f, .normalised = normalised}, temporal);
        check_usable(select_tokens(reference, policy, layer.view()));
        check_usable(select_tokens(eigen, policy, layer.view()));
      }
    }
  }
}

/// A large number of a type, and its smallest.
template <class T>
constexpr double large = std::is_same_v<T, half> ? 6e4 : 1e30;
template <class T>
constexpr double smallest = std::is_same_v<T, half>       ? 0x1p-24
                            : std::is_same_v<T, bfloat16> ? 0x1p-133
                                                          : 0x1p-149;

template <class T>
struct extreme {
  const char* name;
  std::function<void(arranged_layer<T>&)> make;
};

template <class T>
std::vector<extreme<T>> extremes() {
  using layer_t = arranged_layer<T>;
  const auto sign = [](double x, index_t, index_t) { return x > 0 ? large<T> : -large<T>; };
  const auto scaled = [](double factor) { return [factor](double x, index_t, index_t) { return x * factor; }; };
  const auto constant = [](double x) { return [x](double, index_t, index_t) { return x; }; };
  const auto channel = [](double, index_t, index_t c) { return 1.0 + 0.5 * static_cast<double>(c); };
  const auto query = [](auto change) { return [=](layer_t& l) { change_all(l.query, change); }; };
  const auto key = [](auto change) { return [=](layer_t& l) { change_all(l.key, change); }; };
  const auto value = [](auto change) { return [=](layer_t& l) { change_all(l.value, change); }; };
  const auto both = [](auto change) {
    return [=](layer_t& l) {
      change_all(l.query, change);
      change_all(l.key, change);
    };
  };
  const auto all = [](auto change) {
    return [=](layer_t& l) {
      for (auto* tensor : {&l.query, &l.key, &l.value}) change_all(*tensor, change);
    };
  };
  return {{"large queries and keys", both(sign)},
          {"large positive queries and keys", both(constant(large<T>))},
          {"large queries", query(scaled(large<T> / 8))},
          {"sharp attention", query(scaled(100))},
          {"large values", value(sign)},
          {"large equal values", value(constant(large<T>))},
          {"everything large", all(sign)},
          {"subnormal values", value(scaled(3 * smallest<T>))},
          {"everything subnormal", all(scaled(3 * smallest<T>))},
          {"zero values", value(constant(0))},
          {"equal values", value(channel)},
          {"equal keys", key(constant(1))},
          {"zero queries", query(constant(0))},
          {"everything zero", all(constant(0))}};
}

/// Makes all queries see token n by `gap` more than the most visible other token, about.
template <class T>
void open_gap(arranged_layer<T>& layer, index_t n, double gap) {
  change_all(layer.key, [n](double x, index_t m, index_t c) { return c > 0 ? x : m == n ? 16.0 : 0.0; });
  change_all(layer.query, [gap](double x, index_t, index_t c) { return c > 0 ? x : gap / 4.0; });
}

}  // namespace

TEMPLATE_TEST_CASE("finite inputs give finite scores", "", float, half, bfloat16) {
  for (const auto& kind : extremes<TestType>()) {
    INFO(kind.name);
    arranged_layer<TestType> layer(sizes, 3);
    const output_metric metric = attach_metric(layer);
    kind.make(layer);
    check_usable(layer, any_temporal{mean{}});
    check_usable(layer, any_temporal{last{}});
    if constexpr (std::is_same_v<TestType, float>) check_usable(layer, maximum{});
  }
}

TEMPLATE_TEST_CASE("deleting a token that holds all attention does what it does, however far the others are", "", float,
                   half) {
  reference_backend reference;
  eigen_backend eigen;
  for (const double gap : {60.0, 80.0, 100.0, 700.0, 760.0, 2000.0, 60000.0}) {
    for (const index_t target : {index_t{0}, index_t{97}, past}) {
      arranged_layer<TestType> layer(sizes, 11);
      open_gap(layer, target, gap);
      const output_metric metric = attach_metric(layer);
      for (const bool projected : {false, true}) {
        CAPTURE(gap, target, projected);
        const auto policy = make_policy(
            rest_kv{.metric_of_distance = projected ? restkv::metric::projection : restkv::metric::identity},
            any_temporal{mean{}});
        const auto exact = select_tokens(reference, policy, layer.view());
        const auto fast = select_tokens(eigen, policy, layer.view());
        REQUIRE(exact.result.ok());
        REQUIRE(fast.result.ok());
        const oracle::problem p = oracle::problem_of(layer, 0, window, projected);
        for (index_t h = 0; h < 4; ++h) {
          const oracle::scores truth = oracle::deletion_scores(p, h, {});
          const real largest = *std::max_element(truth.score.begin(), truth.score.end());
          real exact_error = 0;
          real fast_error = 0;
          for (std::size_t n = 0; n < truth.score.size(); ++n) {
            const auto keep_worst = [&](real& worst, double score) {
              const real error = std::fabs(static_cast<real>(score) - truth.score[n]);
              worst = error <= worst ? worst : error;
            };
            keep_worst(exact_error, exact.scores_of(0, h)[n]);
            keep_worst(fast_error, double{fast.scores_of(0, h)[n]});
          }
          // A target in the window leaves the past less than the oracle can see.
          const real floor = target < past ? 0.0L : truth.own_error[0];
          CHECK(exact_error <= 1e-10L * largest + floor);
          CHECK(fast_error <= 1e-4L * largest + floor);
          CHECK((largest > 0.1L) == (target < past));
        }
        CHECK(fast.kept == exact.kept);  // the others keep their order, too
        auto grouped = policy;
        grouped.group = group_reduce::l2;
        CHECK(select_tokens(eigen, grouped, layer.view()).kept == select_tokens(reference, grouped, layer.view()).kept);
      }
    }
  }
}

TEST_CASE("tokens without effect score nothing") {
  reference_backend reference;
  eigen_backend eigen;
  arranged_layer<float> layer(sizes, 4);
  const output_metric metric = attach_metric(layer);
  const auto policy = make_policy(rest_kv{}, any_temporal{mean{}});
  const auto largest = [&](auto& backend) {
    const auto outcome = select_tokens(backend, policy, layer.view());
    double most = 0;
    for (index_t h = 0; h < 4; ++h) {
      for (const auto score : outcome.scores_of(0, h).first(static_cast<std::size_t>(past))) {
        most = std::max(most, std::fabs(static_cast<double>(score)));
      }
    }
    // Among equals the first are kept.
    if (most == 0) CHECK(outcome.kept_of(0, 0)[25] == 25);
    return most;
  };
  CHECK(largest(reference) > 0.1);
  // All values the same: the output is that value, whoever is deleted.
  change_all(layer.value, [](double, index_t, index_t c) { return 1.0 + 0.5 * static_cast<double>(c); });
  CHECK(largest(reference) < 1e-13);
  CHECK(largest(eigen) < 1e-5);
  change_all(layer.value, [](double, index_t, index_t) { return 0.0; });
  CHECK(largest(reference) == 0);
  CHECK(largest(eigen) == 0);
}
