// SPDX-License-Identifier: Apache-2.0
// Each allocation of each operation that allocates fails in turn: the operation says so, or throws std::bad_alloc where that
// is documented; what it was to write is as before, and the next call succeeds. Under the address sanitizer nothing leaks.
// Operations that promise not to allocate do not.
#include "support/allocation_counter.hpp"
#include "support/catch.hpp"
#include "support/random_layer.hpp"

#include <restkv/backend/eigen/output_metric.hpp>
#include <restkv/interop/safetensors_writer.hpp>
#include <restkv/model/error_bounded.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/selection/set_error/group_metric.hpp>
#include <restkv/verify/output_error.hpp>

#include <filesystem>

using namespace restkv_test;
using restkv::status;

namespace {

/// Makes each allocation of `run` fail, until there is none left to: run() must throw std::bad_alloc or fail, and after
/// each failure unchanged() hold. Returns how many there were.
template <class Run, class Unchanged>
long fail_each_allocation(const Run& run, const Unchanged& unchanged) {
  for (long failing = 0;; ++failing) {
    status outcome;
    bool threw = false;
    const bool failed = run_with_failing_allocation(failing, [&] {
      try {
        outcome = run();
      } catch (const std::bad_alloc&) {
        threw = true;
      }
    });
    INFO("allocation " << failing << ": " << outcome.message());
    if (!failed) {
      CHECK((outcome.ok() && !threw));
      return failing;
    }
    CHECK((threw || !outcome.ok()));
    CHECK(unchanged());
  }
}

const auto policy =
    restkv::eviction_policy{.score = restkv::snap_kv{}, .window = 4, .budget = restkv::uniform{12}, .protect = {.recent = 4}};

layer_recipe small_layer() {
  layer_recipe recipe;
  recipe.batch = 2;
  recipe.kv_heads = 1;
  recipe.head_dim = 4;
  recipe.tokens = 24;
  recipe.query_rows = 8;
  return recipe;
}

}  // namespace

TEST_CASE("a selection with memory of its own") {
  random_engine random(1);
  const random_layer<float> layer(random, small_layer());
  restkv::reference_backend backend;
  restkv::owned_selection chosen;
  const long allocations = fail_each_allocation([&] { return chosen.run(backend, policy, layer.view()); },
                                                [&] { return chosen.kept().positions.data == nullptr; });
  CHECK(allocations > 0);
  CHECK(chosen.kept().batch() == 2);

  // Its memory is there; a failure afterwards leaves no view of it.
  layer_recipe longer = small_layer();
  longer.tokens = 40;
  const random_layer<float> long_layer(random, longer);
  CHECK_FALSE(run_with_failing_allocation(1000000, [&] { CHECK(chosen.run(backend, policy, layer.view()).ok()); }));
  fail_each_allocation([&] { return chosen.run(backend, policy, long_layer.view()); },
                       [&] { return chosen.kept().positions.data == nullptr; });
  CHECK(chosen.kept().capacity() >= 12);
}

TEST_CASE("the verifier") {
  random_engine random(2);
  const random_layer<float> layer(random, small_layer());
  restkv::reference_backend backend;
  restkv::owned_selection chosen;
  REQUIRE(chosen.run(backend, policy, layer.view()).ok());
  restkv::output_errors errors;
  const long allocations =
      fail_each_allocation([&] { return restkv::output_error(backend, chosen.kept(), layer.view(), errors); },
                           [&] { return errors.batch() == 0 && errors.queries() == 0; });
  CHECK(allocations > 5);
  CHECK(errors.queries() == 8);
}

TEST_CASE("a search for the smallest set within an error") {
  random_engine random(3);
  layer_recipe recipe;
  recipe.tokens = 24;
  recipe.group = 1;
  const random_layer<float> layer(random, recipe);
  const restkv::layer_view<float> view = layer.view();
  restkv::reference_backend backend;
  restkv::error_bounded_selection chosen;
  const long allocations = fail_each_allocation(
      [&] { return chosen.run(backend, policy, std::span(&view, 1), restkv::error_bounded{.bound = 0.2}); },
      [&] { return chosen.layers() == 0; });
  CHECK(allocations > 20);
  CHECK(chosen.layers() == 1);
}

TEST_CASE("metrics of W_O") {
  random_engine random(4);
  const random_layer<float> layer(random, small_layer());
  restkv::output_metric metric;
  CHECK(fail_each_allocation([&] { return metric.build(layer.view().projection, 2, 4); },
                             [&] { return metric.view().missing(); }) > 0);
  CHECK_FALSE(metric.view().missing());
  restkv::group_metric pairs;
  CHECK(fail_each_allocation([&] { return pairs.build(layer.view().projection, 2, 4, 1); },
                             [&] { return pairs.view().missing(); }) > 0);
  CHECK_FALSE(pairs.view().missing());
}

TEST_CASE("safetensors files") {
  random_engine random(5);
  const random_layer<float> layer(random, small_layer());
  const std::string path =
      (std::filesystem::temp_directory_path() / ("restkv_allocations_" + std::to_string(getpid()))).string();

  restkv::safetensors_writer writer;
  std::vector<std::byte> empty = writer.serialise();
  CHECK(fail_each_allocation(
            [&] {
              writer.add("a key with a name too long for a string's own memory", layer.key.view());
              return status();
            },
            [&] { return writer.serialise() == empty; }) > 0);
  writer.set_metadata("a text with a key too long for a string's own memory", "and the text itself is long, too");
  std::vector<std::byte> file;
  CHECK(fail_each_allocation(
            [&] {
              file = writer.serialise();
              return status();
            },
            [&] { return file.empty(); }) > 10);
  CHECK(fail_each_allocation([&] { return writer.write(path); }, [&] { return !std::filesystem::exists(path); }) > 10);

  restkv::safetensors_view view;
  CHECK(fail_each_allocation([&] { return restkv::safetensors_view::parse(file, view); },
                             [&] { return view.entries().empty(); }) > 5);
  REQUIRE(view.entries().size() == 1);
  restkv::safetensors_file opened;
  CHECK(fail_each_allocation([&] { return restkv::safetensors_file::open(path, opened); },
                             [&] { return opened.entries().empty(); }) > 5);
  std::remove(path.c_str());
  const std::string name = view.entries()[0].name;
  std::vector<double> storage;
  restkv::tensor_view<double, 4> keys;
  CHECK(fail_each_allocation([&] { return opened.convert<double>(name, storage, keys); },
                             [&] { return storage.empty() && keys.data == nullptr; }) == 1);
  CHECK(keys.extents == layer.key.view().extents);
}
