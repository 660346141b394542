// SPDX-License-Identifier: Apache-2.0
// The kernels as a backend on the host: its loops, and whole selections against the reference's.
#include "support/catch.hpp"
#include "support/random_layer.hpp"
#include "support/selection_outcome.hpp"

#include <restkv/backend/host/backend.hpp>
#include <restkv/runtime_parts.hpp>
#include <restkv/score/rest_kv.hpp>
#include <restkv/score/snap_kv.hpp>
#include <restkv/select.hpp>

#include <cstring>
#include <numeric>

using namespace restkv;
using namespace restkv_test;

static_assert(tensor_backend<host_kernel_backend>);
static_assert(bulk_backend<host_kernel_backend>);

namespace {

/// The same scores without the primitives that take all rows at once, so that `select` goes row by row.
class by_row_backend {
 public:
  using score_type = float;

  explicit by_row_backend(std::uint64_t seed) : kernels_(seed) {}
  template <class Request>
  struct scratch : host_kernel_backend::scratch<Request> {
    scratch(const by_row_backend& backend, const Request& request, workspace& from)
        : host_kernel_backend::scratch<Request>(backend.kernels_, request, from) {}
  };
  template <class Body>
  void parallel_for(index_t n, const Body& body) const {
    kernels_.parallel_for(n, body);
  }
  template <class Request, element T>
  [[nodiscard]] status token_scores(const Request& request, const layer_view<T>& layer, scratch<Request>& scratch,
                                    tensor_view<float, 3> out) {
    return kernels_.token_scores(request, layer, scratch, out);
  }
  template <class Request, element T>
  [[nodiscard]] status window_drift(const Request& request, const layer_view<T>& layer,
                                    std::span<const index_t> most_attended, scratch<Request>& scratch,
                                    tensor_view<double, 2> out) {
    return kernels_.window_drift(request, layer, most_attended, scratch, out);
  }

 private:
  host_kernel_backend kernels_;
};

template <class Score>
using any_policy = eviction_policy<Score, any_temporal, any_spatial, any_budget>;
static_assert(detail::selects_in_bulk<host_kernel_backend, any_policy<snap_kv>>);
static_assert(tensor_backend<by_row_backend> && !bulk_backend<by_row_backend>);

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

template <class Score>
any_policy<Score> random_policy(random_engine& random, index_t tokens) {
  any_policy<Score> policy{.window = pick(random, 1, 12)};
  if (chance(random, 50)) {
    policy.spatial.choice = max_pool{.width = 7};
  } else if (chance(random, 50)) {
    policy.spatial.choice = adaptive_window{.min_width = 3, .scale = 5.0f};
  }
  policy.group = static_cast<group_reduce>(pick(random, 0, 4));
  policy.protect = {.sink = pick(random, 0, 3), .recent = pick(random, 0, 5)};
  policy.granularity = {.tokens = chance(random, 60) ? 1 : pick(random, 2, 9),
                        .shared = policy.group != group_reduce::none && chance(random, 25)};
  const index_t budget = pick(random, 1, tokens + 10);
  if (chance(random, 40)) {
    policy.budget.choice = uniform{budget};
  } else {
    policy.budget.choice = ada_kv{.budget = budget, .floor = static_cast<float>(pick(random, 0, 4)) / 4.0f};
  }
  return policy;
}

template <class Score, element T>
index_t compare_selections(index_t first, index_t turns) {
  index_t selected = 0;
  for (index_t turn = first; turn < first + turns; ++turn) {
    random_engine random(static_cast<unsigned>(turn + 1));
    layer_recipe recipe;
    recipe.batch = pick(random, 1, 3);
    recipe.tokens = pick(random, 1, 180);
    recipe.query_rows = std::min<index_t>(recipe.tokens, 16);
    recipe.padded = chance(random, 50);
    recipe.pad = chance(random, 50) ? padding::left : padding::right;
    recipe.masked_percent = chance(random, 40) ? 20 : 0;
    recipe.strided = chance(random, 30);
    const random_layer<T> layer(random, recipe);
    const auto policy = random_policy<Score>(random, recipe.tokens);
    const bool with_details = turn % 2 == 0;
    CAPTURE(turn, recipe.batch, recipe.tokens);
    kernel::conflict_recorder recorder;
    const kernel_tuning split{.top_k = {.blocks_to_fill = 1 << 20, .least_keys_of_block = 32}};
    const kernel_tuning whole{.top_k = {.blocks_to_fill = 1}};
    host_kernel_backend in_bulk(kernel::host_executor(static_cast<std::uint64_t>(turn), &recorder),
                                turn % 3 == 0 ? split : whole);
    by_row_backend by_row(99);
    const auto expected = select_tokens(by_row, policy, layer.view(), with_details);
    const auto found = select_tokens(in_bulk, policy, layer.view(), with_details);
    REQUIRE(expected.result.ok() == found.result.ok());
    CHECK(recorder.conflicts().empty());
    if (!expected.result.ok()) continue;
    CHECK(expected.kept == found.kept);
    if (with_details) {
      CHECK(same_bits(expected.score, found.score));
      CHECK(same_bits(expected.smoothed, found.smoothed));
      CHECK(expected.drift == found.drift);
    }
    ++selected;
  }
  return selected;
}

/// An executor whose launches fail from the third on.
class failing_executor {
 public:
  static constexpr memory_space space = memory_space::host;

  template <class Kernel>
  void launch(const Kernel&, index_t) {
    ++launches_;
  }
  [[nodiscard]] status take_status(const char* action) {
    return launches_ < 3 ? status() : status::error(errc::device_failure, "%s: launch %d failed", action, launches_);
  }

 private:
  int launches_ = 0;
};

struct increment {
  int* counts;
  void operator()(index_t i) const noexcept { ++counts[i]; }
};

}  // namespace

TEST_CASE("Loops on kernels run every index once, uploads arrive in pieces", "[kernel]") {
  kernel::conflict_recorder recorder;
  host_kernel_backend backend(7u, &recorder);
  for (const index_t n : {0, 1, 255, 256, 257, 5000}) {
    std::vector<int> counts(static_cast<std::size_t>(n) + 1);
    CHECK(backend.for_each(n, increment{counts.data()}).ok());
    CHECK(std::count(counts.begin(), counts.end() - 1, 1) == n);
    CHECK(counts.back() == 0);

    std::vector<index_t> values(static_cast<std::size_t>(n));
    std::iota(values.begin(), values.end(), index_t{3});
    std::vector<index_t> there(values.size() + 1, -1);
    CHECK(backend.upload(there.data(), std::span<const index_t>(values)).ok());
    CHECK(std::equal(values.begin(), values.end(), there.begin()));
    CHECK(there.back() == -1);
  }
  CHECK(recorder.conflicts().empty());
}

TEST_CASE("A selection on kernels is the one that goes row by row over the same scores", "[kernel]") {
  CHECK(compare_selections<snap_kv, float>(0, 24) > 15);
  CHECK(compare_selections<rest_kv, float>(100, 16) > 10);
}

TEST_CASE("A launch that fails is reported by the call that made it", "[kernel]") {
  kernel_backend<failing_executor> backend;
  int count = 0;
  CHECK(backend.for_each(1, increment{&count}).ok());
  CHECK(backend.for_each(1, increment{&count}).ok());
  const status failed = backend.for_each(1, increment{&count});
  CHECK(failed.code() == errc::device_failure);
  CHECK(std::string(failed.message()) == "a loop: launch 3 failed");
}
