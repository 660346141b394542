// SPDX-License-Identifier: Apache-2.0
// What output_error and future_error refuse, and that future_error is output_error of the longer cache.
#include "support/check_error.hpp"
#include "verify/verify_support.hpp"

#include <restkv/reference/backend.hpp>

using namespace restkv;
using namespace restkv_test;

namespace {

reference_backend backend;

const layer_sizes sizes{.batch = 2, .tokens = 30, .queries = 6, .hidden = 10};

owned_kept_tokens keep_every_third(index_t heads = 2) {
  return keep_where(2, heads, 30, [](auto, auto, index_t n) { return n % 3 == 0; });
}

/// Checks that the call is refused and leaves an earlier result alone.
void refuses(const const_kept_tokens& kept, const layer_view<float>& layer, index_t queries, errc code,
             const std::vector<index_t>& numbers, const std::string& word) {
  const arranged_layer<float> other({.tokens = 9, .queries = 3});
  output_errors errors =
      output_error(backend, keep_where(1, 2, 9, [](auto, auto, auto) { return true; }), other.view());
  check_error(output_error(backend, kept, layer, errors, queries), code, numbers, word);
  CHECK(errors.queries() == 3);
  CHECK(errors.layer_output_norm()(0, 2) > 0);
  CHECK_THROWS_AS(output_error(backend, kept, layer, queries), error);
}

}  // namespace

TEST_CASE("output_error refuses a kept set that does not fit") {
  const arranged_layer<float> layer(sizes);
  const auto three = keep_where(3, 2, 30, [](auto, auto, auto) { return true; });
  refuses(three, layer.view(), 0, errc::shape_mismatch, {3, 2}, "sequences");
  const auto odd = keep_where(2, 3, 30, [](auto, auto, auto) { return true; });
  refuses(odd, layer.view(), 0, errc::shape_mismatch, {3, 2}, "heads");
  const auto eight = keep_where(2, 8, 30, [](auto, auto, auto) { return true; });
  refuses(eight, layer.view(), 0, errc::shape_mismatch, {8, 4}, "query");
  const auto long_set = keep_where(2, 2, 31, [](auto, auto, auto) { return true; });
  refuses(long_set, layer.view(), 0, errc::invalid_argument, {30}, "position");
  owned_kept_tokens twice = keep_every_third();
  twice.kept().positions(1, 1, 2) = 3;
  refuses(twice, layer.view(), 0, errc::invalid_argument, {3, 2, 1}, "position");
}

TEST_CASE("output_error refuses kept positions outside their sequence") {
  const padding pad = GENERATE(padding::left, padding::right);
  arranged_layer<float> layer(sizes);
  layer.pad_to({30, 20}, pad);
  const auto all = keep_where(2, 2, 30, [](auto, auto, auto) { return true; });
  const index_t first = pad == padding::left ? 10 : 0;
  refuses(all, layer.view(), 0, errc::invalid_argument, {1, 0, 29, first, first + 19}, "its tokens");
}

TEST_CASE("output_error refuses a layer that does not fit itself") {
  const arranged_layer<float> layer(sizes);
  const owned_kept_tokens kept = keep_every_third();
  const auto refused = [&](const auto& damage, errc code, const std::vector<index_t>& numbers, const std::string& word,
                           index_t queries = 0) {
    layer_view<float> view = layer.view();
    damage(view);
    refuses(kept, view, queries, code, numbers, word);
  };
  refused([](auto& view) { view.key = {}; }, errc::missing_input, {}, "key");
  refused([](auto& view) { view.value = {}; }, errc::missing_input, {}, "value");
  refused([](auto& view) { view.query.data = nullptr; }, errc::missing_input, {}, "query");
  refused([](auto& view) { view.query.extents[1] = 3; }, errc::shape_mismatch, {3, 2}, "heads");
  refused([](auto& view) { view.query.extents[3] = 8; }, errc::shape_mismatch, {8, 16}, "query");
  refused([&](auto& view) { view.value = tensor_view<const float, 4>(layer.value).slice(2, 0, 29); },
          errc::shape_mismatch, {29, 30}, "value");
  refused([](auto& view) { view.projection.extents[1] = 60; }, errc::shape_mismatch, {60, 4, 16, 64}, "W_O");
  refused([](auto&) {}, errc::invalid_argument, {7, 6}, "rows", 7);
  refused([](auto&) {}, errc::invalid_argument, {-1, 6}, "rows", -1);
  const std::int32_t lengths[2] = {30, 31};
  refused([&](auto& view) { view.lengths = {lengths, {2}}; }, errc::invalid_argument, {1, 31, 30}, "length");
  const std::vector<double> gram(4 * 16 * 15);
  const std::vector<float> rest(4 * 16 * 16);
  refused(
      [&](auto& view) {
        view.metric = {{gram.data(), {4, 16, 15}}, {rest.data(), {4, 16, 16}}, {rest.data(), {4, 16}}};
      },
      errc::shape_mismatch, {15, 16}, "gram");
}

TEST_CASE("output_error refuses values and weights that are no usable numbers") {
  arranged_layer<float> layer(sizes);
  const owned_kept_tokens kept = keep_every_third();
  const float bad = GENERATE(std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity());
  layer.value(1, 0, 17, 4) = bad;
  refuses(kept, layer.view(), 0, errc::invalid_argument, {17, 0, 1}, "value holds");
  layer.value(1, 0, 17, 4) = std::numeric_limits<float>::max();  // large is fine
  CHECK(std::isfinite(output_error(backend, kept, layer.view()).mean_relative()));
  layer.projection[3 * 64 + 5] = bad;
  refuses(kept, layer.view(), 0, errc::invalid_argument, {3, 5}, "W_O holds");
  layer.projection[3 * 64 + 5] = 0;
  std::vector<double> gram(4 * 16 * 16);
  gram[(2 * 16 + 7) * 16 + 9] = bad;
  const std::vector<float> rest(gram.size());
  layer.metric = {{gram.data(), {4, 16, 16}}, {rest.data(), {4, 16, 16}}, {rest.data(), {4, 16}}};
  refuses(kept, layer.view(), 0, errc::invalid_argument, {7, 9}, "metric");

  // Padding is never read.
  arranged_layer<float> padded(sizes);
  padded.pad_to({30, 20}, padding::left);
  const auto inside = keep_where(2, 2, 30, [](auto, auto, index_t n) { return n >= 15; });
  CHECK(std::isfinite(output_error(backend, inside, padded.view()).mean_relative()));
}

TEST_CASE("doubles beyond the verifier's range are refused, below it nothing overflows") {
  arranged_layer<double> layer({.query_heads = 1, .kv_heads = 1, .tokens = 10, .queries = 2, .hidden = 3});
  const auto kept = keep_where(1, 1, 10, [](auto, auto, index_t n) { return n % 2 == 0; });
  for (index_t n = 0; n < 10; ++n) layer.value(0, 0, n, 1) = n % 2 == 0 ? 1e60 : -1e60;
  for (double& weight : layer.projection) weight = 1e60;
  const output_errors errors = output_error(backend, kept, layer.view());
  CHECK(errors.layer()(0, 1) > 1e119);
  CHECK(std::isfinite(errors.layer_predicted()(0, 1)));
  CHECK(std::isfinite(errors.mean_relative()));
  layer.value(0, 0, 4, 1) = 1.1e60;
  output_errors unused;
  check_error(output_error(backend, kept, layer.view(), unused), errc::invalid_argument, {4, 0}, "1.1e+60");
}

TEST_CASE("nothing to verify is no error") {
  const arranged_layer<float> layer(sizes);
  layer_view<float> view = layer.view();
  view.query = view.query.slice(2, 6, 0);
  const output_errors no_rows = output_error(backend, keep_every_third(), view);
  CHECK(no_rows.queries() == 0);
  CHECK(no_rows.head().empty());
  CHECK(no_rows.mean_relative() == 0);
  const arranged_layer<float> no_tokens({.tokens = 0, .queries = 4, .hidden = 5});
  const output_errors empty =
      output_error(backend, keep_where(1, 2, 0, [](auto, auto, auto) { return true; }), no_tokens.view());
  CHECK(empty.rows(0) == 0);
  CHECK(empty.layer()(0, 3) == 0);
  const arranged_layer<float> no_batch({.batch = 0, .queries = 4});
  CHECK(output_error(backend, owned_kept_tokens(0, 2, 0), no_batch.view()).batch() == 0);
}

TEST_CASE("future_error is output_error of the longer cache, of whose prompt alone tokens were evicted") {
  constexpr index_t prompt = 24;
  constexpr index_t more = 6;
  arranged_layer<float> whole(sizes, 3);
  const bool padded = GENERATE(false, true);
  if (padded) whole.pad_to({30, 19}, padding::left);
  const auto part = [&](const tensor_view<float, 4>& cache, index_t begin, index_t count) {
    return tensor_view<const float, 4>(cache).slice(2, begin, count);
  };
  const std::int32_t lengths[2] = {24, 13};
  layer_view<float> layer = whole.view();
  layer.query = {};
  layer.key = part(whole.key, 0, prompt);
  layer.value = part(whole.value, 0, prompt);
  if (padded) layer.lengths = {lengths, {2}};
  const auto is_kept = [&](index_t b, index_t h, index_t n) {
    return (!padded || b == 0 || n >= 11) && (n + h) % 3 == 0;
  };
  const auto kept = keep_where(2, 2, prompt, is_kept);
  const future_view<float> future{whole.query, part(whole.key, prompt, more), part(whole.value, prompt, more)};
  const output_errors errors = future_error(backend, kept, layer, future);
  const auto extended =
      keep_where(2, 2, 30, [&](index_t b, index_t h, index_t n) { return n >= prompt || is_kept(b, h, n); });
  const output_errors expected = output_error(backend, extended, whole.view());
  REQUIRE(errors.queries() == more);
  REQUIRE(expected.layer()(1, 0) > 0);
  CHECK(same_bits(errors, 0, expected, 0));
  CHECK(same_bits(errors, 1, expected, 1));
}

TEST_CASE("future_error refuses what output_error would, and futures that do not follow the prompt") {
  const arranged_layer<float> layer(sizes);
  const auto tail = [](const tensor_view<float, 4>& cache, index_t count) {
    return tensor_view<const float, 4>(cache).slice(2, 0, count);
  };
  const future_view<float> future{layer.query, tail(layer.key, 6), tail(layer.value, 6)};
  const owned_kept_tokens kept = keep_every_third();
  output_errors errors;
  CHECK(future_error(backend, kept, layer.view(), future, errors).ok());
  const auto refused = [&](const auto& damage, errc code, const std::vector<index_t>& numbers,
                           const std::string& word) {
    layer_view<float> view = layer.view();
    future_view<float> later = future;
    damage(view, later);
    check_error(future_error(backend, kept, view, later, errors), code, numbers, word);
    CHECK_THROWS_AS(future_error(backend, kept, view, later), error);
    CHECK(errors.queries() == 6);
  };
  refused([](auto& view, auto&) { view.key = {}; }, errc::missing_input, {}, "key");
  refused([](auto& view, auto&) { view.value = {}; }, errc::missing_input, {}, "value");
  refused([](auto&, auto& later) { later.query.extents[2] = 5; }, errc::shape_mismatch, {5, 6}, "queries");
  refused([](auto&, auto& later) { later.value.extents[2] = 5; }, errc::shape_mismatch, {35, 36}, "value");
  refused([](auto&, auto& later) { later.key.extents[1] = 1; }, errc::shape_mismatch, {1, 2}, "key");
  const std::int32_t lengths[2] = {30, 12};
  refused(
      [&](auto& view, auto&) {
        view.lengths = {lengths, {2}};
        view.pad = padding::right;
      },
      errc::unsupported, {1, 12, 30}, "right");
  const std::int32_t negative[2] = {30, -3};
  refused([&](auto& view, auto&) { view.lengths = {negative, {2}}; }, errc::invalid_argument, {1, -3}, "length");
  const owned_kept_tokens beyond = keep_where(2, 2, 31, [](auto, auto, auto) { return true; });
  check_error(future_error(backend, beyond, layer.view(), future, errors), errc::invalid_argument, {30}, "position");
}
