// SPDX-License-Identifier: Apache-2.0
/// @file
/// `eigen_backend`: the production CPU path.
#pragma once

#include <restkv/backend/eigen/bounds.hpp>
#include <restkv/backend/eigen/drift.hpp>
#include <restkv/backend/eigen/indicator.hpp>
#include <restkv/backend/eigen/head_scores.hpp>
#include <restkv/backend/eigen/observation.hpp>
#include <restkv/backend/eigen/output_metric.hpp>
#include <restkv/backend/eigen/pooled_attention.hpp>
#include <restkv/backend/eigen/streaming.hpp>
#include <restkv/backend/eigen/thread_pool.hpp>

#include <new>

namespace restkv {

/// What may be tuned without changing a kept set.
struct eigen_tuning {
  bool pruning = true;  ///< score exactly only tokens that a bound does not rule out, where the policy admits it
  /// Logits that are kept, in floats a thread, at most; a prompt that has fewer takes less. The default, 71 MB, holds four
  /// heads with a window of 32 over 139K tokens. Where the heads that share keys do not all fit, fewer are observed
  /// together and keys are read more often; where not even one fits, logits are computed again, tile by tile, each time
  /// they are read. At 128K tokens a fourth of it costs a fifth to two fifths of time. Lower it where many threads run.
  index_t kept_logits = index_t(17) << 20;
};

/// Float arithmetic on Eigen's vector layer, threads over (sequence, KV head).
///
/// Keys and values are read tile by tile, each tile once for all query heads that share it. Distances cost one triangular
/// d x d product a token and head, for the tokens that bounds do not rule out (`eigen_tuning::pruning`). Extra memory: a few
/// tiles and at most `eigen_tuning::kept_logits` a thread, two rows of scores a head, see `plan::workspace_bytes`. Results
/// do not depend on the tuning, on the number of threads, on the strides, or on how the cache is cut into chunks.
class eigen_backend {
 public:
  using score_type = float;  ///< all scores are float

  /// `threads` in all, the calling one included; values below 1 count as 1. Allocates the pool, nothing later.
  explicit eigen_backend(int threads = 1, const eigen_tuning& tuning = {}) : pool_(threads), tuning_(tuning) {}

  /// Threads in all, the calling one included.
  [[nodiscard]] int threads() const noexcept { return pool_.threads(); }
  /// As constructed.
  [[nodiscard]] const eigen_tuning& tuning() const noexcept { return tuning_; }

  /// Runs body(0) .. body(n - 1), each once, and returns when all are done.
  template <class Body>
  void parallel_for(index_t n, const Body& body) const {
    pool_.run(n, [&](index_t i, int) { body(i); });
  }

  /// Working memory of a request, carved from a workspace; see `tensor_backend`.
  template <class Request>
  class scratch {
   public:
    /// Counts where the workspace counts.
    scratch(const eigen_backend& backend, const Request& request, workspace& space) noexcept
        : drift_(space.take<double>(request.shape.batch, request.shape.query_heads),
                 {request.shape.batch, request.shape.query_heads}),
          states(request, space),
          factors(request, space),
          slots_(space.take<eigen::tile_buffers>(backend.threads())) {
      for (int i = 0; i < backend.threads(); ++i) {
        const eigen::tile_buffers buffers(request, states, backend.tuning().kept_logits, space);
        if (slots_ != nullptr && space.check().ok()) new (slots_ + i) eigen::tile_buffers(buffers);
      }
    }
    /// Room for the drift of every query head. [batch, query_heads]
    [[nodiscard]] tensor_view<double, 2> drift() const noexcept { return drift_; }
    /// One thread's tile.
    [[nodiscard]] eigen::tile_buffers& slot(int i) const noexcept { return slots_[i]; }

   private:
    tensor_view<double, 2> drift_;

   public:
    eigen::head_states states;      ///< what is kept of each head between the passes
    eigen::metric_factors factors;  ///< W_O's Cholesky factors, padded for products

   private:
    eigen::tile_buffers* slots_;
  };

  /// See `tensor_backend`.
  template <class Request, element T>
  status token_scores(const Request& request, const layer_view<T>& layer, scratch<Request>& scratch,
                      tensor_view<float, 3> out) const {
    if constexpr (eigen::needs_of<Request>::whole_heads) {
      pool_.run(request.shape.batch * request.heads(), [&](index_t unit, int slot) {
        eigen::score_heads(request, layer, unit / request.heads(), unit % request.heads(), scratch.slot(slot), out);
      });
      return {};
    } else {
      RESTKV_RETURN_IF_FAILED(observe(request, layer, scratch, false, out));
      if constexpr (!eigen::needs_of<Request>::local) return exact_scores(request, layer, scratch, {}, out);
      return {};
    }
  }

  /// Bounds need no product with W_O's factor and, in the order `before`, no product with each query's output. In the
  /// order `after` without W_O they would cost what the scores cost.
  template <class Request>
  [[nodiscard]] bool bounds_pay(const Request& request) const noexcept {
    if constexpr (eigen::needs_of<Request>::boundable) {
      return tuning_.pruning && (order_of(request.score) == query_order::before || needs_metric(request.score));
    } else {
      return false;
    }
  }

  /// See `bounding_backend`.
  template <class Request, element T>
  status score_bounds(const Request& request, const layer_view<T>& layer, scratch<Request>& scratch,
                      tensor_view<float, 3> out) const {
    return observe(request, layer, scratch, true, out);
  }

  /// See `bounding_backend`; without states, every token is scored.
  template <class Request, element T>
  status exact_scores(const Request& request, const layer_view<T>& layer, scratch<Request>& scratch,
                      tensor_view<token_state, 3> states, tensor_view<float, 3> out) const {
    pool_.run(request.shape.batch * request.heads(), [&](index_t unit, int slot) {
      const index_t b = unit / request.heads();
      const index_t row = unit % request.heads();
      const index_t kv_head = row * request.shape.kv_heads / request.heads();
      eigen::score_row(request, layer, b, row, sequence(layer, b, kv_head), states[b][row].data, scratch.factors,
                       scratch.slot(slot), scratch.states, out[b][row].data);
    });
    return {};
  }

  /// See `tensor_backend`.
  template <class Request, element T>
  status window_drift(const Request& request, const layer_view<T>& layer, std::span<const index_t> most_attended,
                      scratch<Request>& scratch, tensor_view<double, 2> out) const {
    if constexpr (!eigen::needs_of<Request>::window) {
      for (index_t i = 0; i < out.size(); ++i) out.data[i] = 0.0;
    } else {
      pool_.run(request.shape.batch * request.shape.query_heads, [&](index_t unit, int slot) {
        const index_t b = unit / request.shape.query_heads;
        const index_t head = unit % request.shape.query_heads;
        const eigen::head_task<Request> task(request, b, head, sequence(layer, b, head / request.shape.group()));
        out(b, task.head) = head_drift(task, layer, most_attended[static_cast<std::size_t>(b)], scratch.slot(slot));
      });
    }
    return {};
  }

 private:
  /// First half: attention and outputs of every head; the scores themselves where they need nothing else, or bounds on
  /// them where asked.
  template <class Request, element T>
  status observe(const Request& request, const layer_view<T>& layer, scratch<Request>& scratch, bool bound,
                 tensor_view<float, 3> out) const {
    using needs = eigen::needs_of<Request>;
    RESTKV_RETURN_IF_FAILED(scratch.factors.prepare(request, layer.metric));
    if constexpr (needs::window || has(needs::set, feature::mean_distance)) {
      pool_.run(request.shape.batch * request.shape.kv_heads, [&](index_t unit, int slot) {
        const index_t b = unit / request.shape.kv_heads;
        observe_kv_head(request, layer, b, unit % request.shape.kv_heads, tuning_.kept_logits, scratch, scratch.slot(slot),
                        bound, out);
      });
    }
    return {};
  }

  template <class Request, element T>
  static void observe_kv_head(const Request& request, const layer_view<T>& layer, index_t batch, index_t kv_head,
                              index_t kept_logits, scratch<Request>& scratch, eigen::tile_buffers& buffers, bool bound,
                              tensor_view<float, 3> out) {
    using needs = eigen::needs_of<Request>;
    const sequence_span span = sequence(layer, batch, kv_head);
    const index_t group = request.shape.group();
    const bool after = order_of(request.score) == query_order::after;
    const index_t past = request.past_of(span.length);
    if (past == 0) return;
    eigen::head_states& states = scratch.states;
    const auto task_of = [&](index_t j) {
      return eigen::head_task<Request>(request, batch, kv_head * group + j, span);
    };
    if constexpr (has(needs::set, feature::mean_distance)) {
      eigen::map_mean_values(task_of(0), layer, scratch.factors, buffers, states);
    }
    if constexpr (needs::local) {
      if (eigen::streams(request)) {
        eigen::stream_window(request, layer, batch, kv_head, span, kept_logits, buffers, out);
        return;
      }
    }
    if constexpr (!needs::window) return;
    task_of(0).fill_weights(buffers.weights, states.lanes);
    const index_t together = eigen::heads_of_block(group, states.lanes, span.length, kept_logits);
    for (index_t first = 0; first < group; first += together) {
      const index_t heads = std::min(together, group - first);
      const index_t first_head = kv_head * group + first;
      buffers.softmax.run(layer, batch, {first_head, heads, request.window_of(span.length), states.lanes}, span,
                          head_perturbation(perturbation_of(request.score), request.shape.first_query_head()));
      if constexpr (needs::pools) {
        eigen::score_pooled(request, layer, batch, span, buffers, out);
      } else if constexpr (needs::local) {
        eigen::score_locally(request, layer, batch, span, buffers, out);
      } else if (after) {
        eigen::smoothed_rows(request, layer, batch, span, buffers, states);
      } else {
        for (index_t j = first; j < first + heads; ++j) eigen::keep_softmax(task_of(j), buffers.softmax, states);
        if constexpr (needs::output) {
          eigen::outputs_per_query(request, layer, batch, span, buffers, states);
          for (index_t j = first; j < first + heads; ++j) {
            eigen::map_outputs(task_of(j), layer, scratch.factors, buffers, states);
          }
          if constexpr (needs::boundable) {
            if (bound) eigen::bound_heads(request, layer, batch, span, first_head, heads, buffers, states, out);
          }
        }
      }
    }
    if constexpr (needs::output) {
      if (after) {
        eigen::outputs_of_rows(request, layer, batch, kv_head, span, buffers, states);
        for (index_t j = 0; j < group; ++j) eigen::map_outputs(task_of(j), layer, scratch.factors, buffers, states);
        if constexpr (needs::boundable) {
          if (bound) eigen::bound_heads(request, layer, batch, span, kv_head * group, group, buffers, states, out);
        }
      }
    }
    if (needs::local || bound) {
      const index_t rows = request.heads() / request.shape.kv_heads;  // of this KV head
      for (index_t r = kv_head * rows; r < (kv_head + 1) * rows; ++r) {
        float* const row = &out(batch, r, 0);
        for (index_t n = 0; n < past; ++n) {
          row[n] = finite_score(group_finish(request.group, row[n], group / rows));
        }
        if (bound) eigen::bound_unknown(past, row);
      }
    }
  }

  /// Drift of one head: mean position of the most attended tokens, front half of the window less rear half.
  template <class Request, element T>
  static double head_drift(const eigen::head_task<Request>& task, const layer_view<T>& layer, index_t most_attended,
                           eigen::tile_buffers& buffers) {
    const index_t length = task.span.length;
    const index_t pairs = task.window / 2;
    const index_t count = std::min(most_attended, length);
    if (pairs == 0 || count <= 0) return 0.0;
    const eigen::lane_block one_head{task.head, 1, task.window, eigen::padded_lanes(task.window)};
    const index_t at_once = buffers.softmax.rows_at_once(length);
    double drift = 0;
    for (index_t first = 0; first < 2 * pairs; first += at_once) {
      const index_t rows = std::min(at_once, 2 * pairs - first);
      const std::uint32_t* const keys =
          buffers.softmax.logit_keys(layer, task.batch, one_head, task.span, first, rows);
      for (index_t i = 0; i < rows; ++i) {
        const double sum = eigen::sum_of_top_positions({keys + i * length, static_cast<std::size_t>(length)}, count);
        drift += first + i < pairs ? sum : -sum;
      }
    }
    return drift / static_cast<double>(pairs * count);
  }

  eigen::thread_pool pool_;
  eigen_tuning tuning_;
};

static_assert(tensor_backend<eigen_backend>);

}  // namespace restkv
