// SPDX-License-Identifier: Apache-2.0
// The production backend against the reference, and kernels that select: what is kept.
#include "support/catch.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/verify/parity/selection.hpp>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

using namespace restkv;
using parity::problem;

namespace {

using snap_policy = eviction_policy<snap_kv, mean, average_pool, uniform>;

/// A backend whose scores are wrong for the last token of the past.
class wrong_backend : public eigen_backend {
 public:
  using eigen_backend::eigen_backend;
  template <class Request, element T>
  status token_scores(const Request& request, const layer_view<T>& layer, scratch<Request>& scratch,
                      tensor_view<float, 3> out) {
    RESTKV_RETURN_IF_FAILED(eigen_backend::token_scores(request, layer, scratch, out));
    for (index_t b = 0; b < request.shape.batch; ++b) {
      for (index_t h = 0; h < request.heads(); ++h) {
        const index_t past = request.past_of(sequence(layer, b, 0).length);
        if (past > 40) out(b, h, past - 1) = 0;
      }
    }
    return {};
  }
};

enum class fault { none, one_less, negative, first_tokens };

/// What the production backend keeps, handed through memory of the kernel's, and damaged on the way.
struct selection_kernel {
  fault what = fault::none;

  template <class Policy>
  status operator()(const parity::selection_call<half, Policy>& call) const {
    eigen_backend backend(1);
    plan<Policy> made;
    RESTKV_RETURN_IF_FAILED(make_plan(backend, call.made.policy, call.made.shape, made));
    std::vector<std::byte> memory(made.workspace_bytes);
    kept_tokens kept;
    RESTKV_RETURN_IF_FAILED(select(backend, made, call.layer, workspace(memory), kept));
    for (index_t b = 0; b < kept.batch(); ++b) {
      const index_t begin = sequence(call.layer, b, 0).begin;
      for (index_t h = 0; h < kept.heads(); ++h) {
        const index_t length = kept.lengths(b, h);
        const index_t chosen = std::max<index_t>(0, length - call.made.policy.recent());
        call.kept.lengths(b, h) = static_cast<position_t>(length - (what == fault::one_less && length > 7 ? 1 : 0));
        for (index_t i = 0; i < length; ++i) {
          const bool is_first = what == fault::first_tokens && i < chosen;
          call.kept.positions(b, h, i) = is_first ? static_cast<position_t>(begin + i) : kept.positions(b, h, i);
          if (what == fault::negative && i == 0) call.kept.positions(b, h, 0) = -1;
        }
      }
    }
    return {};
  }
};

}  // namespace

TEST_CASE("the production backend keeps what the reference keeps") {
  reference_backend reference;
  eigen_backend eigen(2);
  const auto report =
      parity::compare_selection<float>(reference, eigen, eviction_policy<>{.window = 16}, {.cases = 120});
  INFO(report.text());
  CHECK(report.ok());
  CHECK(report.values_compared > 20000);
  CHECK(report.counts.sets_compared > 300);
  CHECK(report.counts.largest_part < 0.5);
  const auto in_half = parity::compare_selection<half>(reference, eigen, snap_policy{.window = 16}, {.cases = 80});
  INFO(in_half.text());
  CHECK(in_half.ok());
}

TEST_CASE("a backend with a wrong score is found") {
  reference_backend reference;
  wrong_backend wrong(1);
  const auto report = parity::compare_selection<half>(reference, wrong, snap_policy{.window = 16}, {.cases = 80});
  INFO(report.text());
  REQUIRE(report.smallest);
  CHECK(report.smallest->tokens <= 43);
  CHECK(report.smallest->head_dim == 1);
  CHECK(std::string(report.text()).find("score of token 40 of 41") != std::string::npos);
}

TEST_CASE("kernels that select, right and wrong") {
  reference_backend reference;
  const auto check = [&](fault what) {
    return parity::compare_selection<half>(reference, selection_kernel{what}, snap_policy{.window = 4}, {.cases = 80});
  };
  const auto right = check(fault::none);
  INFO(right.text());
  CHECK(right.ok());
  CHECK(right.counts.sets_compared > 100);
  const std::pair<fault, const char*> faults[] = {{fault::one_less, "tokens instead of"},
                                                  {fault::negative, "kept position -1"},
                                                  {fault::first_tokens, "is kept instead"}};
  for (const auto& [what, words] : faults) {
    const auto report = check(what);
    INFO(report.text());
    REQUIRE(report.smallest);
    CHECK(report.smallest->tokens < 40);
    CHECK(report.smallest->batch == 1);
    CHECK(report.smallest->kv_heads == 1);
    CHECK(std::string(report.text()).find(words) != std::string::npos);
  }
}
