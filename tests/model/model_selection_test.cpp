// SPDX-License-Identifier: Apache-2.0
// Budgets across layers: the cascade against one choice over all layers, written apart; totals, peaks, slots.
#include "model/random_model.hpp"
#include "support/allocation_counter.hpp"
#include "support/check_error.hpp"

#include <restkv/model/cake_budget.hpp>
#include <restkv/model/global_budget.hpp>
#include <restkv/model/lava_budget.hpp>
#include <restkv/model/model_selection.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/rescoring/lava.hpp>

#include <map>
#include <numeric>
#include <set>

using namespace restkv;
using namespace restkv_test;

namespace {

/// The reference, which allocates, with what it allocates not counted.
struct uncounted_backend : reference_backend {
  template <class Request, element T>
  status token_scores(const Request& request, const layer_view<T>& layer, scratch<Request>& memory,
                      tensor_view<double, 3> out) const {
    const long before = allocations;
    const status outcome = reference_backend::token_scores(request, layer, memory, out);
    allocations = before;
    return outcome;
  }
};

using cake_policy = eviction_policy<snap_kv, mean_variance, average_pool, uniform>;
using lava_policy = eviction_policy<snap_kv, mean, max_pool, uniform, lava>;
using unit_set = std::set<index_t>;

/// A layer of one sequence as the oracle sees it: units and their scores, row by row.
struct layer_model {
  struct row {
    sequence_span span;
    index_t units = 0;
    std::vector<bool> fixed;
    std::vector<double> score;
  };
  std::vector<row> rows;
  double entropy = 0, variance = 0;  // of attention
};

/// -sum a log(a + 1e-10) and the sum of unbiased variances, from the attention's rows.
template <class Policy>
void measure_attention(const Policy& policy, const layer_view<float>& layer, index_t b, layer_model& out) {
  const problem_shape shape = shape_of(layer);
  for (index_t h = 0; h < shape.query_heads; ++h) {
    const index_t length = sequence(layer, b, h / shape.group()).length;
    const index_t window = std::min(policy.window, length);
    std::vector<std::vector<double>> rows;
    for (index_t i = 0; i < window; ++i) rows.push_back(reference::window_attention(layer, b, h, window, i).share);
    for (std::size_t n = 0; n < static_cast<std::size_t>(length - window); ++n) {
      double sum = 0;
      for (const auto& row : rows) {
        out.entropy -= row[n] * std::log(row[n] + 1e-10);
        sum += row[n];
      }
      const double mean = sum / static_cast<double>(window);
      double squares = 0;
      for (const auto& row : rows) squares += (row[n] - mean) * (row[n] - mean);
      if (window > 1) out.variance += squares / static_cast<double>(window - 1);
    }
  }
}

/// Scores by `select` itself, which tests of its own compare with oracles.
template <class Policy>
std::vector<layer_model> model_of(const Policy& policy, const layer_view<float>& layer, index_t index, index_t layers) {
  reference_backend backend;
  auto shape = shape_of(layer, index, layers);
  auto any = policy;
  any.budget.budget = budget_size::keep_ratio(1.0);
  const auto plan = make_plan(backend, any, shape);
  std::vector<std::byte> memory(plan.workspace_bytes);
  const std::array extents{shape.batch, plan.heads, shape.tokens};
  const auto size = static_cast<std::size_t>(extents[0] * extents[1] * extents[2] + 1);
  std::vector<double> score(size), smoothed(size), drift(size);
  const selection_details<double> details{{score.data(), extents}, {smoothed.data(), extents},
                                          {drift.data(), {extents[0], extents[1]}}};
  kept_tokens kept;
  throw_if_failed(select(backend, plan, layer, workspace(memory), kept, &details));
  std::vector<layer_model> made(static_cast<std::size_t>(shape.batch));
  for (index_t b = 0; b < shape.batch; ++b) {
    layer_model& of_sequence = made[static_cast<std::size_t>(b)];
    measure_attention(policy, layer, b, of_sequence);
    for (index_t r = 0; r < plan.rows; ++r) {
      layer_model::row row;
      row.span = sequence(layer, b, r * shape.kv_heads / plan.heads);
      const index_t unit = policy.granularity.tokens;
      for (index_t first = 0; first < row.span.length; first += unit, ++row.units) {
        bool fixed = first + unit > row.span.length;
        double sum = 0;
        for (index_t n = first; n < std::min(first + unit, row.span.length); ++n) {
          fixed = fixed || n < policy.protect.sink || n >= row.span.length - policy.recent();
          if (layer.keep_mask.data != nullptr) fixed = fixed || layer.keep_mask(b, row.span.begin + n) != 0;
          if (!fixed) sum += smoothed[static_cast<std::size_t>((b * plan.heads + r) * shape.tokens + n)];
        }
        row.fixed.push_back(fixed);
        row.score.push_back(sum / static_cast<double>(unit));
      }
      of_sequence.rows.push_back(row);
    }
  }
  return made;
}

/// Divides by giving one unit after the other to the largest weight / (count + 1/2); weights of 0 when no other wants
/// more.
std::vector<index_t> by_quotients(const std::vector<double>& weights, const std::vector<index_t>& ceilings,
                                  index_t total) {
  std::vector<index_t> counts(weights.size());
  const auto give = [&](bool to_zero) {
    std::size_t best = weights.size();
    double best_quotient = -1;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      if (counts[i] >= ceilings[i] || (weights[i] > 0) == to_zero) continue;
      const double quotient = (to_zero ? 1 : weights[i]) / (static_cast<double>(counts[i]) + 0.5);
      if (quotient <= best_quotient) continue;
      best_quotient = quotient;
      best = i;
    }
    if (best < weights.size()) ++counts[best];
    return best < weights.size();
  };
  for (index_t given = 0; given < total; ++given) {
    if (!give(false) && !give(true)) break;
  }
  return counts;
}

/// The best `count` of some rows' free units, ties to the smaller row and unit, added to `kept`.
void keep_best(const std::vector<std::pair<index_t, const layer_model::row*>>& rows, index_t count,
               std::map<index_t, unit_set>& kept) {
  std::vector<std::tuple<double, index_t, index_t>> order;
  for (const auto& [index, row] : rows) {
    for (index_t u = 0; u < row->units; ++u) {
      if (!kept[index].contains(u)) order.emplace_back(-row->score[static_cast<std::size_t>(u)], index, u);
    }
  }
  std::sort(order.begin(), order.end());
  for (index_t i = 0; i < std::min<index_t>(count, std::ssize(order)); ++i) {
    kept[std::get<1>(order[static_cast<std::size_t>(i)])].insert(std::get<2>(order[static_cast<std::size_t>(i)]));
  }
}

double entropy_of_scores(const layer_model& layer) {
  double sum = 0, entropy = 0;
  index_t count = 0;
  for (const auto& row : layer.rows) {
    for (index_t u = 0; u < row.units; ++u) {
      if (row.fixed[static_cast<std::size_t>(u)]) continue;
      sum += row.score[static_cast<std::size_t>(u)];
      ++count;
    }
  }
  if (count < 2 || sum <= 0) return 0;
  for (const auto& row : layer.rows) {
    for (index_t u = 0; u < row.units; ++u) {
      const double share = row.score[static_cast<std::size_t>(u)] / sum;
      if (!row.fixed[static_cast<std::size_t>(u)] && share > 0) entropy -= share * std::log(share);
    }
  }
  return entropy / std::log(static_cast<double>(count));
}

/// What layers 0 .. m of one sequence keep, chosen at once. Row l * rows + h -> units.
template <class Budget>
std::map<index_t, unit_set> choose_at_once(const std::vector<layer_model>& layers, const Budget& budget,
                                           index_t all_layers, index_t unit, index_t protected_by_policy) {
  const index_t rows = std::ssize(layers[0].rows);
  const auto fixed_of = [](const layer_model::row& row) {
    return std::count(row.fixed.begin(), row.fixed.end(), true);
  };
  const auto longest = *std::max_element(layers[0].rows.begin(), layers[0].rows.end(),
                                         [](const auto& a, const auto& b) { return a.units < b.units; });
  const index_t per_head = budget.budget.ratio > 0
                               ? static_cast<index_t>(budget.budget.ratio * static_cast<double>(longest.units))
                               : std::min(budget.budget.tokens / unit, longest.units);
  // Layers to come hold for good what the first does.
  index_t to_come = 0;
  for (const auto& row : layers[0].rows) to_come += fixed_of(row) + std::min(budget.least, row.units - fixed_of(row));
  const index_t policy_keeps = protected_by_policy + std::min(budget.least, longest.units - protected_by_policy);
  index_t left = all_layers * rows * std::max(per_head, policy_keeps) - (all_layers - std::ssize(layers)) * to_come;
  std::map<index_t, unit_set> kept;
  std::vector<layer_model> scaled = layers;
  for (index_t l = 0; l < std::ssize(layers); ++l) {
    for (index_t h = 0; h < rows; ++h) {
      layer_model::row& row = scaled[static_cast<std::size_t>(l)].rows[static_cast<std::size_t>(h)];
      for (index_t u = 0; u < row.units; ++u) {
        if (row.fixed[static_cast<std::size_t>(u)]) kept[l * rows + h].insert(u);
      }
      keep_best({{l * rows + h, &row}}, budget.least, kept);
      left -= std::ssize(kept[l * rows + h]);
    }
  }
  left = std::max<index_t>(left, 0);
  if constexpr (std::is_same_v<Budget, global_budget>) {
    std::vector<std::pair<index_t, const layer_model::row*>> all;
    for (index_t l = 0; l < std::ssize(layers); ++l) {
      double sum = 0;
      for (auto& row : scaled[static_cast<std::size_t>(l)].rows) {
        for (std::size_t u = 0; u < row.score.size(); ++u) sum += row.fixed[u] ? 0 : row.score[u];
      }
      for (index_t h = 0; h < rows; ++h) {
        layer_model::row& row = scaled[static_cast<std::size_t>(l)].rows[static_cast<std::size_t>(h)];
        if (budget.normalise && sum > 0) {
          for (double& score : row.score) score /= sum;
        }
        all.emplace_back(l * rows + h, &row);
      }
    }
    keep_best(all, left, kept);
  } else {
    std::vector<double> weights;
    std::vector<index_t> ceilings;
    for (index_t l = 0; l < std::ssize(layers); ++l) {
      const layer_model& layer = layers[static_cast<std::size_t>(l)];
      index_t sum = 0, most = 0;
      for (index_t h = 0; h < rows; ++h) {
        const index_t free = layer.rows[static_cast<std::size_t>(h)].units - std::ssize(kept[l * rows + h]);
        sum += free;
        most = std::max(most, free);
      }
      if constexpr (std::is_same_v<Budget, cake_budget>) {
        weights.push_back(std::pow(layer.entropy, 1 / static_cast<double>(budget.entropy_temperature)) *
                          std::pow(layer.variance, 1 / static_cast<double>(budget.variance_temperature)));
        ceilings.push_back(most);
      } else {
        weights.push_back(entropy_of_scores(layer));
        ceilings.push_back(sum);
      }
    }
    constexpr bool competing = std::is_same_v<Budget, lava_budget>;
    const auto counts = by_quotients(weights, ceilings, competing ? left : left / rows);
    for (index_t l = 0; l < std::ssize(layers); ++l) {
      std::vector<std::pair<index_t, const layer_model::row*>> of_layer;
      for (index_t h = 0; h < rows; ++h) {
        of_layer.emplace_back(l * rows + h, &layers[static_cast<std::size_t>(l)].rows[static_cast<std::size_t>(h)]);
        if (!competing) keep_best({of_layer.back()}, counts[static_cast<std::size_t>(l)], kept);
      }
      if (competing) keep_best(of_layer, counts[static_cast<std::size_t>(l)], kept);
    }
  }
  return kept;
}

std::vector<index_t> tokens_of(const unit_set& units, const sequence_span& span, index_t unit) {
  std::vector<index_t> tokens;
  for (const index_t u : units) {
    for (index_t n = u * unit; n < std::min(span.length, (u + 1) * unit); ++n) tokens.push_back(span.begin + n);
  }
  return tokens;
}

std::vector<index_t> row_of(const kept_tokens& kept, index_t b, index_t h) {
  std::vector<index_t> row;
  for (index_t i = 0; i < kept.lengths(b, h); ++i) row.push_back(kept.positions(b, h, i));
  return row;
}

/// Adds every layer; after each compares all of them with a choice at once, by position and by slot. False where the
/// plan or a layer refused.
template <class Policy, class Budget>
bool check_cascade(const Policy& policy, const Budget& budget, const random_model& model, index_t& evicted) {
  reference_backend backend;
  const index_t count = model.count();
  model_plan<Policy, Budget> plan;
  if (!make_model_plan(backend, policy, budget, shape_of(model.view(0), 0, count), plan).ok()) return false;
  std::vector<std::byte> state(plan.state_bytes), space(plan.workspace_bytes);
  model_selection selection(backend, plan, workspace(state));
  std::vector<std::vector<layer_model>> models;  // [batch][layer]
  models.resize(static_cast<std::size_t>(model.sizes.batch));
  std::map<std::array<index_t, 3>, std::vector<index_t>> caches;  // (layer, sequence, head) -> positions, compacted
  for (index_t l = 0; l < count; ++l) {
    const status outcome = selection.add_layer(backend, model.view(l), workspace(space));
    if (!outcome.ok()) {
      INFO(outcome.message());
      CHECK(selection.layers() == l);
      CHECK((!model.mask.empty() || !model.head_lengths.empty()));  // nothing else may be refused
      return false;
    }
    const auto of_layer = model_of(policy, model.view(l), l, count);
    const index_t heads = plan.layer.heads;
    const index_t rows = plan.layer.rows;
    for (index_t b = 0; b < model.sizes.batch; ++b) {
      auto& layers = models[static_cast<std::size_t>(b)];
      layers.push_back(of_layer[static_cast<std::size_t>(b)]);
      index_t longest = 0, protected_units = 0;
      for (const auto& row : layers[0].rows) longest = std::max(longest, row.span.length);
      for (index_t first = 0; first < longest; first += policy.granularity.tokens) {
        const index_t end = first + policy.granularity.tokens;
        protected_units += first < policy.protect.sink || end > longest - policy.recent() ? 1 : 0;
      }
      const auto expected = choose_at_once(layers, budget, count, policy.granularity.tokens, protected_units);
      index_t total = 0;
      for (index_t k = 0; k <= l; ++k) {
        for (index_t h = 0; h < heads; ++h) {
          const index_t r = h * rows / heads;
          const sequence_span span = layers[static_cast<std::size_t>(k)].rows[static_cast<std::size_t>(r)].span;
          const auto tokens = tokens_of(expected.at(k * rows + r), span, policy.granularity.tokens);
          CAPTURE(l, b, k, h, policy.granularity.tokens, plan.layer.rows, budget.least);
          CHECK(row_of(selection.kept(k), b, h) == tokens);
          CHECK(selection.length(k, b, h) == std::ssize(tokens));
          // What the engine's cache holds after compacting by slots.
          auto& cache = caches[{k, b, h}];
          if (k == l) {
            cache.resize(static_cast<std::size_t>(model.sizes.tokens));
            std::iota(cache.begin(), cache.end(), index_t{0});
          }
          std::vector<index_t> compacted;
          for (const index_t slot : row_of(selection.cache_slots(k), b, h)) {
            compacted.push_back(cache.at(static_cast<std::size_t>(slot)));
          }
          CHECK(compacted == tokens);
          if (k < l && !selection.evicted(k)) CHECK(compacted == cache);
          cache = compacted;
          total += std::ssize(tokens);
          evicted += l + 1 == count ? span.length - std::ssize(tokens) : 0;
        }
      }
      CHECK(selection.total(b) == total);
    }
  }
  CHECK_FALSE(selection.add_layer(backend, model.view(0), workspace(space)).ok());
  return true;
}

template <class Policy, class MakeBudget>
void check_many(unsigned seed, const MakeBudget& make_budget) {
  random_engine random(seed);
  index_t done = 0, evicted = 0;
  for (int trial = 0; trial < 120; ++trial) {
    const int kind = trial % 4;
    const random_model model = random_layers(random, kind);
    auto policy = random_policy<Policy>(random);
    if (kind == 3) policy.granularity.shared = false;
    CAPTURE(trial, kind);
    done += check_cascade(policy, make_budget(random, model.sizes.tokens), model, evicted) ? 1 : 0;
  }
  CHECK(done > 50);
  CHECK(evicted > 1000);
}

}  // namespace

TEST_CASE("CAKE: the cascade is one choice over all layers, and never beyond the budget") {
  check_many<cake_policy>(1, [](random_engine& random, index_t tokens) {
    return cake_budget{.budget = random_size(random, tokens),
                       .least = pick(random, 0, 2),
                       .entropy_temperature = chance(random, 50) ? 1.0f : 1.6f,
                       .variance_temperature = chance(random, 50) ? 1.0f : 0.4f};
  });
}

TEST_CASE("LAVa: layers by entropy, heads by competition") {
  check_many<lava_policy>(2, [](random_engine& random, index_t tokens) {
    return lava_budget{.budget = random_size(random, tokens), .least = pick(random, 0, 2)};
  });
}

TEST_CASE("global: one competition of all layers and heads") {
  check_many<cake_policy>(3, [](random_engine& random, index_t tokens) {
    return global_budget{
        .budget = random_size(random, tokens), .least = pick(random, 0, 2), .normalise = chance(random, 50)};
  });
}

TEST_CASE("32 layers: the model never holds more than its budget, and all of it in the end") {
  random_engine random(4);
  const random_model model(random, 32, {.query_heads = 4, .kv_heads = 2, .head_dim = 6, .tokens = 120, .queries = 8});
  uncounted_backend backend;
  const auto check_peak = [&](const auto& policy, const auto& budget) {
    const auto shape = shape_of(model.view(0), 0, 32);
    model_plan<std::remove_cvref_t<decltype(policy)>, std::remove_cvref_t<decltype(budget)>> plan;
    throw_if_failed(make_model_plan(backend, policy, budget, shape, plan));
    std::vector<std::byte> state(plan.state_bytes), space(plan.workspace_bytes);
    model_selection selection(backend, plan, workspace(state));
    const index_t whole = 32 * 2 * budget.budget.tokens;
    std::vector<index_t> before(64, 1000);
    for (index_t l = 0; l < 32; ++l) {
      throw_if_failed(selection.add_layer(backend, model.view(l), workspace(space)));
      CHECK(selection.total(0) <= whole);
      for (index_t k = 0; k <= l; ++k) {
        for (index_t h = 0; h < 2; ++h) {
          index_t& length = before[static_cast<std::size_t>(k * 2 + h)];
          CHECK(selection.length(k, 0, h) <= length);  // never more than it had
          length = selection.length(k, 0, h);
        }
      }
      // Early layers use what later ones will need.
      if (l < 8) CHECK(selection.total(0) == std::min((l + 1) * 2 * 120, whole - (31 - l) * 2 * (8 + budget.least)));
    }
    CHECK(selection.total(0) == whole);
    // Again, with the same memory and no other.
    throw_if_failed(selection.begin());
    CHECK(selection.layers() == 0);
    const long allocated = allocations_of([&] {
      for (index_t l = 0; l < 32; ++l) {
        throw_if_failed(selection.add_layer(backend, model.view(l), workspace(space)));
        (void)selection.kept(l);
        (void)selection.cache_slots(l / 2);
      }
    });
    CHECK(allocated == 0);
    for (std::size_t i = 0; i < 64; ++i) {
      CHECK(selection.length(static_cast<index_t>(i) / 2, 0, static_cast<index_t>(i) % 2) == before[i]);
    }
    return before;
  };
  cake_policy cake;
  cake.window = 8;
  cake.protect = {.sink = 0, .recent = 0};
  lava_policy competing;
  competing.window = 8;
  competing.protect = {.sink = 0, .recent = 0};
  const auto of_cake = check_peak(cake, cake_budget{.budget = 24});
  for (std::size_t i = 0; i < 64; i += 2) CHECK(of_cake[i] == of_cake[i + 1]);  // heads of a layer keep the same
  CHECK(std::set<index_t>(of_cake.begin(), of_cake.end()).size() > 4);
  check_peak(competing, lava_budget{.budget = 24, .least = 3});
  check_peak(cake, global_budget{.budget = 24, .least = 1});
}

TEST_CASE("layers that differ in length: never beyond the budget, nothing comes back") {
  random_engine random(8);
  reference_backend backend;
  for (int trial = 0; trial < 60; ++trial) {
    random_model model = random_layers(random, 0);
    for (index_t l = 0; l < model.count(); ++l) {
      auto& lengths = model.head_lengths.emplace_back();
      for (index_t i = 0; i < model.sizes.batch * 2; ++i) {
        lengths.push_back(static_cast<std::int32_t>(pick(random, 8, model.sizes.tokens)));
      }
    }
    auto policy = random_policy<lava_policy>(random);
    policy.granularity = {};
    const lava_budget budget{.budget = pick(random, 14, 40)};
    model_plan<lava_policy, lava_budget> plan;
    if (!make_model_plan(backend, policy, budget, shape_of(model.view(0), 0, model.count()), plan).ok()) continue;
    std::vector<std::byte> state(plan.state_bytes), space(plan.workspace_bytes);
    model_selection selection(backend, plan, workspace(state));
    std::map<std::array<index_t, 3>, std::vector<index_t>> before;
    for (index_t l = 0; l < model.count(); ++l) {
      if (!selection.add_layer(backend, model.view(l), workspace(space)).ok()) break;
      for (index_t b = 0; b < model.sizes.batch; ++b) {
        CHECK(selection.total(b) <= model.count() * plan.layer.heads * budget.budget.tokens);
        for (index_t k = 0; k <= l; ++k) {
          for (index_t h = 0; h < plan.layer.heads; ++h) {
            const auto now = row_of(selection.kept(k), b, h);
            auto& earlier = before[{k, b, h}];
            CHECK((k == l || std::includes(earlier.begin(), earlier.end(), now.begin(), now.end())));
            earlier = now;
          }
        }
      }
    }
  }
}

TEST_CASE("LAVa's score is the pooled attention times the head's largest value") {
  random_engine random(9);
  const arranged_layer<float> layer({.query_heads = 4, .kv_heads = 2, .head_dim = 6, .tokens = 40, .queries = 8}, 3);
  lava_policy policy;
  policy.window = 8;
  policy.spatial.width = 7;
  policy.group = group_reduce::max;
  policy.protect = {.sink = 0, .recent = 0};
  const auto model = model_of(policy, layer.view(), 0, 1);
  for (index_t kv = 0; kv < 2; ++kv) {
    double largest = 0;
    for (index_t n = 0; n < 32; ++n) {
      double norm = 0;
      for (index_t c = 0; c < 6; ++c) norm += std::fabs(static_cast<double>(layer.value(0, kv, n, c)));
      largest = std::max(largest, norm);
    }
    std::vector<double> most(32);
    for (index_t h = 2 * kv; h < 2 * kv + 2; ++h) {
      std::vector<double> means(32);
      for (index_t i = 0; i < 8; ++i) {
        const auto row = reference::window_attention(layer.view(), 0, h, 8, i);
        for (std::size_t n = 0; n < 32; ++n) means[n] += row.share[n] / 8;
      }
      for (std::size_t n = 0; n < 32; ++n) most[n] = std::max(most[n], means[n]);
    }
    for (std::size_t n = 0; n < 32; ++n) {
      const double pooled =
          *std::max_element(most.begin() + static_cast<std::ptrdiff_t>(n < 3 ? 0 : n - 3),
                            most.begin() + static_cast<std::ptrdiff_t>(std::min<std::size_t>(32, n + 4)));
      CHECK(model[0].rows[static_cast<std::size_t>(kv)].score[n] == Approx(pooled * largest).epsilon(1e-12));
    }
  }
}

TEST_CASE("equal scores: ties go to the smaller layer, head and position") {
  random_engine random(5);
  random_model model(random, 3, {.query_heads = 2, .kv_heads = 2, .head_dim = 4, .tokens = 20, .queries = 1});
  for (auto& layer : model.layers) std::fill_n(layer.query.data, layer.query.size(), 0.0f);
  reference_backend backend;
  cake_policy policy;
  policy.window = 1;
  policy.spatial.width = 1;
  policy.protect = {.sink = 0, .recent = 1};
  model_plan<cake_policy, global_budget> plan;
  throw_if_failed(make_model_plan(backend, policy, global_budget{.budget = 9}, shape_of(model.view(0), 0, 3), plan));
  std::vector<std::byte> state(plan.state_bytes), space(plan.workspace_bytes);
  model_selection selection(backend, plan, workspace(state));
  for (index_t l = 0; l < 3; ++l) throw_if_failed(selection.add_layer(backend, model.view(l), workspace(space)));
  // 3 * 2 * 9 = 54 tokens, 6 of them protected: 19 for each of the first two heads, 10 for the third.
  const index_t lengths[] = {20, 20, 11, 1, 1, 1};
  for (index_t i = 0; i < 6; ++i) CHECK(selection.length(i / 2, 0, i % 2) == lengths[i]);
  CHECK(row_of(selection.kept(1), 0, 0) == std::vector<index_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 19});
}

TEST_CASE("CAKE's sums are those of the attention, in entropy and variance") {
  random_engine random(6);
  const std::vector<float> rows{0.5f, 0.125f, 0.25f, 0.625f};
  CHECK(variance{}(std::span<const float>(rows)) == Approx(0.0520833333));
  CHECK(mean_variance{.gamma = 200}(std::span<const float>(rows)) == Approx(0.375 + 200 * 0.0520833333));
  CHECK(variance{}(std::span<const float>(rows).first(1)) == 0.0f);
  CHECK(variance{}(std::span<const float>{}) == 0.0f);
  const std::vector<double> near{1e8 + 1, 1e8 + 2, 1e8 + 3};
  CHECK(variance{}(std::span<const double>(near)) == Approx(1.0));
  token_features<double> token;
  token.attention = 0.25;
  CHECK(attention_entropy{}(token) == Approx(0.25 * std::log(4.0)).epsilon(1e-8));
  token.attention = 0;
  CHECK(attention_entropy{}(token) == 0.0);
  token.attention = 1;
  CHECK(attention_entropy{}(token) == 0.0);
  check_error(mean_variance{.gamma = -1}.check(), errc::invalid_argument, {-1}, "gamma");
}

TEST_CASE("numbers that are none, and models without sequences or tokens") {
  random_engine random(10);
  reference_backend backend;
  const float nan_value = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  const auto run = [&](const auto& policy, const auto& budget, const random_model& model, index_t expected) {
    const auto plan = make_model_plan(backend, policy, budget, shape_of(model.view(0), 0, model.count()));
    std::vector<std::byte> state(plan.state_bytes), space(plan.workspace_bytes);
    model_selection selection(backend, plan, workspace(state));
    for (index_t l = 0; l < model.count(); ++l) {
      throw_if_failed(selection.add_layer(backend, model.view(l), workspace(space)));
      for (index_t i = 0; i <= l; ++i) {
        const kept_tokens kept = selection.kept(i);
        CHECK(check_kept(kept, model.sizes.batch, 2, model.sizes.tokens).ok());
      }
    }
    for (index_t b = 0; b < model.sizes.batch; ++b) CHECK(selection.total(b) == expected);
  };
  const auto run_all = [&](const random_model& model, index_t expected) {
    cake_policy cake;
    cake.window = 4;
    cake.protect = {.sink = 0, .recent = 0};
    lava_policy competing;
    competing.window = 4;
    competing.protect = {.sink = 0, .recent = 0};
    run(cake, cake_budget{.budget = 12}, model, expected);
    run(competing, lava_budget{.budget = 12}, model, expected);
    run(cake, global_budget{.budget = 12, .normalise = true}, model, expected);
  };
  random_model damaged(random, 4, {.query_heads = 4, .kv_heads = 2, .head_dim = 4, .tokens = 30, .queries = 4});
  for (const float bad : {nan_value, infinity, -infinity, 1e38f}) {
    damaged.layers[1].key(0, 1, 7, 2) = bad;
    damaged.layers[2].value(0, 0, 9, 1) = bad;
    damaged.layers[3].query(0, 2, 3, 0) = bad;
    run_all(damaged, 4 * 2 * 12);
  }
  std::fill_n(damaged.layers[0].key.data, damaged.layers[0].key.size(), nan_value);
  std::fill_n(damaged.layers[0].value.data, damaged.layers[0].value.size(), nan_value);
  run_all(damaged, 4 * 2 * 12);
  run_all(random_model(random, 2, {.batch = 0, .query_heads = 4, .kv_heads = 2, .head_dim = 4, .tokens = 30}), 0);
  run_all(random_model(random, 3, {.query_heads = 4, .kv_heads = 2, .head_dim = 4, .tokens = 0, .queries = 0}), 0);
  run_all(random_model(random, 3, {.query_heads = 4, .kv_heads = 2, .head_dim = 4, .tokens = 1, .queries = 1}), 6);
  run_all(random_model(random, 3, {.query_heads = 4, .kv_heads = 2, .head_dim = 4, .tokens = 12, .queries = 8}), 72);
}

TEST_CASE("a model that cannot be planned says why") {
  reference_backend backend;
  const problem_shape shape{.query_heads = 4, .kv_heads = 2, .head_dim = 8, .tokens = 100, .layers = 4};
  cake_policy policy;
  policy.window = 8;
  policy.protect = {.sink = 2, .recent = 8};
  const auto planned = [&](const auto& budget) {
    model_plan<cake_policy, std::remove_cvref_t<decltype(budget)>> plan;
    return make_model_plan(backend, policy, budget, shape, plan);
  };
  CHECK(planned(cake_budget{.budget = 20}).ok());
  check_error(planned(cake_budget{.budget = 9}), errc::invalid_argument, {9, 10}, "budget");
  check_error(planned(cake_budget{.budget = 20, .least = 11}), errc::invalid_argument, {20, 10, 11}, "budget");
  check_error(planned(cake_budget{.budget = 20, .least = -1}), errc::invalid_argument, {-1, 0}, "cake_budget.least");
  check_error(planned(cake_budget{.budget = 20, .entropy_temperature = 0}), errc::invalid_argument, {0}, "temperature");
  check_error(planned(lava_budget{.budget = 0}), errc::invalid_argument, {0, 1}, "lava_budget");
  check_error(planned(global_budget{.budget = budget_size::keep_ratio(2)}), errc::invalid_argument, {2},
              "global_budget");
  eviction_policy<streaming_llm, mean, no_pool, uniform> without_window;
  model_plan<decltype(without_window), cake_budget> of_positions;
  check_error(make_model_plan(backend, without_window, cake_budget{.budget = 64}, shape, of_positions),
              errc::invalid_argument, {}, "observe");

  // A workspace too small, and a mask that protects more than a layer's part.
  random_engine random(7);
  random_model model(random, 2, {.query_heads = 4, .kv_heads = 2, .head_dim = 6, .tokens = 50, .queries = 8});
  model_plan<cake_policy, global_budget> plan;
  throw_if_failed(make_model_plan(backend, policy, global_budget{.budget = 20}, shape_of(model.view(0), 0, 2), plan));
  std::vector<std::byte> state(plan.state_bytes), space(plan.workspace_bytes);
  model_selection starved(backend, plan, workspace(state.data(), 100));
  CHECK(starved.begin().code() == errc::workspace_too_small);
  CHECK(starved.add_layer(backend, model.view(0), workspace(space)).code() == errc::workspace_too_small);
  model_selection selection(backend, plan, workspace(state));
  CHECK(selection.add_layer(backend, model.view(0), workspace(space.data(), 10)).code() == errc::workspace_too_small);
  CHECK(selection.layers() == 0);
  throw_if_failed(selection.add_layer(backend, model.view(0), workspace(space)));
  const auto kept = row_of(selection.kept(0), 0, 0);
  model.mask.assign(50, 1);
  CHECK(selection.add_layer(backend, model.view(1), workspace(space)).code() == errc::invalid_argument);
  CHECK(selection.layers() == 1);
  CHECK(row_of(selection.kept(0), 0, 0) == kept);
}
