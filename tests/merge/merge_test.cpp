// SPDX-License-Identifier: Apache-2.0
// merge() against definitions written down once more, in double: who receives what, and what becomes of it.
#include "cache/cache_support.hpp"
#include "merge/merge_support.hpp"

#include <restkv/merge/cam.hpp>
#include <restkv/merge/look_m.hpp>
#include <restkv/merge/merge.hpp>
#include <restkv/merge/value_merge.hpp>

#include <functional>

using namespace restkv_test;
using restkv::errc;
using restkv::merge_guard;
using restkv::merge_options;

namespace {

using vector = std::vector<double>;

template <class T, class Operator, class Loop = restkv::serial_for>
restkv::status run_merge(compacted_layer<T>& made, const Operator& merging, const merge_options& options,
                         const Loop& loop = {}) {
  std::vector<std::byte> memory(restkv::merge_workspace_bytes(made.cache(), made.layer, merging, options));
  return restkv::merge(made.cache(), made.layer, merging, options, restkv::workspace(memory), loop);
}

/// A key that stands at one position, turned to another.
vector turned(vector key, double shift, const std::vector<double>& frequencies) {
  const std::size_t pairs = frequencies.size();
  for (std::size_t i = 0; i < pairs; ++i) {
    const double x = key[i], y = key[i + pairs];
    key[i] = x * std::cos(shift * frequencies[i]) - y * std::sin(shift * frequencies[i]);
    key[i + pairs] = x * std::sin(shift * frequencies[i]) + y * std::cos(shift * frequencies[i]);
  }
  return key;
}

double cosine(const vector& a, const vector& b) {
  double ab = 0, aa = 0, bb = 0;
  for (std::size_t c = 0; c < a.size(); ++c) ab += a[c] * b[c], aa += a[c] * a[c], bb += b[c] * b[c];
  return ab / std::sqrt(aa * bb);
}

double length_of(const vector& a) {
  double square = 0;
  for (const double x : a) square += x * x;
  return std::sqrt(square);
}

/// What is merged into one kept token: the dropped keys, turned to its position, their values and cosines.
struct received {
  std::vector<vector> keys, values;
  vector similarities;
};

/// Mean of vectors.
vector mean_of(const std::vector<vector>& all) {
  vector sum(all[0].size());
  for (const auto& one : all) {
    for (std::size_t c = 0; c < sum.size(); ++c) sum[c] += one[c] / static_cast<double>(all.size());
  }
  return sum;
}

using rule = std::function<void(const received&, vector& key, vector& value)>;

/// Checks a whole merge without a guard: every kept token by `apply` of what it receives.
template <class T>
void check_similar(compacted_layer<T>& made, const std::vector<double>& frequencies, const merge_options& options,
                   double tolerance, const rule& apply) {
  for (index_t b = 0; b < made.kept.batch(); ++b) {
    const auto span = restkv::sequence(made.layer, b, 0);
    for (index_t h = 0; h < made.kept.heads(); ++h) {
      const index_t kv = h * made.layer.key.extent(1) / made.kept.heads();
      const index_t count = made.kept.lengths(b, h);
      std::vector<received> into(static_cast<std::size_t>(count));
      for (index_t n = span.begin; n < span.begin + span.length; ++n) {
        if (keeps(made.kept, b, h, n)) continue;
        const vector key = row_of(made.layer.key.chunk(0)[b][kv][n]);
        double best = -2;
        std::size_t target = 0;
        vector best_key;
        for (index_t i = 0; i < count; ++i) {
          const index_t p = made.kept.positions(b, h, i);
          if (p < span.begin + options.protect.sink || p >= span.begin + span.length - options.protect.recent) continue;
          const vector moved = turned(key, static_cast<double>(p - n), frequencies);
          const double similarity = cosine(moved, row_of(made.layer.key.chunk(0)[b][kv][p]));
          if (similarity > best) best = similarity, target = static_cast<std::size_t>(i), best_key = moved;
        }
        if (best < options.least_similarity || best == -2) continue;
        into[target].keys.push_back(best_key);
        into[target].values.push_back(row_of(made.layer.value.chunk(0)[b][kv][n]));
        into[target].similarities.push_back(best);
      }
      for (index_t i = 0; i < count; ++i) {
        vector key = row_of(made.layer.key.chunk(0)[b][kv][made.kept.positions(b, h, i)]);
        vector value = row_of(made.layer.value.chunk(0)[b][kv][made.kept.positions(b, h, i)]);
        if (!into[static_cast<std::size_t>(i)].keys.empty()) apply(into[static_cast<std::size_t>(i)], key, value);
        const vector new_key = row_of(made.key().row(b, h, i));
        const vector new_value = row_of(made.value().row(b, h, i));
        double worst = 0;
        for (std::size_t c = 0; c < key.size(); ++c) {
          worst = std::max({worst, std::abs(key[c] - new_key[c]), std::abs(value[c] - new_value[c])});
        }
        CAPTURE(b, h, i, into[static_cast<std::size_t>(i)].keys.size());
        CHECK(worst < tolerance);
      }
    }
  }
}

void average(const received& in, vector& key, vector& value) {
  auto keys = in.keys, values = in.values;
  keys.push_back(key);
  values.push_back(value);
  key = mean_of(keys);
  value = mean_of(values);
}

void pivot(const received& in, vector& key, vector& value) {
  std::vector<vector> keys{key}, values{value};
  for (const auto& one : in.keys) keys.push_back(mean_of({one, key}));
  for (const auto& one : in.values) values.push_back(mean_of({one, value}));
  key = mean_of(keys);
  value = mean_of(values);
}

void weigh(const vector& weights, const std::vector<vector>& from, vector& to) {
  double total = 1;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    total += weights[i];
    for (std::size_t c = 0; c < to.size(); ++c) to[c] += weights[i] * from[i][c];
  }
  for (double& x : to) x /= total;
}

void weighted(const received& in, vector& key, vector& value) {
  vector weights;
  for (const double s : in.similarities) weights.push_back(std::max((s + 1) / 2, 1e-6));
  weigh(weights, in.keys, key);
  weigh(weights, in.values, value);
}

void by_value(const received& in, vector&, vector& value) {
  vector weights;
  for (std::size_t i = 0; i < in.values.size(); ++i) {
    const double own = length_of(in.values[i]);
    weights.push_back(std::max(in.similarities[i], 0.0) * own / (own + length_of(value) + 1e-6));
  }
  weigh(weights, in.values, value);
}

/// An operator of a user's own, that notes the similarities of what it merges.
struct average_that_logs {
  std::vector<float>* log = nullptr;

  static constexpr restkv::merge_target target = restkv::merge_target::most_similar;
  static constexpr bool merges_keys = false;
  static constexpr bool needs_attention = false;
  [[nodiscard]] float weight(const restkv::merge_pair<float>& pair) const {
    log->push_back(pair.similarity);
    return 1;
  }
  [[nodiscard]] restkv::merge_blend<float> blend(index_t, float total) const {
    return {1 / (1 + total), 1 / (1 + total)};
  }
};

const layer_sizes small{.batch = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 16, .tokens = 70, .queries = 12};

restkv::owned_kept_tokens some_of(const restkv::layer_view<float>& layer, index_t heads, int percent, unsigned seed) {
  random_engine random(seed);
  return keep_some(random, layer, heads, percent);
}

}  // namespace

TEST_CASE("each operator by its definition, keys turned to their receiver's position", "[merge]") {
  arranged_layer<float> layer(small, 3);
  layer.pad_to({70, 51}, restkv::padding::left);
  const auto frequencies = frequencies_of(8);
  for (const index_t heads : {2, 4}) {  // a set per KV head, and one per query head
    const auto kept = some_of(layer.view(), heads, 25, 5);
    compacted_layer<float> made(layer, kept);
    merge_options options{.guard = merge_guard::none};
    options.rope.frequencies = frequencies;
    REQUIRE(run_merge(made, restkv::average_merge{}, options).ok());
    check_similar(made, frequencies, options, 2e-5, average);
    made.reset();
    REQUIRE(run_merge(made, restkv::pivot_merge{}, options).ok());
    check_similar(made, frequencies, options, 2e-5, pivot);
    made.reset();
    options.protect = {.sink = 6, .recent = 20};
    options.least_similarity = 0.35;
    REQUIRE(run_merge(made, restkv::weighted_merge{}, options).ok());
    check_similar(made, frequencies, options, 2e-5, weighted);
    made.reset();
    options = {.guard = merge_guard::none};
    REQUIRE(run_merge(made, restkv::value_merge{}, options).ok());  // keys as they are
    check_similar(made, {}, options, 2e-5, by_value);
    CHECK(std::equal(made.key_memory.begin(), made.key_memory.end(),
                     compacted_layer<float>(layer, kept).key_memory.begin(), same_bits<float>));
  }
}

TEST_CASE("pairs may be interleaved, positions the caller's, and rotation ignored", "[merge]") {
  const arranged_layer<float> layer({.head_dim = 8, .tokens = 40, .queries = 4}, 4);
  const auto kept = some_of(layer.view(), 2, 30, 6);
  const auto frequencies = frequencies_of(4);
  compacted_layer<float> made(layer, kept);
  merge_options options{.guard = merge_guard::none};
  options.rope.frequencies = frequencies;
  options.rope.ignore = true;
  REQUIRE(run_merge(made, restkv::average_merge{}, options).ok());
  check_similar(made, {}, options, 2e-5, average);

  // The same layer with its channels in the other order gives the same numbers in that order.
  options.rope.ignore = false;
  made.reset();
  REQUIRE(run_merge(made, restkv::average_merge{}, options).ok());
  arranged_layer<float> other({.head_dim = 8, .tokens = 40, .queries = 4}, 4);
  const auto channel = [](index_t c) { return c < 4 ? 2 * c : 2 * (c - 4) + 1; };
  for (index_t h = 0; h < 2; ++h) {
    for (index_t n = 0; n < 40; ++n) {
      for (index_t c = 0; c < 8; ++c) other.key(0, h, n, channel(c)) = layer.key(0, h, n, c);
    }
  }
  compacted_layer<float> interleaved(other, kept);
  options.rope.pairs = restkv::rotary_pairs::interleaved;
  std::vector<position_t> positions;  // only differences count
  for (index_t h = 0; h < 2; ++h) {
    for (position_t n = 0; n < 40; ++n) positions.push_back(n + 1000);
  }
  options.rope.positions = {positions.data(), {1, 2, 40}};
  REQUIRE(run_merge(interleaved, restkv::average_merge{}, options).ok());
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < kept.kept().lengths(0, h); ++i) {
      for (index_t c = 0; c < 8; ++c) {
        CHECK(interleaved.key().rows(0, h, i, channel(c)) == Approx(made.key().rows(0, h, i, c)).margin(2e-5));
      }
    }
  }
}

TEST_CASE("a fraction of the dropped tokens, the most similar ones", "[merge]") {
  const arranged_layer<float> layer({.query_heads = 1, .kv_heads = 1, .head_dim = 4, .tokens = 13, .queries = 2}, 7);
  const auto kept = keep_where(1, 1, 13, [](index_t, index_t, index_t n) { return n % 4 == 0; });  // 9 are dropped
  compacted_layer<float> made(layer, kept);
  std::vector<float> all, part;
  REQUIRE(run_merge(made, average_that_logs{&all}, {.guard = merge_guard::none}).ok());
  REQUIRE(all.size() == 9);
  made.reset();
  REQUIRE(run_merge(made, average_that_logs{&part}, {.guard = merge_guard::none, .fraction = 0.5}).ok());
  std::sort(all.rbegin(), all.rend());
  std::sort(part.rbegin(), part.rend());
  CHECK(part == std::vector<float>(all.begin(), all.begin() + 5));  // 9 - ceil(8 / 2)
}

TEST_CASE("CaM adds a share of the value to the tokens that follow, by chance", "[merge][cam]") {
  arranged_layer<float> layer({.query_heads = 4, .kv_heads = 2, .head_dim = 8, .tokens = 50, .queries = 10}, 9);
  const auto kept = keep_where(1, 2, 50, [](index_t, index_t h, index_t n) { return n >= 40 || n % (5 + h) == 2; });
  compacted_layer<float> made(layer, kept);
  const merge_options options{.window = 10, .guard = merge_guard::none};
  const restkv::cam_merge expected{.targets = 3, .expectation = true};
  REQUIRE(run_merge(made, expected, options).ok());
  // By hand: attention of every query head and row, then the rule.
  for (index_t h = 0; h < 2; ++h) {
    vector attention(50);
    for (index_t q = 2 * h; q < 2 * h + 2; ++q) {
      for (index_t i = 0; i < 10; ++i) {
        vector weights;
        double mass = 0;
        for (index_t n = 0; n < 41 + i; ++n) {
          double logit = 0;
          for (index_t c = 0; c < 8; ++c) logit += double{layer.query(0, q, i, c)} * double{layer.key(0, h, n, c)};
          weights.push_back(std::exp(logit / std::sqrt(8.0)));
          mass += weights.back();
        }
        for (std::size_t n = 0; n < weights.size(); ++n) attention[n] += weights[n] / mass / 20;
      }
    }
    std::vector<vector> values;
    const index_t count = kept.kept().lengths(0, h);
    const auto at = [&](index_t i) { return kept.kept().positions(0, h, i); };
    for (index_t i = 0; i < count; ++i) values.push_back(row_of(layer.value[0][h][at(i)]));
    for (index_t n = 0; n < 50; ++n) {
      if (keeps(kept, 0, h, n)) continue;
      std::vector<index_t> targets;
      for (index_t i = 0; i < count && targets.size() < 3; ++i) {
        if (at(i) > n) targets.push_back(i);
      }
      double mean = 0;
      for (const index_t i : targets) mean += attention[static_cast<std::size_t>(at(i))] / double(targets.size());
      const double chance_of = std::min(1.0, attention[static_cast<std::size_t>(n)] / mean);
      for (const index_t i : targets) {
        for (index_t c = 0; c < 8; ++c) {
          values[static_cast<std::size_t>(i)][static_cast<std::size_t>(c)] +=
              chance_of * double{layer.value(0, h, n, c)} / double(targets.size());
        }
      }
    }
    for (index_t i = 0; i < count; ++i) {
      for (index_t c = 0; c < 8; ++c) {
        CHECK(made.value().rows(0, h, i, c) ==
              Approx(values[static_cast<std::size_t>(i)][static_cast<std::size_t>(c)]).margin(2e-5));
      }
    }
  }
  // The draws: the same for the same seed, and their mean is the expectation.
  const auto expectation = made.value_memory;
  std::vector<double> sum(expectation.size());
  std::vector<float> first, second;
  for (std::uint64_t seed = 0; seed < 500; ++seed) {
    made.reset();
    REQUIRE(run_merge(made, restkv::cam_merge{.targets = 3, .seed = seed}, options).ok());
    if (seed == 0) first = made.value_memory;
    if (seed == 1) second = made.value_memory;
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += made.value_memory[i] / 500.0;
  }
  made.reset();
  REQUIRE(run_merge(made, restkv::cam_merge{.targets = 3, .seed = 0}, options).ok());
  CHECK(same_memory(made.value_memory, first));
  CHECK(!same_memory(first, second));
  double worst = 0;
  for (std::size_t i = 0; i < sum.size(); ++i) worst = std::max(worst, std::abs(sum[i] - double{expectation[i]}));
  CHECK(worst < 0.25);  // about 6 draws of variance 1/4 at most, of thirds of values up to 3: 0.055 over 500 seeds
}

TEST_CASE("protected entries keep their bits, and so does a window of them", "[merge]") {
  const arranged_layer<float> layer(small, 11);
  const auto kept = keep_where(2, 2, 70, [](index_t, index_t, index_t n) { return n < 4 || n % 7 == 1 || n >= 58; });
  compacted_layer<float> made(layer, kept);
  const auto before = made.value_memory;
  merge_options options{.guard = merge_guard::none, .protect = {.sink = 4, .recent = 12}};
  REQUIRE(run_merge(made, restkv::value_merge{}, options).ok());
  index_t changed = 0;
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 2; ++h) {
      for (index_t i = 0; i < kept.kept().lengths(b, h); ++i) {
        const index_t p = kept.kept().positions(b, h, i);
        bool same = true;
        for (index_t c = 0; c < 16; ++c) same = same && made.value().rows(b, h, i, c) == layer.value(b, h, p, c);
        if (p < 4 || p >= 58) CHECK(same);
        changed += same ? 0 : 1;
      }
    }
  }
  CHECK(changed > 10);
  CHECK(!same_memory(before, made.value_memory));
}

TEST_CASE("nothing to merge leaves every bit", "[merge]") {
  const arranged_layer<float> layer({.tokens = 12, .queries = 4}, 12);
  const auto frequencies = frequencies_of(8);
  for (const int percent : {0, 100}) {  // all dropped, none dropped
    const auto kept = some_of(layer.view(), 2, percent, 1);
    compacted_layer<float> made(layer, kept);
    const auto keys = made.key_memory;
    const auto values = made.value_memory;
    for (const auto guard : {merge_guard::none, merge_guard::head, merge_guard::token}) {
      merge_options options{.guard = guard};
      options.rope.frequencies = frequencies;
      REQUIRE(run_merge(made, restkv::pivot_merge{}, options).ok());
      REQUIRE(run_merge(made, restkv::cam_merge{}, options).ok());
      CHECK(same_memory(keys, made.key_memory));
      CHECK(same_memory(values, made.value_memory));
    }
  }
  // One token, and a cache of none.
  for (const index_t tokens : {0, 1}) {
    const arranged_layer<float> tiny({.tokens = tokens, .queries = 1}, 13);
    const auto none = some_of(tiny.view(), 2, 0, 1);
    compacted_layer<float> made(tiny, none);
    CHECK(run_merge(made, restkv::value_merge{}, {}).ok());
  }
}

TEST_CASE("half precision stays finite, and what is not finite is not merged", "[merge]") {
  arranged_layer<restkv::half> layer({.tokens = 40, .queries = 6}, 14);
  const auto kept = keep_where(1, 2, 40, [](index_t, index_t, index_t n) { return n % 5 == 0; });
  layer.value(0, 0, 1, 3) = restkv::half(std::numeric_limits<float>::quiet_NaN());
  layer.value(0, 0, 2, 3) = restkv::half(std::numeric_limits<float>::infinity());
  layer.key(0, 1, 3, 0) = restkv::half(std::numeric_limits<float>::infinity());
  for (index_t n = 0; n < 40; ++n) layer.value(0, 1, n, 5) = restkv::half(60000.0f);  // sums overflow
  const auto frequencies = frequencies_of(8);
  compacted_layer<restkv::half> made(layer, kept);
  merge_options options{.guard = merge_guard::none};
  options.rope.frequencies = frequencies;
  REQUIRE(run_merge(made, restkv::average_merge{}, options).ok());
  const auto changed = made.value_memory;
  for (const auto& memory : {made.key_memory, made.value_memory}) {
    bool finite = true;
    for (const auto x : memory) finite = finite && std::isfinite(restkv::widen<float>(x));
    CHECK(finite);
  }
  made.reset();
  CHECK(!same_memory(changed, made.value_memory));
  // A guard that can measure nothing leaves all as it was.
  const auto before = made.value_memory;
  options.guard = merge_guard::token;
  REQUIRE(run_merge(made, restkv::value_merge{}, options).ok());
  const auto per_head = static_cast<std::ptrdiff_t>(before.size() / 2);
  CHECK(std::equal(before.begin(), before.begin() + per_head, made.value_memory.begin(), same_bits<restkv::half>));
}

TEST_CASE("results do not depend on the loop, the strides, the chunks or the layout", "[merge]") {
  const layer_sizes sizes{.batch = 2, .head_dim = 8, .tokens = 45, .queries = 9, .hidden = 12};
  const arranged_layer<float> layer(sizes, 15);
  const auto kept = some_of(layer.view(), 2, 30, 3);
  const auto frequencies = frequencies_of(4);
  merge_options options{.window = 6};
  options.rope.frequencies = frequencies;
  compacted_layer<float> made(layer, kept);
  REQUIRE(run_merge(made, restkv::weighted_merge{}, options).ok());
  const auto keys = made.key_memory;
  const auto values = made.value_memory;
  made.reset();
  REQUIRE(!same_memory(values, made.value_memory));
  const backward_for backward;
  REQUIRE(run_merge(made, restkv::weighted_merge{}, options, backward).ok());
  CHECK(backward.rows > 0);
  CHECK(same_memory(keys, made.key_memory));
  CHECK(same_memory(values, made.value_memory));
  for (const auto order : {memory_order::channels, memory_order::interleaved}) {
    const arranged_layer<float> other(sizes, 15, order);
    compacted_layer<float> again(other, kept);
    const std::array<index_t, 3> cuts{7, 7, 31};
    const auto key_chunks = cut_tokens(other.key, cuts);
    const auto value_chunks = cut_tokens(other.value, std::array<index_t, 1>{20});
    again.layer.key = {key_chunks.data(), 4};
    again.layer.value = {value_chunks.data(), 2};
    REQUIRE(run_merge(again, restkv::weighted_merge{}, options).ok());
    CHECK(same_memory(keys, again.key_memory));
    CHECK(same_memory(values, again.value_memory));
  }
  // Pages of a user's own.
  random_engine random(2);
  const const_kept_tokens set = kept;
  index_t pool = 0;
  const auto table = deal_pages(random, set, 4, pool);
  std::vector<float> key_pages(static_cast<std::size_t>(pool * 4 * 8)), value_pages(key_pages.size());
  const paged_rows<float> page_keys{{key_pages.data(), {pool, 4, 8}}, table, 2, 2};
  const paged_rows<float> page_values{{value_pages.data(), {pool, 4, 8}}, table, 2, 2};
  const auto view = layer.view();
  REQUIRE(restkv::compact(set, view.key, view.value, page_keys, page_values).ok());
  const restkv::merged_cache<paged_rows<float>, paged_rows<float>> cache{set, page_keys, page_values, {}};
  std::vector<std::byte> memory(restkv::merge_workspace_bytes(cache, view, restkv::weighted_merge{}, options));
  REQUIRE(restkv::merge(cache, view, restkv::weighted_merge{}, options, restkv::workspace(memory)).ok());
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 2; ++h) {
      for (index_t i = 0; i < set.lengths(b, h); ++i) {
        CHECK(row_of(page_keys.row(b, h, i)) == row_of(made.key().row(b, h, i)));
        CHECK(row_of(page_values.row(b, h, i)) == row_of(made.value().row(b, h, i)));
      }
    }
  }
}

TEST_CASE("what does not fit is named, and nothing is written", "[merge]") {
  const arranged_layer<float> layer({.head_dim = 8, .tokens = 30, .queries = 5, .hidden = 4}, 16);
  const auto kept = some_of(layer.view(), 2, 40, 3);
  compacted_layer<float> made(layer, kept);
  const auto keys = made.key_memory;
  const auto values = made.value_memory;
  const auto frequencies = frequencies_of(5);
  const merge_options plain{};
  std::vector<std::byte> memory(restkv::merge_workspace_bytes(made.cache(), made.layer, restkv::value_merge{}, plain));
  const auto value_only = [&](const merge_options& options) {
    return restkv::merge(made.cache(), made.layer, restkv::value_merge{}, options, restkv::workspace(memory));
  };
  check_error(value_only({.window = 0}), errc::invalid_argument, {0, 4096}, "window");
  check_error(value_only({.fraction = 0}), errc::invalid_argument, {0, 1}, "fraction");
  check_error(value_only({.least_similarity = 2}), errc::invalid_argument, {2, 1}, "least_similarity");
  check_error(value_only({.protect = {.sink = -1, .recent = 0}}), errc::invalid_argument, {-1}, "sink");
  check_error(run_merge(made, restkv::pivot_merge{}, {}), errc::missing_input, {30}, "frequencies");
  merge_options options;
  options.rope.frequencies = frequencies;
  check_error(run_merge(made, restkv::pivot_merge{}, options), errc::shape_mismatch, {5, 4}, "frequencies");
  const std::vector<double> bad{1.0, std::numeric_limits<double>::infinity()};
  options.rope.frequencies = bad;
  check_error(run_merge(made, restkv::pivot_merge{}, options), errc::invalid_argument, {2}, "finite");
  std::vector<position_t> positions(2 * 29);
  options = {};
  options.rope.positions = {positions.data(), {1, 2, 29}};
  check_error(value_only(options), errc::shape_mismatch, {29, 30}, "positions");
  check_error(run_merge(made, restkv::cam_merge{.targets = 0}, {}), errc::invalid_argument, {0, 1}, "targets");
  check_error(run_merge(made, restkv::weighted_merge{.least_weight = -1}, options), errc::invalid_argument, {-1, 0, 1},
              "least_weight");
  // One byte short, whatever the alignment.
  restkv::workspace small_space(memory.data(), 64);
  check_error(restkv::merge(made.cache(), made.layer, restkv::value_merge{}, plain, small_space),
              errc::workspace_too_small, {64}, "workspace");
  // No queries: only without a guard.
  auto no_query = made.layer;
  no_query.query = {};
  check_error(restkv::merge(made.cache(), no_query, restkv::value_merge{}, plain, restkv::workspace(memory)),
              errc::missing_input, {32}, "query");
  // The cache may not be the layer's own memory.
  auto own = made.cache();
  own.value.rows = layer.value;
  check_error(restkv::merge(own, made.layer, restkv::value_merge{}, plain, restkv::workspace(memory)), errc::aliasing,
              {}, "overlap");
  // Another layer, fewer entries than the set keeps.
  const arranged_layer<float> wider({.head_dim = 10, .tokens = 30, .queries = 5}, 1);
  check_error(restkv::merge(made.cache(), wider.view(), restkv::value_merge{}, plain, restkv::workspace(memory)),
              errc::shape_mismatch, {8, 10}, "channels");
  auto narrow = made.layer;
  narrow.projection.extents[1] = 31;
  check_error(restkv::merge(made.cache(), narrow, restkv::value_merge{}, plain, restkv::workspace(memory)),
              errc::shape_mismatch, {31, 32}, "W_O");
  made.lengths[0] = static_cast<position_t>(made.kept.lengths(0, 0) + 2);
  check_error(value_only(plain), errc::invalid_argument, {made.kept.lengths(0, 0) + 2}, "entries");
  made.lengths[0] = made.kept.lengths(0, 0);
  CHECK(same_memory(keys, made.key_memory));
  CHECK(same_memory(values, made.value_memory));
  no_query.query = {nullptr, {1, 4, 0, 8}};
  CHECK(restkv::merge(made.cache(), no_query, restkv::value_merge{}, {.guard = merge_guard::none},
                      restkv::workspace(memory))
            .ok());
}
