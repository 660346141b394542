// SPDX-License-Identifier: Apache-2.0
/// @file
/// `model_selection`: one selection over all layers of a model, while they come in.
#pragma once

#include <restkv/budget/apportion.hpp>
#include <restkv/model/layer_sums.hpp>
#include <restkv/model/model_plan.hpp>
#include <restkv/select.hpp>

#include <memory>

namespace restkv {

/// Chooses the tokens of all layers together. Layers are added in order, each as soon as its keys and values are there;
/// after each, the layers so far are within the model's budget, so that a prefill that compacts as it goes never holds
/// more than the budget and the one layer that came in (the cascade of CAKE, arXiv 2503.12491). After the last layer
/// the sets are those of one choice over all layers at once: layers never get back what they lost, because a layer's
/// share, or the rank of a token, never rises when others join.
///
/// For each sequence the model keeps layers * heads * budget units exactly, counted at the length it has in the first
/// layer, or all there are. It may be less, never more, where layers differ in what they protect (lengths or masks of
/// their own), and where heads of a ragged cache do not compete. Ties go to the smaller layer, head and position; NaN
/// scores are chosen last.
///
/// It holds 12 bytes for each unit that the model keeps and for each of one whole layer (16 with double scores), and 8
/// for each token of a layer's heads. Cost: that of ranking the layers; after each, 3 passes over what is held.
template <tensor_backend Backend, class Policy, model_budget Budget>
class model_selection {
  static_assert(detail::space_of<Backend>() == memory_space::host,
                "for a backend with memory of a device include restkv/model/bulk_model_selection.hpp");
  using real = typename Backend::score_type;
  using key_t = order_key_t<real>;
  using plan_t = model_plan<Policy, Budget>;
  using memory_t = detail::model_memory<key_t, plan_t>;

 public:
  /// Begins with no layer, for a plan made for the backend. `state` has plan.state_bytes and must live as long as this
  /// object; `begin` says whether it is large enough.
  model_selection(const Backend&, const model_plan<Policy, Budget>& plan, workspace state) noexcept
      : plan_(plan),
        memory_(plan_, state),
        fits_(state.check()),
        room_(plan_, memory_.totals, memory_.reserved, memory_.held) {
    if (fits_.ok()) forget();
  }
  model_selection(const model_selection&) = delete;             ///< two would write to the same state
  model_selection& operator=(const model_selection&) = delete;  ///< likewise
  ~model_selection() = default;

  /// Forgets all layers: for the next prompt. Fails where the state was too small.
  [[nodiscard]] status begin() noexcept {
    RESTKV_RETURN_IF_FAILED(fits_);
    forget();
    return {};
  }

  /// Ranks the next layer and evicts what is beyond the budget, from it and from those before. `space` has
  /// plan.workspace_bytes and is not needed afterwards, nor is the layer.
  ///
  /// Errors, with nothing changed: those of `select`; a layer too many; a layer that holds more than its part of the
  /// budget whatever the scores.
  template <element T>
  [[nodiscard]] status add_layer(Backend& backend, const layer_view<T>& layer, workspace space) {
    RESTKV_RETURN_IF_FAILED(fits_);
    RESTKV_RETURN_IF_FAILED(room_.check_layer(layers_));
    plan_.layer.shape.layer = layers_;
    return detail::with_selection_run(backend, plan_.layer, layer, space, nullptr,
                                      [&](auto& run, const auto& weigh) -> status {
                                        RESTKV_RETURN_IF_FAILED(sum_attention(backend, layer, space, run));
                                        RESTKV_RETURN_IF_FAILED(run.rank_all(weigh));
                                        RESTKV_RETURN_IF_FAILED(room_.check(run, layers_));
                                        for (index_t b = 0; b < batch(); ++b) take_in(run, b);
                                        ++layers_;
                                        return {};
                                      });
  }

  /// Layers that came in.
  [[nodiscard]] index_t layers() const noexcept { return layers_; }
  /// Whether the layer that came in last took anything from layer `l`: whether its cache is to be compacted.
  [[nodiscard]] bool evicted(index_t l) const noexcept { return l < layers_ && memory_.dropped[l] > 0; }

  /// Tokens of layer `l` that head h of sequence b keeps so far.
  [[nodiscard]] index_t length(index_t l, index_t b, index_t h) const noexcept {
    const index_t r = row_of(h);
    const index_t row = l * rows() + r;
    const auto units = memory_.pools[b].units(row);
    if (units.empty()) return 0;
    const index_t size = unit();
    const index_t last = std::min<index_t>(span_of(l, b, r).length, (units.back() + 1) * size) - units.back() * size;
    return (std::ssize(units) - 1) * size + last;
  }
  /// Tokens of all layers and heads together, sequence b.
  [[nodiscard]] index_t total(index_t b) const noexcept {
    index_t sum = 0;
    for (index_t l = 0; l < layers_; ++l) {
      for (index_t h = 0; h < plan_.layer.heads; ++h) sum += length(l, b, h);
    }
    return sum;
  }

  /// The positions that layer `l` keeps so far, of the layer as it came in. A view of memory of this object, valid
  /// until the next call.
  [[nodiscard]] kept_tokens kept(index_t l) noexcept {
    write(l, memory_.positions, false);
    return {memory_.positions, memory_.lengths};
  }
  /// The same tokens by where they lie in the layer's cache, for `compact`: slots of a cache that was compacted after
  /// each layer that came in, whose heads begin at slot 0; positions, for the layer that came in last. A view of memory
  /// of this object, valid until the next call.
  [[nodiscard]] kept_tokens cache_slots(index_t l) noexcept {
    write(l, memory_.slot_positions, true);
    return {memory_.slot_positions, memory_.lengths};
  }

 private:
  using span_t = typename memory_t::span;

  [[nodiscard]] index_t batch() const noexcept { return plan_.layer.shape.batch; }
  [[nodiscard]] index_t rows() const noexcept { return plan_.layer.rows; }
  [[nodiscard]] index_t unit() const noexcept { return plan_.layer.policy.granularity.tokens; }
  [[nodiscard]] index_t row_of(index_t head) const noexcept { return head * plan_.layer.rows / plan_.layer.heads; }
  [[nodiscard]] span_t& span_of(index_t l, index_t b, index_t r) const noexcept {
    return memory_.spans[(l * batch() + b) * rows() + r];
  }

  void forget() noexcept {
    layers_ = 0;
    room_.forget();
    for (index_t b = 0; b < batch(); ++b) memory_.pools[b].clear();
  }

  /// The sums over the layer's attention that the budget looks at, kept in `preferences` until the layer is taken in.
  template <class T, class Run>
  [[nodiscard]] status sum_attention(Backend& backend, const layer_view<T>& layer, workspace& space, const Run& run) {
    if constexpr (needs_attention<Budget>()) {
      const auto sum_rows = [&](auto& request, auto& scratch, double* sums) -> status {
        const tensor_view<real, 3> room = run.score_room();
        RESTKV_RETURN_IF_FAILED(backend.token_scores(request, layer, scratch, room));
        for (index_t b = 0; b < batch(); ++b) {
          sums[b] = 0;
          for (index_t h = 0; h < request.heads(); ++h) {
            const index_t kv_head = h * plan_.layer.shape.kv_heads / request.heads();
            const index_t past = request.past_of(sequence(layer, b, kv_head).length);
            detail::add_tiles(sums[b], past,
                              [&](double sum, index_t n) { return sum + static_cast<double>(room(b, h, n)); });
          }
        }
        return {};
      };
      detail::attention_sums<Backend> sums(backend, plan_.layer.policy, plan_.layer.shape, space);
      RESTKV_RETURN_IF_FAILED(space.check());
      RESTKV_RETURN_IF_FAILED(sum_rows(sums.entropy, sums.entropy_scratch, memory_.entropies));
      RESTKV_RETURN_IF_FAILED(sum_rows(sums.variance, sums.variance_scratch, memory_.variances));
    }
    return {};
  }

  /// What a budget may know of the layer that comes in.
  template <class Run>
  [[nodiscard]] layer_summary summarise(const Run& run, index_t b) const noexcept {
    layer_summary summary{.layer = layers_, .layers = plan_.layer.shape.layers};
    if constexpr (needs_attention<Budget>()) {
      summary.attention_entropy = memory_.entropies[b];
      summary.attention_variance = memory_.variances[b];
    }
    for (index_t row = b * rows(); row < (b + 1) * rows(); ++row) {
      const std::span<const key_t> keys = run.keys_of(row);
      summary.candidates += run.candidates_of(row);
      detail::add_tiles(summary.score_sum, std::ssize(keys), detail::add_scores<real>{keys.data()});
    }
    if (detail::has_entropy(summary)) {
      double entropy = 0;
      for (index_t row = b * rows(); row < (b + 1) * rows(); ++row) {
        const std::span<const key_t> keys = run.keys_of(row);
        detail::add_tiles(entropy, std::ssize(keys), detail::add_entropy<real>{keys.data(), summary.score_sum});
      }
      summary.score_entropy = detail::relative_entropy(summary, entropy);
    }
    return summary;
  }

  /// Appends the layer's rows of one sequence and evicts what is too much.
  template <class Run>
  void take_in(const Run& run, index_t b) {
    detail::kept_pool<key_t>& pool = memory_.pools[b];
    const layer_summary summary = summarise(run, b);
    const double scale = detail::scale_of(plan_.budget, summary);
    for (index_t r = 0; r < rows(); ++r) {
      const auto row = run.problem_of(b * rows() + r);
      span_of(layers_, b, r) = {static_cast<position_t>(row.span.begin), static_cast<position_t>(row.span.length)};
      pool.append(run.keys_of(b * rows() + r));
      for (key_t& key : pool.keys(pool.rows() - 1)) {
        if (key != detail::held_key<key_t>) key = detail::rescaled_key<real>(key, scale);
      }
      pool.hold(pool.rows() - 1, plan_.budget.least);
    }
    if (b == 0) std::fill_n(memory_.dropped, layers_ + 1, index_t{0});
    evict(pool, b, room_.enter(run, b, layers_), summary);
  }

  /// Keeps `chosen` candidates of all layers so far.
  void evict(detail::kept_pool<key_t>& pool, index_t b, index_t chosen, const layer_summary& summary) noexcept {
    const index_t fresh = layers_ * rows();
    const index_t end = layers_ + 1;
    const auto layer_size = [&](index_t l) {
      index_t sum = 0;
      for (index_t r = 0; r < rows(); ++r) sum += pool.size(l * rows() + r);
      return sum;
    };
    for (index_t l = 0; l < end; ++l) memory_.dropped[l] += layer_size(l);
    if constexpr (compares_layers<Budget>()) {
      (void)summary;
      pool.begin_eviction();
      pool.keep_best(end * rows(), chosen, fresh);
    } else {
      double* const preferences = memory_.preferences + b * plan_.layer.shape.layers;
      preferences[layers_] = plan_.budget.preference(summary);
      const auto size = static_cast<std::size_t>(end);
      for (index_t l = 0; l < end; ++l) {
        memory_.ceilings[l] = 0;
        for (index_t r = 0; r < rows(); ++r) {
          const index_t row = l * rows() + r;
          const index_t candidates = pool.candidates(row, row + 1);
          memory_.ceilings[l] = Budget::compares_heads ? memory_.ceilings[l] + candidates
                                                       : std::max(memory_.ceilings[l], candidates);
        }
      }
      // Where heads do not compete, shares are those of one head.
      apportion({preferences, size}, {memory_.ceilings, size}, Budget::compares_heads ? chosen : chosen / rows(),
                {memory_.counts, size});
      pool.begin_eviction();
      for (index_t l = 0; l < end; ++l) {
        if constexpr (Budget::compares_heads) {
          pool.keep_best((l + 1) * rows(), memory_.counts[l], fresh);
        } else {
          for (index_t r = 0; r < rows(); ++r) pool.keep_best(l * rows() + r + 1, memory_.counts[l], fresh);
        }
      }
    }
    for (index_t l = 0; l < end; ++l) memory_.dropped[l] -= layer_size(l);
  }

  /// The tokens of a layer's units, by position or by slot.
  void write(index_t l, const tensor_view<position_t, 3>& out, bool in_cache) const noexcept {
    const index_t size = unit();
    const bool fresh = l + 1 == layers_;
    for (index_t b = 0; b < batch(); ++b) {
      for (index_t h = 0; h < plan_.layer.heads; ++h) {
        const index_t r = row_of(h);
        const index_t row = l * rows() + r;
        const auto units = memory_.pools[b].units(row);
        const auto from = in_cache ? memory_.pools[b].cache_slots(row) : units;
        const span_t& span = span_of(l, b, r);
        const index_t begin = in_cache && !fresh ? 0 : span.begin;
        position_t* const first = out.data + out.offset(b, h, 0);
        position_t* next = first;
        for (std::size_t i = 0; i < units.size(); ++i) {
          const index_t tokens = std::min<index_t>(span.length, (units[i] + 1) * size) - units[i] * size;
          for (index_t n = 0; n < tokens; ++n) *next++ = static_cast<position_t>(begin + from[i] * size + n);
        }
        memory_.lengths(b, h) = static_cast<position_t>(next - first);
      }
    }
  }

  plan_t plan_;
  memory_t memory_;
  status fits_;
  detail::model_room<plan_t> room_;
  index_t layers_ = 0;
};

}  // namespace restkv
