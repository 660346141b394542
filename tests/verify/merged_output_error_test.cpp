// SPDX-License-Identifier: Apache-2.0
// merged_output_error: the numbers of output_error where nothing was changed, direct attention where something was.
#include "merge/merge_support.hpp"
#include "support/check_error.hpp"

#include <restkv/reference/backend.hpp>
#include <restkv/verify/merged_output_error.hpp>

using namespace restkv_test;
using restkv::errc;

namespace {

/// Changes every entry a little, and fills in the one behind where a head has it.
template <class T>
void disturb(compacted_layer<T>& made, random_engine& random) {
  for (T& x : made.key_memory) x = restkv::narrow<T>(restkv::widen<double>(x) + 0.3 * normal(random));
  for (T& x : made.value_memory) x = restkv::narrow<T>(restkv::widen<double>(x) + 0.3 * normal(random));
}

}  // namespace

TEST_CASE("an unchanged cache costs what output_error says", "[verify][merge]") {
  restkv::reference_backend backend;
  random_engine random(31);
  for (const index_t hidden : {0, 11}) {
    for (const index_t heads : {2, 4}) {
      arranged_layer<float> layer({.batch = 2, .head_dim = 8, .tokens = 30, .queries = 9, .hidden = hidden}, 31);
      layer.pad_to({30, 5}, restkv::padding::right);
      const auto kept = keep_some(random, layer.view(), heads, 40);
      compacted_layer<float> made(layer, kept);
      restkv::merged_output_errors errors;
      REQUIRE(restkv::merged_output_error(backend, made.cache(), made.layer, errors).ok());
      restkv::output_errors expected;
      REQUIRE(restkv::output_error(backend, kept, made.layer, expected).ok());
      CHECK(errors.mean_relative() == Approx(expected.mean_relative()).epsilon(1e-10));
      CHECK(errors.mean_relative() > 0.01);
      REQUIRE(errors.queries() == 9);
      for (index_t b = 0; b < 2; ++b) {
        for (index_t i = 0; i < 9; ++i) {
          CHECK(errors.layer()(b, i) == Approx(expected.layer()(b, i)).margin(1e-10));
          CHECK(errors.layer_output_norm()(b, i) == Approx(expected.layer_output_norm()(b, i)).margin(1e-10));
          for (index_t h = 0; h < 4; ++h) {
            CHECK(errors.head()(b, h, i) == Approx(expected.head()(b, h, i)).margin(1e-10));
            CHECK(errors.head_output_norm()(b, h, i) == Approx(expected.head_output_norm()(b, h, i)).margin(1e-10));
          }
        }
      }
      CHECK(errors.mean_relative(1) == Approx(expected.summary(1).relative).epsilon(1e-9));
    }
  }
}

TEST_CASE("a changed cache costs what attention over its entries says", "[verify][merge]") {
  restkv::reference_backend backend;
  random_engine random(32);
  const arranged_layer<float> layer({.head_dim = 8, .tokens = 25, .queries = 7, .hidden = 10}, 32);
  const auto kept = keep_some(random, layer.view(), 2, 40);
  compacted_layer<float> made(layer, kept);
  disturb(made, random);
  made.lengths[1] = static_cast<position_t>(made.kept.lengths(0, 1) + 1);
  restkv::merged_output_errors errors;
  REQUIRE(restkv::merged_output_error(backend, made.cache(), made.layer, errors, 5).ok());
  const direct_error direct(made, 5);
  CHECK(errors.mean_relative() == Approx(std::sqrt(direct.layer / direct.layer_output)).epsilon(1e-11));
  for (index_t h = 0; h < 4; ++h) {
    for (index_t i = 0; i < 5; ++i) {
      CHECK(errors.head()(0, h, i) ==
            Approx(direct.head_norms[static_cast<std::size_t>(h)][static_cast<std::size_t>(i)]).epsilon(1e-11));
    }
  }
}

TEST_CASE("future queries see the entries and every token that came after", "[verify][merge]") {
  restkv::reference_backend backend;
  random_engine random(33);
  // The whole is cut behind 24 tokens: what is left of it is the future.
  const arranged_layer<float> whole({.head_dim = 8, .tokens = 30, .queries = 6, .hidden = 10}, 33);
  auto prompt = whole.view();
  prompt.key = whole.key.slice(2, 0, 24);
  prompt.value = whole.value.slice(2, 0, 24);
  const restkv::future_view<float> future{whole.query, whole.key.slice(2, 24, 6), whole.value.slice(2, 24, 6)};
  const auto kept = keep_where(1, 2, 24, [](index_t, index_t h, index_t n) { return n % 3 == h; });
  const arranged_layer<float> first({.head_dim = 8, .tokens = 24, .queries = 6, .hidden = 10}, 33);
  compacted_layer<float> made(first, kept);
  REQUIRE(restkv::compact(made.kept, prompt.key, prompt.value, made.key(), made.value()).ok());
  restkv::merged_output_errors errors;
  REQUIRE(restkv::merged_future_error(backend, made.cache(), prompt, future, errors).ok());
  restkv::output_errors expected;
  REQUIRE(restkv::future_error(backend, made.kept, prompt, future, expected).ok());
  CHECK(errors.mean_relative() == Approx(expected.mean_relative()).epsilon(1e-11));
  CHECK(errors.mean_relative() > 0.01);

  // Changed: the same as a cache of the whole whose last entries are the future tokens.
  disturb(made, random);
  made.lengths[0] = static_cast<position_t>(made.kept.lengths(0, 0));
  REQUIRE(restkv::merged_future_error(backend, made.cache(), prompt, future, errors).ok());
  const auto extended = restkv::append_tokens(kept, 24, 6);
  compacted_layer<float> joined(whole, extended);
  for (index_t h = 0; h < 2; ++h) {
    for (index_t n = 0; n < kept.kept().lengths(0, h); ++n) {
      for (index_t c = 0; c < 8; ++c) {
        joined.key().rows(0, h, n, c) = made.key().rows(0, h, n, c);
        joined.value().rows(0, h, n, c) = made.value().rows(0, h, n, c);
      }
    }
  }
  const direct_error direct(joined, 6);
  CHECK(errors.mean_relative() == Approx(std::sqrt(direct.layer / direct.layer_output)).epsilon(1e-11));
}

TEST_CASE("what cannot be verified is named", "[verify][merge]") {
  restkv::reference_backend backend;
  const arranged_layer<float> layer({.head_dim = 8, .tokens = 20, .queries = 6, .hidden = 10}, 34);
  const auto kept = keep_where(1, 2, 20, [](index_t, index_t, index_t n) { return n % 2 == 0; });
  compacted_layer<float> made(layer, kept);
  restkv::merged_output_errors errors;
  check_error(restkv::merged_output_error(backend, made.cache(), made.layer, errors, 7), errc::invalid_argument, {7, 6},
              "queries");
  auto narrow = made.layer;
  narrow.projection.extents[1] = 31;
  check_error(restkv::merged_output_error(backend, made.cache(), narrow, errors), errc::shape_mismatch, {31, 32},
              "W_O");
  auto padded = made.layer;
  const std::vector<std::int32_t> lengths{20};
  padded.lengths = {lengths.data(), {1}};
  restkv::future_view<float> future{layer.query, layer.key.slice(2, 0, 6), layer.value.slice(2, 0, 6)};
  check_error(restkv::merged_future_error(backend, made.cache(), padded, future, errors), errc::unsupported, {1, 20});
  future.query = future.query.slice(2, 0, 5);
  check_error(restkv::merged_future_error(backend, made.cache(), made.layer, future, errors), errc::shape_mismatch,
              {5, 6}, "queries");
  made.lengths[0] = 3;
  check_error(restkv::merged_output_error(backend, made.cache(), made.layer, errors), errc::invalid_argument, {3, 10},
              "entries");
  CHECK(errors.queries() == 0);
}
