// SPDX-License-Identifier: Apache-2.0
/// @file
/// `model_selection` on a backend with memory of a device: one selection over all layers, with nothing read back.
#pragma once

#include <restkv/model/bulk_layer_sums.hpp>
#include <restkv/model/model_selection.hpp>

#include <array>

namespace restkv {

/// `model_selection` where tensors and memory are a device's: `state`, the workspace and what comes out lie there,
/// lengths and masks in the host's memory. The sets are the CPU's, given the same scores; logarithms and powers of a
/// budget's preference may differ in their last bit on a device, and move a share that lies on the border of two
/// numbers.
///
/// The host waits for nothing and never learns what was kept, so there are no lengths, totals and no `evicted`: compact
/// every layer so far after each one that comes in. Calls may be captured in a CUDA graph, from the first layer to the
/// last. Memory: 20 bytes for each unit that the model keeps and for each of one whole layer.
///
/// A budget of your own has RESTKV_HD on its `preference` or `scale`. Rescorers do not run on a device, nor scores of
/// whole heads.
template <bulk_backend Backend, class Policy, model_budget Budget>
requires(detail::space_of<Backend>() == memory_space::device) class model_selection<Backend, Policy, Budget> {
  using plan_t = model_plan<Policy, Budget>;
  using state_t = detail::bulk_model_state<Backend, plan_t>;
  using scratch_t = detail::bulk_model_scratch<Backend, plan_t>;
  using attention_t =
      std::conditional_t<needs_attention<Budget>(), detail::attention_sums<Backend>, detail::no_attention_sums>;

 public:
  static constexpr memory_space space = detail::space_of<Backend>();  ///< of all tensors
  using kept_type = basic_kept_tokens<position_t, space>;             ///< what a layer keeps

  /// Begins with no layer, for a plan made for the backend. `state` has plan.state_bytes of the backend's memory and
  /// must live as long as this object; `begin` says whether it is large enough.
  model_selection(const Backend&, const model_plan<Policy, Budget>& plan, workspace state)
      : plan_(plan),
        state_(plan_, state),
        fits_(state.check()),
        room_(plan_, totals_.data(), reserved_.data(), held_.data()) {
    if (fits_.ok()) fits_ = detail::check_bulk_plan<Backend>(plan_.layer);  // it may be another backend's
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

  /// Ranks the next layer and evicts what is beyond the budget, from it and from those before. Enqueues. `space` has
  /// plan.workspace_bytes of the backend's memory; it may be used again by what is enqueued later, as the layer may.
  ///
  /// Errors, before anything is enqueued: those of `select`; a layer too many; a layer that holds more than its part of
  /// the budget whatever the scores. After a launch that fails, `begin` again.
  template <element T>
  [[nodiscard]] status add_layer(Backend& backend, const layer_view<T, space>& layer, workspace memory) {
    RESTKV_RETURN_IF_FAILED(fits_);
    RESTKV_RETURN_IF_FAILED(room_.check_layer(layers_));
    plan_.layer.shape.layer = layers_;
    return detail::with_bulk_selection(backend, plan_.layer, layer, memory, nullptr, [&](auto& run) -> status {
      scratch_t scratch(backend, plan_, state_.pool.rows(), memory);
      attention_t attention(backend, plan_.layer.policy, plan_.layer.shape, memory);
      RESTKV_RETURN_IF_FAILED(memory.check());
      RESTKV_RETURN_IF_FAILED(run.count_candidates());
      RESTKV_RETURN_IF_FAILED(room_.check(run, layers_));
      RESTKV_RETURN_IF_FAILED(run.rank_all());
      RESTKV_RETURN_IF_FAILED(summarise(backend, layer, run, scratch, attention));
      RESTKV_RETURN_IF_FAILED(state_.pool.append(backend, layers_, run.rows(), run.keys(), run.longest_row(),
                                                 plan_.budget, scratch.summaries, scratch.pool));
      RESTKV_RETURN_IF_FAILED(evict(backend, run, scratch));
      ++layers_;
      return {};
    });
  }

  /// Layers that came in.
  [[nodiscard]] index_t layers() const noexcept { return layers_; }

  /// The positions that layer `l` keeps so far, of the layer as it came in. A view of memory of this object, for what
  /// is enqueued before the next call. Enqueues. Fails on a layer that did not come in.
  [[nodiscard]] status kept(Backend& backend, index_t l, kept_type& out) { return write(backend, l, false, out); }
  /// The same tokens by where they lie in the layer's cache, for `compact`: slots of a cache that was compacted after
  /// each layer that came in, whose heads begin at slot 0; positions, for the layer that came in last.
  [[nodiscard]] status cache_slots(Backend& backend, index_t l, kept_type& out) { return write(backend, l, true, out); }

 private:
  using numbers = std::array<index_t, static_cast<std::size_t>(detail::most_bulk_rows)>;

  [[nodiscard]] index_t batch() const noexcept { return plan_.layer.shape.batch; }

  void forget() noexcept {
    layers_ = 0;
    room_.forget();
  }

  /// What the budget may know of the layer.
  template <class T, class Run>
  [[nodiscard]] status summarise(Backend& backend, const layer_view<T, space>& layer, const Run& run,
                                 const scratch_t& scratch, [[maybe_unused]] attention_t& attention) {
    namespace bulk = detail::bulk;
    const bulk_rows& rows = run.rows();
    const index_t of_sequence = plan_.layer.rows;
    layer_summary* const summaries = scratch.summaries;
    RESTKV_RETURN_IF_FAILED(backend.for_each(
        batch(), bulk::begin_summary{rows, of_sequence, layers_, plan_.layer.shape.layers, summaries}));
    if constexpr (needs_attention<Budget>()) {
      RESTKV_RETURN_IF_FAILED(sum_attention<&layer_summary::attention_entropy>(
          backend, layer, run, scratch, attention.entropy, attention.entropy_scratch));
      RESTKV_RETURN_IF_FAILED(sum_attention<&layer_summary::attention_variance>(
          backend, layer, run, scratch, attention.variance, attention.variance_scratch));
    }
    const bulk::sum_rows sums{of_sequence, detail::tiles_of_sum(run.longest_row()), scratch.partial};
    RESTKV_RETURN_IF_FAILED(sum(backend, sums, bulk::score_terms{rows, run.keys()}));
    RESTKV_RETURN_IF_FAILED(backend.for_each(batch(), bulk::sum_into<&layer_summary::score_sum>{sums, summaries}));
    RESTKV_RETURN_IF_FAILED(sum(backend, sums, bulk::entropy_terms{rows, run.keys(), of_sequence, summaries}));
    return backend.for_each(batch(), bulk::finish_entropy{sums, summaries});
  }

  template <class Terms>
  [[nodiscard]] status sum(Backend& backend, const detail::bulk::sum_rows& sums, const Terms& terms) {
    return backend.for_each(batch() * sums.rows_per_sequence * sums.tiles, detail::bulk::sum_tiles<Terms>{terms, sums});
  }

  /// A sum over the layer's attention.
  template <double layer_summary::*Field, class T, class Run, class Request>
  [[nodiscard]] status sum_attention(Backend& backend, const layer_view<T, space>& layer, const Run& run,
                                     const scratch_t& scratch, const Request& request,
                                     typename Backend::template scratch<Request>& request_scratch) {
    const tensor_view<float, 3, space>& room = run.score_room();
    RESTKV_RETURN_IF_FAILED(backend.token_scores(request, layer, request_scratch, room));
    const detail::bulk::sum_rows sums{plan_.layer.heads, detail::tiles_of_sum(layer.key.extent(2)), scratch.partial};
    const index_t copies = plan_.layer.heads / plan_.layer.rows;
    RESTKV_RETURN_IF_FAILED(sum(
        backend, sums, detail::bulk::attention_terms{run.rows(), room.data, room.stride(1), copies, request.window}));
    return backend.for_each(batch(), detail::bulk::sum_into<Field>{sums, scratch.summaries});
  }

  /// Keeps of all layers so far what the budget holds.
  template <class Run>
  [[nodiscard]] status evict(Backend& backend, const Run& run, scratch_t& scratch) {
    constexpr bool one_pool = compares_layers<Budget>();
    const detail::bulk::pool_rows& rows = state_.pool.rows();
    index_t* const to = one_pool ? scratch.pool.wanted : scratch.chosen;
    detail::uploader<Backend, index_t, 128> chosen(backend, to);
    index_t most = 0;
    for (index_t b = 0; b < batch(); ++b) {
      const index_t count = room_.enter(run, b, layers_);
      most = std::max(most, count + room_.held(b));
      RESTKV_RETURN_IF_FAILED(chosen.add(count));
    }
    RESTKV_RETURN_IF_FAILED(chosen.flush());
    if constexpr (!one_pool) {
      RESTKV_RETURN_IF_FAILED(backend.for_each(
          batch(), detail::bulk::share_layers<Budget>{plan_.budget, rows, layers_, scratch.summaries, scratch.chosen,
                                                      state_.pool.live(), state_.preferences, scratch.ceilings,
                                                      scratch.shares, scratch.pool.wanted}));
    }
    const index_t rows_per_segment = one_pool ? rows.of_sequence() : Budget::compares_heads ? rows.rows : 1;
    return state_.pool.keep_best(backend, rows_per_segment, most, scratch.pool);
  }

  [[nodiscard]] status write(Backend& backend, index_t l, bool by_slot, kept_type& out) {
    RESTKV_RETURN_IF_FAILED(fits_);
    if (l < 0 || l >= layers_) {
      return status::error(errc::invalid_argument, "layer %lld did not come in, %lld did", static_cast<long long>(l),
                           static_cast<long long>(layers_));
    }
    const bool fresh = l + 1 == layers_;
    RESTKV_RETURN_IF_FAILED(state_.pool.write(backend, l, plan_.layer.policy.granularity.tokens, by_slot,
                                              !by_slot || fresh, state_.positions, state_.lengths));
    out = {state_.positions, state_.lengths};
    return {};
  }

  plan_t plan_;
  state_t state_;
  status fits_;
  numbers totals_{};
  numbers reserved_{};
  numbers held_{};
  detail::model_room<plan_t> room_;
  index_t layers_ = 0;
};

}  // namespace restkv
