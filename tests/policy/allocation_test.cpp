// SPDX-License-Identifier: Apache-2.0
// `select` allocates nothing. Counted are operator new and, through its own hook, Eigen's aligned memory.

// Before any Eigen header: its allocations assert while they are forbidden, and its assertions stay on.
void eigen_assertion_failed();
#define EIGEN_RUNTIME_NO_MALLOC
#define eigen_assert(condition) ((condition) ? void() : eigen_assertion_failed())

#include "policy/selection_support.hpp"
#include "support/layer_metric.cpp"  // here, so that all of the program's Eigen is compiled with the hook

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/compact.hpp>

#include <atomic>
#include <cstdlib>
#include <new>

namespace {

std::atomic<bool> counting{false};
std::atomic<int> allocations{0};

void* allocate_or_null(std::size_t bytes, std::size_t alignment) noexcept {
  if (counting) ++allocations;
  return std::aligned_alloc(alignment, (std::max<std::size_t>(bytes, 1) + alignment - 1) / alignment * alignment);
}

void* allocate(std::size_t bytes, std::size_t alignment) {
  void* const memory = allocate_or_null(bytes, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void eigen_assertion_failed() {
  if (!counting) std::abort();
  ++allocations;
}

// Not inlined: GCC would take the malloc and free inside for a pair that does not match.
[[gnu::noinline]] void* operator new(std::size_t bytes) { return allocate(bytes, alignof(std::max_align_t)); }
[[gnu::noinline]] void* operator new[](std::size_t bytes) { return allocate(bytes, alignof(std::max_align_t)); }
[[gnu::noinline]] void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return allocate_or_null(bytes, alignof(std::max_align_t));
}
[[gnu::noinline]] void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept {
  return allocate_or_null(bytes, alignof(std::max_align_t));
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }

using namespace restkv_test;
using restkv::eigen_backend;
using restkv::rest_kv;

namespace {

/// Allocations of any thread while `body` runs.
template <class Body>
int allocations_of(const Body& body) {
  allocations = 0;
  Eigen::internal::set_is_malloc_allowed(false);
  counting = true;
  body();
  counting = false;
  Eigen::internal::set_is_malloc_allowed(true);
  return allocations;
}

}  // namespace

TEST_CASE("the counter counts") {
  std::vector<int> keep;
  CHECK(allocations_of([&] { keep.resize(1000); }) == 1);
  CHECK(allocations_of([] { Eigen::VectorXf(1000).setZero(); }) > 0);
  CHECK(allocations_of([] {}) == 0);
}

TEST_CASE("planning, selecting and compacting allocate nothing") {
  random_engine random(1);
  for (const int threads : {1, 2}) {
    eigen_backend backend(threads);
    for (int trial = 0; trial < 120; ++trial) {
      layer_recipe recipe = random_recipe(random, 200);
      recipe.query_rows = 16;
      const random_layer<float> layer(random, recipe);
      auto policy = random_policy<rest_kv>(random);
      policy.score.order = chance(random, 50) ? restkv::query_order::before : restkv::query_order::after;
      policy.score.metric_of_distance = chance(random, 70) ? restkv::metric::projection : restkv::metric::identity;
      CAPTURE(trial, threads);

      restkv::plan<any_policy<rest_kv>> plan;
      status outcome;
      const auto shape = restkv::shape_of(layer.view());
      CHECK(allocations_of([&] { outcome = restkv::make_plan(backend, policy, shape, plan); }) == 0);
      if (!outcome.ok()) continue;
      guarded_workspace memory(random, plan.workspace_bytes);
      details_memory<float> details(plan);
      kept_tokens kept;
      CHECK(allocations_of([&] { outcome = restkv::select(backend, plan, layer.view(), memory.space(), kept); }) == 0);
      CHECK(allocations_of([&] {
              outcome = restkv::select(backend, plan, layer.view(), memory.space(), kept, &details.view);
            }) == 0);
      if (!outcome.ok() || policy.group == restkv::group_reduce::none) continue;
      CHECK(allocations_of([&] {
              outcome = restkv::compact_in_place(kept, layer.key.view(), layer.value.view(),
                                                 restkv::backend_loop{backend});
            }) == 0);
      CHECK(outcome.ok());
    }
  }
}

TEST_CASE("a failing selection allocates nothing either") {
  random_engine random(2);
  eigen_backend backend(2);
  const random_layer<float> layer(random, {});
  auto policy = random_policy<rest_kv>(random);
  policy.window = 8;
  policy.budget.choice = restkv::uniform{40};
  const auto plan = restkv::make_plan(backend, policy, restkv::shape_of(layer.view()));
  kept_tokens kept;
  status outcome;
  CHECK(allocations_of([&] {
          outcome = restkv::select(backend, plan, layer.view(), restkv::workspace(nullptr, 0), kept);
        }) == 0);
  CHECK_FALSE(outcome.ok());
}
