// SPDX-License-Identifier: Apache-2.0
// Any policy on any layer - shapes, strides, overlaps, padding, masks, NaN - either fails with a reason or keeps a set
// that fits the cache. Both backends agree on whether, and on how many tokens. Every tensor has a buffer of exactly the
// elements it can touch, so that whatever reads beside one is seen by the address sanitizer.
#include "fuzz/fuzz_layer.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/cache/compact.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/runtime_parts.hpp>
#include <restkv/select.hpp>

namespace {

using namespace restkv;
using restkv_test::byte_source;
using restkv_test::exact_tensor;
using restkv_test::fuzz_layer;
using restkv_test::require;

template <class Score>
using any_policy = eviction_policy<Score, any_temporal, any_spatial, any_budget>;

any_temporal random_temporal(byte_source& bytes) {
  switch (bytes.within(0, 3)) {
    case 0: return {mean{}};
    case 1: return {ema{.alpha = bytes.parameter()}};
    case 2: return {sum{}};
    default: return {last{}};
  }
}

any_spatial random_spatial(byte_source& bytes) {
  const int width = static_cast<int>(bytes.chance(10) ? bytes.within(-2, 300) : 2 * bytes.within(0, 4) + 1);
  switch (bytes.within(0, 3)) {
    case 0: return {no_pool{}};
    case 1: return {average_pool{.width = width}};
    case 2: return {max_pool{.width = width}};
    default:
      return {adaptive_window{.min_width = width,
                              .scale = bytes.parameter() * 10,
                              .shift_rule = bytes.flag() ? drift_shift::released : drift_shift::centred}};
  }
}

any_budget random_budget(byte_source& bytes) {
  const budget_size size = bytes.chance(3) ? budget_size::keep_ratio(static_cast<double>(bytes.parameter()))
                                           : budget_size(bytes.chance(60) ? bytes.any_number() : bytes.within(8, 40));
  switch (bytes.within(0, 2)) {
    case 0: return {uniform{size}};
    case 1:
      return {pyramid{.budget = size,
                      .beta = bytes.flag() ? 20.0f : 1.0f / bytes.parameter(),
                      .rounding = bytes.flag() ? pyramid_rounding::exact : pyramid_rounding::released}};
    default: return {ada_kv{.budget = size, .floor = bytes.parameter(), .normalise = bytes.flag()}};
  }
}

template <class Score>
any_policy<Score> random_policy(byte_source& bytes, const Score& score) {
  const index_t window = bytes.chance(60) ? bytes.any_number() : bytes.within(1, 12);
  constexpr group_reduce groups[] = {group_reduce::none, group_reduce::mean, group_reduce::max, group_reduce::sum,
                                     group_reduce::l2};
  return {.score = score,
          .window = window,
          .temporal = random_temporal(bytes),
          .spatial = random_spatial(bytes),
          .group = groups[bytes.within(0, 4)],
          .budget = random_budget(bytes),
          .protect = {.sink = bytes.chance(60) ? bytes.any_number() : bytes.within(0, 5),
                      .recent = bytes.chance(60) ? bytes.any_number() : bytes.within(0, 8)}};
}

/// A selection with exactly the memory it asked for.
struct outcome {
  status result;
  std::vector<std::byte> memory;
  kept_tokens kept;

  template <class Backend, class Policy, class T>
  outcome(Backend& backend, const Policy& policy, const problem_shape& shape, const layer_view<T>& layer) {
    plan<Policy> made;
    result = make_plan(backend, policy, shape, made);
    if (!result.ok()) return;
    if (made.workspace_bytes > (std::size_t{1} << 26)) {  // a plan for a layer far longer than this one
      result = status::error(errc::unsupported, "not run");
      return;
    }
    memory.resize(made.workspace_bytes);
    result = select(backend, made, layer, workspace(memory.data(), memory.size()), kept);
    if (!result.ok()) {
      require(kept.positions.data == nullptr && result.message()[0] != '\0');
      return;
    }
    require(kept.batch() == shape.batch && kept.heads() == made.heads && kept.capacity() == made.capacity);
    require(check_kept(kept, shape.batch, shape.kv_heads, layer.key.extent(2)).ok());
    for (index_t b = 0; b < shape.batch; ++b) {
      const sequence_span span = sequence(layer, b, 0);
      for (index_t h = 0; h < made.heads; ++h) {
        for (index_t i = 0; i < kept.lengths(b, h); ++i) {
          require(kept.positions(b, h, i) >= span.begin && kept.positions(b, h, i) < span.begin + span.length);
        }
      }
    }
  }
};

/// Copies what was kept, then moves it within the cache; both hold the same afterwards.
template <class T>
void check_compaction(const kept_tokens& kept, fuzz_layer<T>& layer) {
  const auto& view = layer.view();
  const index_t dim = view.key.extent(3);
  if (kept.batch() * kept.heads() * kept.capacity() * dim == 0) return;
  exact_tensor<T, 4> key_out({kept.batch(), kept.heads(), kept.capacity(), dim});
  exact_tensor<T, 4> value_out({kept.batch(), kept.heads(), kept.capacity(), dim});
  if (!compact(kept, view.key, view.value, dense_layout<T>{key_out.view}, dense_layout<T>{value_out.view}).ok()) return;
  const status moved = compact_in_place(kept, layer.key.view, layer.value.view);
  if (!moved.ok()) {
    require(moved.code() == errc::aliasing || moved.code() == errc::unsupported);
    return;
  }
  for (index_t b = 0; b < kept.batch(); ++b) {
    for (index_t h = 0; h < kept.heads(); ++h) {
      for (index_t i = 0; i < kept.lengths(b, h); ++i) {
        for (index_t c = 0; c < dim; ++c) {
          require(std::memcmp(&key_out.view(b, h, i, c), &layer.key.view(b, h, i, c), sizeof(T)) == 0);
          require(std::memcmp(&value_out.view(b, h, i, c), &layer.value.view(b, h, i, c), sizeof(T)) == 0);
        }
      }
    }
  }
}

template <class T, class Score>
void run(byte_source& bytes, const Score& score) {
  fuzz_layer<T> layer(bytes);
  const auto policy = random_policy(bytes, score);
  problem_shape shape = shape_of(layer.view(), bytes.within(0, 2), bytes.chance(60) ? bytes.within(-1, 2) : 3);
  if (bytes.chance(5)) shape.tokens = bytes.chance(20) ? bytes.any_number() : shape.tokens + bytes.within(-1, 20);
  if (bytes.chance(100)) shape.kv_heads = bytes.any_number();
  if (bytes.chance(100)) shape.query_heads = bytes.any_number();
  if (bytes.chance(100)) shape.batch = bytes.any_number();
  if (bytes.chance(100)) shape.head_dim = bytes.any_number();

  static eigen_backend eigen;
  reference_backend reference;
  const outcome fast(eigen, policy, shape, layer.view());
  const outcome slow(reference, policy, shape, layer.view());
  if (fast.result.code() == errc::unsupported || slow.result.code() == errc::unsupported) return;
  require(fast.result.code() == slow.result.code());
  if (!fast.result.ok()) return;
  const bool heads_compete = std::holds_alternative<ada_kv>(policy.budget.choice);
  for (index_t b = 0; b < shape.batch; ++b) {
    index_t fast_total = 0;
    index_t slow_total = 0;
    for (index_t h = 0; h < fast.kept.heads(); ++h) {
      fast_total += fast.kept.lengths(b, h);
      slow_total += slow.kept.lengths(b, h);
      require(heads_compete || fast.kept.lengths(b, h) == slow.kept.lengths(b, h));
    }
    require(fast_total == slow_total);
  }
  check_compaction(fast.kept, layer);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  byte_source bytes(data, size);
  const query_order order = bytes.flag() ? query_order::before : query_order::after;
  switch (bytes.within(0, 3)) {
    case 0: run<float>(bytes, snap_kv{}); break;
    case 1: run<half>(bytes, rest_kv{.order = order, .metric_of_distance = metric::identity}); break;
    default:
      run<float>(bytes, rest_kv{.order = order,
                                .metric_of_distance = bytes.flag() ? metric::projection : metric::identity,
                                .tau = bytes.chance(4) ? bytes.parameter() * 8 : 1.0f,
                                .normalised = bytes.flag()});
      break;
  }
  return 0;
}
