// SPDX-License-Identifier: Apache-2.0
/// @file
/// One budget over all layers of a model whose heads lie on several ranks.
#pragma once

#include <restkv/distributed/heads.hpp>
#include <restkv/model/global_budget.hpp>

#include <vector>

namespace restkv::distributed {

/// One competition of all scores of all layers and heads (`global_budget`), layer after layer as they come in: what
/// `model_selection` keeps of this rank's heads in one process, bit for bit. After each layer the ranks together are
/// within the model's budget.
///
/// For each layer and sequence the ranks say what a pool says, K all_reduces of 2 KB (K: bytes of a score), and one of
/// 8 bytes a row of the layers so far: which of the scores at the cut are kept. Holds a key and a position for each
/// unit that this rank keeps and for one layer. Allocates; throws std::bad_alloc.
template <tensor_backend Backend, class Policy>
class model_heads_selection {
  using real = typename Backend::score_type;
  using key_t = order_key_t<real>;
  using layer_policy = decltype(with_parts(Policy{}, Policy{}.score, Policy{}.temporal, uniform{}));

 public:
  /// Validates a policy, whose own budget does not act, and a budget for this rank's heads: see `make_heads_plan`.
  ///
  /// Errors: those of `make_heads_plan`; what is kept for good beyond the budget; `normalise`, which compares sums over
  /// all heads.
  [[nodiscard]] status open(const Backend& backend, const Policy& policy, const global_budget& budget,
                            const problem_shape& shape, const axis_part& heads, index_t ranks) {
    const auto ll = [](index_t n) { return static_cast<long long>(n); };
    RESTKV_RETURN_IF_FAILED(budget.check());
    if (budget.normalise) {
      return status::error(errc::unsupported, "global_budget.normalise on several ranks: it needs the layer's sums");
    }
    problem_shape first = shape;
    first.layer = 0;
    RESTKV_RETURN_IF_FAILED(make_heads_plan(backend,
                                            with_parts(policy, policy.score, policy.temporal, uniform{budget.budget}),
                                            first, heads, ranks, plan_));
    const budget_problem longest =
        restkv::detail::budget_of_span(plan_.local.policy, first, plan_.local.rows, shape.tokens);
    const index_t per_head = budget_size(budget.budget).of(longest);
    const index_t held = longest.protected_tokens() + std::min(budget.least, longest.candidates);
    if (held > per_head) {
      return status::error(errc::invalid_argument, "the budget is %lld per head, %lld are protected or kept at least",
                           ll(per_head), ll(held));
    }
    budget_ = budget;
    memory_.resize(plan_.workspace_bytes);
    layers_.clear();
    totals_.assign(static_cast<std::size_t>(shape.batch), 0);
    reserved_ = held_ = totals_;
    return {};
  }

  /// Ranks the next layer and evicts what is beyond the budget, from it and from those before. Called on every rank.
  ///
  /// Errors, with no layer added: those of `select_heads`; a layer too many; one that keeps more for good than its part
  /// of the budget. After a failure of the communicator what is kept is no longer the same on all ranks: begin again by
  /// `open`.
  template <element T, communicator Ranks>
  [[nodiscard]] status add_layer(Backend& backend, const layer_view<T>& layer, Ranks& ranks) {
    const index_t layers = plan_.local.shape.layers;
    plan_.local.shape.layer = std::min(std::ssize(layers_), layers - 1);
    const workspace whole(memory_.data(), memory_.size());
    workspace space = whole;
    return detail::with_heads_run(
        backend, plan_, layer, ranks, space, [&](auto& run, const auto& weigh, budget_channel& channel) -> status {
          if (std::ssize(layers_) >= layers) {
            return status::error(errc::invalid_argument, "layer %lld of a model of %lld layers",
                                 static_cast<long long>(layers_.size()), static_cast<long long>(layers));
          }
          RESTKV_RETURN_IF_FAILED(run.rank_all(weigh));
          RESTKV_RETURN_IF_FAILED(check_room(run));
          layers_.emplace_back();
          for (index_t b = 0; b < batch(); ++b) RESTKV_RETURN_IF_FAILED(take_in(run, b, channel));
          return {};
        });
  }

  /// Layers that came in.
  [[nodiscard]] index_t layers() const noexcept { return std::ssize(layers_); }

  /// The positions that head h of sequence b, of this rank's, keeps so far in layer `l`, of the layer as it came in:
  /// ascending.
  [[nodiscard]] std::vector<position_t> kept(index_t l, index_t b, index_t h) const {
    const row& of = layers_[at(l)][at(b * rows() + h * rows() / plan_.local.heads)];
    const index_t unit = plan_.local.policy.granularity.tokens;
    std::vector<position_t> positions;
    for (const entry& e : of.entries) {
      for (index_t n = e.unit * unit; n < std::min(of.span.length, (e.unit + 1) * unit); ++n) {
        positions.push_back(static_cast<position_t>(of.span.begin + n));
      }
    }
    return positions;
  }

 private:
  struct entry {
    key_t key;  ///< 0 where it is kept for good
    position_t unit;
  };
  struct row {
    sequence_span span;
    std::vector<entry> entries;
  };

  [[nodiscard]] static std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  [[nodiscard]] index_t batch() const noexcept { return plan_.local.shape.batch; }
  [[nodiscard]] index_t rows() const noexcept { return plan_.local.rows; }
  [[nodiscard]] index_t all_rows() const noexcept { return plan_.local.policy.budget.rows.whole; }

  /// Units of each row that are kept whatever their score: all heads of a sequence have as many.
  template <class Run>
  [[nodiscard]] index_t held_of(const Run& run, index_t b) const noexcept {
    const index_t candidates = run.candidates_of(b * rows());
    return run.problem_of(b * rows()).units() - candidates + std::min(budget_.least, candidates);
  }
  /// Units that each row keeps on average, by the first layer.
  template <class Run>
  [[nodiscard]] index_t mean_of(const Run& run, index_t b) const noexcept {
    const auto first = run.problem_of(b * rows());
    budget_problem problem =
        restkv::detail::budget_of_span(plan_.local.policy, plan_.local.shape, rows(), first.span.length);
    const index_t unmasked = problem.protected_tokens() + std::min(budget_.least, problem.candidates);
    problem.candidates = run.candidates_of(b * rows());
    return std::max(budget_size(budget_.budget).of(problem), unmasked);
  }
  template <class Run>
  [[nodiscard]] status check_room(const Run& run) const noexcept {
    for (index_t b = 0; b < batch(); ++b) {
      const index_t layers = plan_.local.shape.layers;
      const index_t held = all_rows() * held_of(run, b);
      const index_t room = layers_.empty() ? all_rows() * mean_of(run, b) : totals_[at(b)] / layers;
      if (held <= room) continue;
      return status::error(errc::invalid_argument,
                           "sequence %lld of layer %lld holds %lld whatever their score, the budget of a layer is %lld",
                           static_cast<long long>(b), static_cast<long long>(layers_.size()),
                           static_cast<long long>(held), static_cast<long long>(room));
    }
    return {};
  }

  template <class Run>
  [[nodiscard]] status take_in(const Run& run, index_t b, budget_channel& channel) {
    const index_t layers = plan_.local.shape.layers;
    const index_t held = all_rows() * held_of(run, b);
    if (layers_.size() == 1) {
      totals_[at(b)] = layers * all_rows() * mean_of(run, b);
      reserved_[at(b)] = held;
    }
    held_[at(b)] += held;
    for (index_t r = 0; r < rows(); ++r) {
      const std::span<const key_t> keys = run.keys_of(b * rows() + r);
      row& made = layers_.back().emplace_back();
      made.span = run.problem_of(b * rows() + r).span;
      for (std::size_t u = 0; u < keys.size(); ++u) made.entries.push_back({keys[u], static_cast<position_t>(u)});
      hold_best(made, keys);
    }
    // What all layers hold for good, those to come as the first, is not to be chosen.
    const index_t to_come = (layers - std::ssize(layers_)) * reserved_[at(b)];
    return keep_best(b, std::max<index_t>(0, totals_[at(b)] - held_[at(b)] - to_come), channel);
  }

  /// Holds the `least` best candidates of a row for good.
  void hold_best(row& of, std::span<const key_t> keys) const noexcept {
    const auto pivot =
        find_pivot<key_t>(tensor_view<const key_t, 2>(keys.data(), {1, std::ssize(keys)}), budget_.least);
    index_t equal_left = pivot.equal;
    for (entry& e : of.entries) {
      if (e.key > pivot.key || (e.key == pivot.key && equal_left-- > 0)) e.key = key_t{excluded_key};
    }
  }

  /// Keeps the `count` best candidates of all layers and ranks, ties to the smaller layer, head and position.
  [[nodiscard]] status keep_best(index_t b, index_t count, budget_channel& channel) {
    const auto add_up = [&](std::span<std::uint64_t> data) { return channel.add_up(channel.ranks, data); };
    const auto row_of = [&](std::vector<row>& layer, index_t r) -> row& { return layer[at(b * rows() + r)]; };
    pivot_search<key_t> search{.k = count};
    RESTKV_RETURN_IF_FAILED(
        find_pivots(std::span(&search, 1), channel.histogram, add_up, [&](index_t, const auto& visit) {
          for (auto& layer : layers_) {
            for (index_t r = 0; r < rows(); ++r) {
              for (const entry& e : row_of(layer, r).entries) visit(e.key);
            }
          }
        }));
    const axis_part& part = plan_.local.policy.budget.rows;
    std::vector<std::uint64_t> equal(layers_.size() * at(all_rows()));  // [layers, rows of the layer]
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      for (index_t r = 0; r < rows(); ++r) {
        for (const entry& e : row_of(layers_[l], r).entries) {
          equal[l * at(all_rows()) + at(part.first + r)] += e.key == search.found.key ? 1 : 0;
        }
      }
    }
    RESTKV_RETURN_IF_FAILED(add_up(equal));
    index_t left = search.found.equal;
    for (std::uint64_t& share : equal) {
      share = static_cast<std::uint64_t>(std::min(left, static_cast<index_t>(share)));
      left -= static_cast<index_t>(share);
    }
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      for (index_t r = 0; r < rows(); ++r) {
        auto equal_left = static_cast<index_t>(equal[l * at(all_rows()) + at(part.first + r)]);
        std::erase_if(row_of(layers_[l], r).entries, [&](const entry& e) {
          if (e.key == excluded_key || e.key > search.found.key) return false;
          return !(e.key == search.found.key && equal_left-- > 0);
        });
      }
    }
    return {};
  }

  heads_plan<layer_policy> plan_{};
  global_budget budget_{};
  std::vector<std::byte> memory_{};
  std::vector<std::vector<row>> layers_{};  // [layers][batch * rows]
  std::vector<index_t> totals_{};           // [batch], units that the model keeps
  std::vector<index_t> reserved_{};         // [batch], units that a layer to come will hold for good
  std::vector<index_t> held_{};             // [batch], units held for good so far
};

}  // namespace restkv::distributed
