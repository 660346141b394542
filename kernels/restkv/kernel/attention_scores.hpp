// SPDX-License-Identifier: Apache-2.0
/// @file
/// `token_scores` of the kernels: from a layer in an executor's memory to one row of scores a head.
#pragma once

#include <restkv/kernel/matrix_pieces.hpp>
#include <restkv/kernel/prune_list.hpp>
#include <restkv/kernel/score_pooled.hpp>
#include <restkv/kernel/score_queries.hpp>
#include <restkv/kernel/score_smoothed.hpp>

#include <restkv/score/head_score.hpp>

namespace restkv::kernel {

/// What the drift of a lane needs while its most attended tokens are found; see drift_select.hpp.
struct drift_lane {
  std::uint32_t key = 0;  ///< leading digits of the pivot that are known
  position_t wanted = 0;  ///< rank that is left to find among the keys that share them
  position_t chosen = 0;  ///< most attended tokens; 0: the lane takes no part
};

/// What one split knows of a lane's most attended tokens.
struct drift_part {
  std::int64_t above = 0;  ///< sum of the positions of keys above the pivot
  std::int64_t equal = 0;  ///< keys equal to it; then keys equal to it in the splits before
};

/// Values of a digit of the radix selection of the drift.
inline constexpr int drift_digits = 128;

/// Working memory of `token_scores` and `window_drift` in the executor's memory, carved from a workspace; with room for
/// `score_bounds` and `exact_scores` where `prunes`.
template <class Request>
class attention_scratch {
 public:
  using needs = needs_of<Request>;

  attention_scratch(const Request& request, const attention_tuning& tuning, workspace& space,
                    [[maybe_unused]] bool prunes = false) noexcept
      : drift_(space.take<double>(request.shape.batch * request.shape.query_heads),
               {request.shape.batch, request.shape.query_heads}) {
    const problem_shape& shape = request.shape;
    const index_t heads = shape.batch * shape.query_heads;
    const index_t least = std::max<index_t>(1, (tuning.split_tokens + token_tile - 1) / token_tile) * token_tile;
    const index_t most = std::max<index_t>(1, tuning.most_splits);
    const index_t even = ((shape.tokens + most - 1) / most + token_tile - 1) / token_tile * token_tile;
    split_tokens = std::max(least, even);
    splits = std::max<index_t>(1, (shape.tokens + split_tokens - 1) / split_tokens);
    tiles = std::max<index_t>(1, (shape.tokens + token_tile - 1) / token_tile);
    row_stride = tiles * token_tile;
    spans = space.take<head_span>(shape.batch * shape.kv_heads);
    if constexpr (has(needs::set, feature::mean_distance)) {
      mean_parts = space.take<float>(shape.batch * shape.kv_heads * splits * shape.head_dim);
      mean_image = space.take<float>(heads * shape.head_dim);
    }
    if (needs::image && needs_metric(request.score)) {
      const index_t width = metric_pieces<restkv::half>::width_of(shape.head_dim);
      factor_pieces = space.take<std::uint16_t>(shape.query_heads * 3 * width * width);
      factor_inverse = space.take<float>(shape.query_heads);
    }
    if constexpr (needs::window) {
      queries = std::max<index_t>(1, queries_at_once(request));
      const index_t lanes = heads * queries;
      softmax_parts = space.take<softmax_part>(lanes * splits * 2);
      softmax = space.take<lane_softmax>(lanes);
      weights = space.take<float>(most_window);
      chosen = space.take<position_t>(shape.batch);
      histogram = space.take<std::int32_t>(lanes * drift_digits);
      drift_lanes = space.take<drift_lane>(lanes);
      drift_parts = space.take<drift_part>(lanes * splits);
      const bool whole_rows = order_of(request.score) == query_order::after;
      if (streams(request) || pools(request)) running = space.take<float>(heads * row_stride);
      if (pools(request)) pool_parts = space.take<pool_sum>(lanes * splits);
      if (whole_rows) {
        rows = space.take<float>(heads * row_stride);
        if (!is_linear(request.temporal)) row_rest = space.take<float>(heads * row_stride);
        top_parts = space.take<row_top>(heads * tiles);
        tops = space.take<row_top>(heads);
      }
      if constexpr (needs::output) {
        const index_t cells = whole_rows ? heads : lanes;
        output_parts = space.take<float>(cells * splits * shape.head_dim);
        outputs.image = space.take<float>(cells * shape.head_dim);
        outputs.norm = space.take<float>(cells);
        outputs.top_distance = space.take<float>(cells);
        if (prunes) {
          const index_t score_rows = shape.batch * request.heads();
          outputs.whole = space.take<float>(cells * shape.head_dim);
          bounds.centre = space.take<float>(heads * shape.head_dim);
          bounds.radius = space.take<float>(cells);
          bounds.stretch = space.take<float>(heads);
          bounds.widen = score_slack(queries + shape.group());
          list = {space.take<position_t>(score_rows * shape.tokens), space.take<index_t>(score_rows), shape.tokens};
        }
      }
    }
  }

  /// Room for the drift of every query head. [batch, query_heads]
  [[nodiscard]] tensor_view<double, 2> drift() const noexcept { return drift_; }

  index_t split_tokens = 0;
  index_t splits = 0;
  index_t tiles = 0;       ///< of the longest sequence
  index_t row_stride = 0;  ///< of rows of tokens
  index_t queries = 0;     ///< of a head that are observed together
  head_span* spans = nullptr;
  std::uint16_t* factor_pieces = nullptr;  ///< the metric's factor, for 16-bit caches
  float* factor_inverse = nullptr;
  float* mean_parts = nullptr;
  float* mean_image = nullptr;
  softmax_part* softmax_parts = nullptr;
  lane_softmax* softmax = nullptr;
  float* weights = nullptr;
  float* rows = nullptr;
  float* row_rest = nullptr;
  row_top* top_parts = nullptr;
  row_top* tops = nullptr;
  float* output_parts = nullptr;
  output_states outputs;
  distance_bounds bounds;    ///< of certified pruning
  listed_tokens list;        ///< likewise
  float* running = nullptr;  ///< scores of a streamed window, [batch * query_heads, row_stride]
  pool_sum* pool_parts = nullptr;
  position_t* chosen = nullptr;  ///< most attended tokens, [batch]
  std::int32_t* histogram = nullptr;
  drift_lane* drift_lanes = nullptr;
  drift_part* drift_parts = nullptr;

 private:
  tensor_view<double, 2> drift_;
};

/// The softmax of the lanes of a problem: two launches.
template <class Executor, cached T, class Request>
void launch_softmax(Executor& executor, const attention_problem<T>& problem,
                    const attention_scratch<Request>& scratch) {
  using split = softmax_split<T>;
  executor.launch(split{problem, scratch.softmax_parts}, split::blocks(problem));
  const softmax_combine combine{scratch.softmax_parts, scratch.softmax,
                                problem.batch * problem.kv_heads * problem.lanes(), problem.splits * 2};
  executor.launch(combine, combine.blocks());
}

/// Sets the queries of a problem that are its lanes.
template <class Request, cached T>
void set_lanes(attention_problem<T>& problem, const attention_scratch<Request>& scratch, index_t first) noexcept {
  problem.spans = scratch.spans;
  problem.split_tokens = scratch.split_tokens;
  problem.splits = scratch.splits;
  problem.queries = scratch.queries;
  problem.first_query = first;
}

/// A request's launches.
template <class Executor, class Request, element Number, memory_space S, class Caches>
class score_launches {
  using T = cached_as<Number, Caches>;

 public:
  using needs = needs_of<Request>;

  score_launches(Executor& executor, const Request& request, const layer_view<Number, S>& layer, const Caches& caches,
                 const metric_source& metric, attention_scratch<Request>& scratch, const score_rows& out) noexcept
      : executor_(executor), request_(request), layer_(layer), caches_(caches), scratch_(scratch) {
    in_.score = request.score;
    in_.temporal = request.temporal;
    in_.reduction = request.group;
    in_.heads_of_row = request.shape.query_heads / request.heads();
    if (needs_metric(request.score)) in_.metric = metric;
    in_.out = out;
    in_.linear = is_linear(request.temporal);
  }

  /// Every score.
  [[nodiscard]] status run() {
    RESTKV_RETURN_IF_FAILED(prepare());
    if (in_.row_tiles == 0) return {};
    upload_spans(executor_, request_, layer_, scratch_.spans);
    split_factor();
    if constexpr (has(needs::set, feature::mean_distance)) launch_means();
    if constexpr (!needs::window) {
      executor_.launch(score_queries<Request, T>{in_}, in_.blocks());
      return {};
    } else {
      if (streams(request_)) {
        if constexpr (streamable<Request>()) return run_stream();
        return status::error(errc::unsupported,
                             "a window of %lld queries needs a temporal smoother that takes them one "
                             "by one",
                             static_cast<long long>(request_.window));
      }
      upload_weights();
      launch_softmax(executor_, in_.problem, scratch_);
      if constexpr (pools_attention<typename needs::score>() && needs_attention_alone<typename needs::score>()) {
        if (attention_pool_of(request_.score) > 1) return run_pooled();
      }
      launch_outputs();
      launch_scores<false>();
      return {};
    }
  }

  /// Bounds on every score.
  [[nodiscard]] status bound(const metric_spectrum& spectrum) {
    RESTKV_RETURN_IF_FAILED(prepare());
    if (in_.row_tiles == 0) return {};
    upload_spans(executor_, request_, layer_, scratch_.spans);
    split_factor();
    upload_weights();
    launch_softmax(executor_, in_.problem, scratch_);
    launch_outputs();
    const bound_distances<T> distances{in_.problem,
                                       in_.metric,
                                       needs_metric(request_.score) ? spectrum : metric_spectrum{},
                                       in_.outputs,
                                       whole_rows() ? 1 : in_.problem.queries,
                                       in_.bounds};
    executor_.launch(distances, distances.blocks());
    launch_scores<true>();
    return {};
  }

  /// The scores of the tokens that are marked `wanted`, after `bound`.
  template <memory_space O>
  [[nodiscard]] status score_wanted(const tensor_view<token_state, 3, O>& states) {
    RESTKV_RETURN_IF_FAILED(prepare());
    if (in_.row_tiles == 0) return {};
    in_.list = scratch_.list;
    const index_t rows = in_.problem.batch * in_.rows();
    for_each(executor_, rows, begin_lists{in_.list.counts});
    const index_t pieces = (in_.row_tiles * token_tile + list_wanted::threads - 1) / list_wanted::threads;
    executor_.launch(list_wanted{.spans = scratch_.spans,
                                 .window = request_.window,
                                 .kv_heads = request_.shape.kv_heads,
                                 .rows = in_.rows(),
                                 .pieces = pieces,
                                 .states = states.data,
                                 .state_strides = {states.stride(0), states.stride(1), states.stride(2)},
                                 .listed = in_.list.tokens,
                                 .counts = in_.list.counts,
                                 .stride = in_.list.stride},
                     rows * pieces);
    launch_scores<false>();
    return {};
  }

 private:
  /// Sets everything that kernels are told: no launch. No tiles: nothing to do.
  [[nodiscard]] status prepare() noexcept {
    RESTKV_RETURN_IF_FAILED(make_problem(request_, layer_, caches_, in_.problem));
    set_lanes(in_.problem, scratch_, 0);
    index_t longest = 0;
    for (index_t b = 0; b < request_.shape.batch; ++b) {
      for (index_t h = 0; h < request_.shape.kv_heads; ++h) {
        longest = std::max(longest, request_.past_of(sequence(layer_, b, h).length));
      }
    }
    in_.row_tiles = longest <= 0 ? 0 : (longest + token_tile - 1) / token_tile;
    if constexpr (needs::projected) {
      in_.projection = {layer_.projection.data,
                        layer_.projection.extent(0),
                        {layer_.projection.stride(0), layer_.projection.stride(1)}};
    }
    if (sizeof(Number) == 2 && in_.metric.factor != nullptr) {
      in_.factor = {reinterpret_cast<const Number*>(scratch_.factor_pieces), scratch_.factor_inverse,
                    metric_pieces<Number>::width_of(request_.shape.head_dim)};
    }
    in_.softmax = scratch_.softmax;
    in_.weights = scratch_.weights;
    in_.outputs = scratch_.outputs;
    in_.bounds = scratch_.bounds;
    return {};
  }

  [[nodiscard]] bool whole_rows() const noexcept { return order_of(request_.score) == query_order::after; }

  void split_factor() {
    if constexpr (sizeof(Number) == 2) {
      if (in_.factor.data == nullptr) return;
      executor_.launch(metric_split<Number>{in_.metric, request_.shape.head_dim, in_.factor.width,
                                            reinterpret_cast<Number*>(scratch_.factor_pieces), scratch_.factor_inverse},
                       request_.shape.query_heads);
    }
  }

  void upload_weights() {
    if constexpr (linear_temporal_smoother<typename needs::temporal>) {
      if (!in_.linear) return;
      const int window = static_cast<int>(request_.window);
      upload_table(executor_, scratch_.weights, request_.window, [&](index_t i) {
        return static_cast<float>(request_.temporal.weight(static_cast<int>(i), window));
      });
    }
  }

  /// What a constant 1 is smoothed to. Sequences without a past aside, all have the whole window.
  [[nodiscard]] float whole() const noexcept {
    if (!in_.linear) return 1.0f;
    double sum = 0;
    if constexpr (linear_temporal_smoother<typename needs::temporal>) {
      const int window = static_cast<int>(request_.window);
      for (int i = 0; i < window; ++i) sum += request_.temporal.weight(i, window);
    }
    return static_cast<float>(sum);
  }

  void launch_means() {
    const value_sum_split<T> split{in_.problem, scratch_.mean_parts};
    executor_.launch(split, split.blocks());
    const value_mean_image<T> image{in_.problem, scratch_.mean_parts, in_.metric, scratch_.mean_image};
    executor_.launch(image, image.blocks());
    in_.mean_image = scratch_.mean_image;
  }

  void launch_images(const row_top* tops) {
    const output_image<T> image{in_.problem, scratch_.output_parts, scratch_.softmax, tops,
                                in_.metric,  scratch_.outputs};
    executor_.launch(image, image.blocks());
  }

  /// What the scores of tokens need of their head's outputs; in the order `after`, its smoothed attention too.
  void launch_outputs() {
    if (!whole_rows()) {
      if constexpr (needs::output) {
        const output_split<T> split{in_.problem, scratch_.softmax, scratch_.output_parts};
        executor_.launch(split, split.blocks());
        launch_images(nullptr);
      }
      return;
    }
    const attention_rows<typename needs::temporal, T> rows{
        in_.problem,   in_.temporal,      in_.linear,         scratch_.weights,    scratch_.softmax,
        scratch_.rows, scratch_.row_rest, scratch_.top_parts, scratch_.row_stride, scratch_.tiles};
    executor_.launch(rows, rows.blocks());
    const row_top_combine<T> tops{in_.problem, scratch_.top_parts, scratch_.tops, scratch_.tiles};
    executor_.launch(tops, tops.blocks());
    if constexpr (needs::output) {
      const row_output_split<T> split{in_.problem, scratch_.rows, scratch_.tops, scratch_.output_parts,
                                      scratch_.row_stride};
      executor_.launch(split, split.blocks());
      launch_images(scratch_.tops);
    }
  }

  /// The scores, or the bounds.
  template <bool Bounds>
  void launch_scores() {
    if (!whole_rows()) {
      executor_.launch(score_queries<Request, T, Bounds>{in_}, in_.blocks());
    } else {
      executor_.launch(score_smoothed<Request, T, Bounds>{in_, scratch_.rows, scratch_.row_rest, scratch_.tops,
                                                          scratch_.row_stride, whole()},
                       in_.blocks());
    }
  }

  [[nodiscard]] status run_stream() {
    for (index_t first = 0; first < request_.window_of(layer_.key.extent(2)); first += scratch_.queries) {
      set_lanes(in_.problem, scratch_, first);
      launch_softmax(executor_, in_.problem, scratch_);
      const score_stream<Request, T> stream{in_, scratch_.softmax, scratch_.running, scratch_.row_stride};
      executor_.launch(stream, stream.blocks());
    }
    return fold();
  }

  [[nodiscard]] status run_pooled() {
    const index_t width = attention_pool_of(request_.score);
    if (width > score_pooled<Request, T>::most_width) {
      return status::error(errc::unsupported, "attention over %lld neighbours, the kernels average over at most %lld",
                           static_cast<long long>(width), static_cast<long long>(score_pooled<Request, T>::most_width));
    }
    const pool_sums<T> sums{in_.problem, scratch_.softmax, scratch_.pool_parts, width};
    executor_.launch(sums, sums.blocks());
    const score_pooled<Request, T> pooled{in_, scratch_.pool_parts, scratch_.running, scratch_.row_stride, width};
    executor_.launch(pooled, pooled.blocks());
    return fold();
  }

  /// From scores of query heads to rows.
  [[nodiscard]] status fold() {
    const fold_heads<T> fold{in_.problem,      scratch_.running,    in_.out,      in_.reduction,
                             in_.heads_of_row, scratch_.row_stride, in_.row_tiles};
    executor_.launch(fold, fold.blocks());
    return {};
  }

  Executor& executor_;
  const Request& request_;
  const layer_view<Number, S>& layer_;
  const Caches& caches_;
  attention_scratch<Request>& scratch_;
  score_inputs<Request, T> in_;
};

/// Where a tensor's rows of scores lie, [batch, heads, tokens].
template <memory_space O>
[[nodiscard]] score_rows rows_of(const tensor_view<float, 3, O>& out) noexcept {
  return {out.data, {out.stride(0), out.stride(1), out.stride(2)}};
}

/// The rows of scores of a request, see `tensor_backend`: fills out[b][h][0 .. past), out is [batch, heads, tokens].
/// layer, metric (the factor of output_metric_view, where the score measures in it), scratch and out lie in the
/// executor's memory; lengths on the host. caches: what keys and values are read from, the layer itself or
/// `coded_caches`. Everything is launched in order, nothing waits. Fails, and then writes no score, with `unsupported`
/// on scores of whole heads, and where a cache lies in more than token_chunks::most chunks.
///
/// Cost with W_O: head_dim^2 / 2 + 2 window head_dim multiply-adds a token and query head; a key is read two to three
/// times for every 64 lanes, a value twice.
template <class Executor, class Request, element T, memory_space S, class Caches, memory_space O>
[[nodiscard]] status token_scores(Executor& executor, const Request& request, const layer_view<T, S>& layer,
                                  const Caches& caches, const metric_source& metric,
                                  attention_scratch<Request>& scratch, const tensor_view<float, 3, O>& out) {
  using score = typename needs_of<Request>::score;
  if constexpr (head_score<score>) {
    return status::error(errc::unsupported, "scores of whole heads do not run on the kernels");
  } else {
    return score_launches(executor, request, layer, caches, metric, scratch, rows_of(out)).run();
  }
}

/// Upper bounds on the scores of a request, see `bounding_backend`; the scratch `prunes`. Errors as `token_scores`.
template <class Executor, class Request, element T, memory_space S, class Caches, memory_space O>
[[nodiscard]] status score_bounds(Executor& executor, const Request& request, const layer_view<T, S>& layer,
                                  const Caches& caches, const metric_source& metric, const metric_spectrum& spectrum,
                                  attention_scratch<Request>& scratch, const tensor_view<float, 3, O>& out) {
  if constexpr (bounded_by_distance<Request>()) {
    return score_launches(executor, request, layer, caches, metric, scratch, rows_of(out)).bound(spectrum);
  } else {
    return status::error(errc::unsupported, "the scores have no bound");
  }
}

/// The scores of the tokens that `states` [batch, heads, tokens] marks `wanted`, which are `scored` then. After
/// `score_bounds` with the same scratch.
template <class Executor, class Request, element T, memory_space S, class Caches, memory_space O>
[[nodiscard]] status exact_scores(Executor& executor, const Request& request, const layer_view<T, S>& layer,
                                  const Caches& caches, const metric_source& metric,
                                  attention_scratch<Request>& scratch, const tensor_view<token_state, 3, O>& states,
                                  const tensor_view<float, 3, O>& out) {
  if constexpr (bounded_by_distance<Request>()) {
    return score_launches(executor, request, layer, caches, metric, scratch, rows_of(out)).score_wanted(states);
  } else {
    return status::error(errc::unsupported, "the scores have no bound");
  }
}

/// The same with the layer's own metric, for executors that run in host memory.
template <class Executor, class Request, element T>
[[nodiscard]] status token_scores(Executor& executor, const Request& request, const layer_view<T>& layer,
                                  attention_scratch<Request>& scratch, const tensor_view<float, 3>& out) {
  const auto& factor = layer.metric.factor;
  return token_scores(executor, request, layer, layer,
                      metric_source{factor.data, {factor.stride(0), factor.stride(1), factor.stride(2)}}, scratch, out);
}

}  // namespace restkv::kernel
