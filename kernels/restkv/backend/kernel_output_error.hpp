// SPDX-License-Identifier: Apache-2.0
/// @file
/// `output_error` on a `kernel_backend`: what a kept set costs, without bringing keys and values to the host.
///
///     output_error_plan plan;
///     plan_output_error(shape, {.queries = 32, .hidden = 4096, .metric = true}, plan);
///     // device memory: plan.workspace_bytes, and plan.table_elements() doubles
///     output_error(backend, plan, kept, layer, tables, workspace);  // enqueues
///     // copy the tables to the host when they are done
///     read_output_errors(plan, layer, copied, errors);              // errors.mean_relative(), errors.summary(h), ...
#pragma once

#include <restkv/backend/kernel_backend.hpp>
#include <restkv/cache/gather.hpp>
#include <restkv/kernel/verified_deletions.hpp>
#include <restkv/kernel/verified_projection.hpp>
#include <restkv/verify/output_errors.hpp>

namespace restkv {

/// What is to be verified.
struct output_error_options {
  index_t queries = 0;     ///< the last of `layer.query`
  index_t kept_heads = 0;  ///< of the kept set; 0: one per KV head
  index_t hidden = 0;      ///< rows of layer.projection; 0: without it
  bool metric = false;     ///< whether layer.metric is there; needed with a projection
};

/// Sizes and working memory of `output_error` for layers of a shape or shorter ones.
struct output_error_plan {
  problem_shape shape{};            ///< of the longest layer
  output_error_options options{};   ///< what is asked for
  index_t split_tokens = 0;         ///< tokens of a block's split
  index_t splits = 0;               ///< of the longest sequence
  std::size_t workspace_bytes = 0;  ///< in the backend's memory

  /// The tables of heads, [batch, query_heads, queries], by the names that `output_errors` gives them. The last two
  /// hold 0 without a metric.
  enum head_table : index_t {
    head,
    head_output_norm,
    head_predicted,
    evicted_mass,
    head_projected,
    head_projected_predicted,
    head_tables
  };
  /// The tables of the layer, [batch, queries]; they follow those of the heads.
  enum layer_table : index_t { layer, layer_output_norm, layer_predicted, layer_tables };

  /// Doubles that the tables take.
  [[nodiscard]] constexpr index_t table_elements() const noexcept { return begin(layer_tables); }
  ///@{
  /// Where a table begins among them.
  [[nodiscard]] constexpr index_t begin(head_table table) const noexcept {
    return table * shape.batch * shape.query_heads * options.queries;
  }
  [[nodiscard]] constexpr index_t begin(layer_table table) const noexcept {
    return begin(head_tables) + table * shape.batch * options.queries;
  }
  ///@}
};

namespace detail {

/// The working memory of `output_error` in the backend's memory.
struct output_error_memory {
  kernel::verified_span* spans;         ///< [batch, kv_heads]
  std::uint32_t* kept;                  ///< [batch, kept_heads, words]
  kernel::verified_masses* mass_parts;  ///< [lanes, splits]
  kernel::verified_masses* masses;      ///< [lanes]
  double* output_parts;                 ///< [lanes, splits, 2, head_dim]
  kernel::verified_rows rows{};
  double* value_norms = nullptr;   ///< [batch, query_heads, tiles, token_tile]
  double* deletion_parts;          ///< [lanes, splits, 2]
  double* head_squares = nullptr;  ///< [lanes, hidden tiles]
  double* row_squares = nullptr;   ///< [batch, queries, hidden tiles, 2]
  index_t words;
  index_t tiles;

  output_error_memory(const output_error_plan& plan, workspace& from) noexcept {
    const problem_shape& shape = plan.shape;
    const output_error_options& options = plan.options;
    const index_t lanes = shape.batch * shape.query_heads * options.queries;
    words = (shape.tokens + 31) / 32;
    tiles = (shape.tokens + kernel::token_tile - 1) / kernel::token_tile;
    spans = from.take<kernel::verified_span>(shape.batch * shape.kv_heads);
    kept = from.take<std::uint32_t>(shape.batch * options.kept_heads * words);
    mass_parts = from.take<kernel::verified_masses>(lanes * plan.splits);
    masses = from.take<kernel::verified_masses>(lanes);
    output_parts = from.take<double>(lanes * plan.splits * 2 * shape.head_dim);
    rows.change = from.take<double>(lanes * shape.head_dim);
    rows.output = from.take<double>(lanes * shape.head_dim);
    rows.other_scale = from.take<double>(lanes);
    deletion_parts = from.take<double>(lanes * plan.splits * 2);
    if (options.metric) {
      rows.through = from.take<double>(lanes * shape.head_dim);
      rows.gram_output_square = from.take<double>(lanes);
      value_norms = from.take<double>(shape.batch * shape.query_heads * tiles * kernel::token_tile);
    }
    if (options.hidden > 0) {
      const index_t hidden_tiles = kernel::verify_projection<float>::tiles(options.hidden);
      head_squares = from.take<double>(lanes * hidden_tiles);
      row_squares = from.take<double>(shape.batch * options.queries * hidden_tiles * 2);
    }
  }
};

/// Everything about the arguments that the host can see.
template <element T, memory_space Space>
[[nodiscard]] status check_verification(const output_error_plan& plan,
                                        const basic_kept_tokens<const position_t, Space>& kept,
                                        const layer_view<T, Space>& layer,
                                        const tensor_view<double, 1, Space>& tables) noexcept {
  const problem_shape& shape = plan.shape;
  const output_error_options& options = plan.options;
  RESTKV_RETURN_IF_FAILED(check_layer(layer, shape, options.queries, true, true, options.metric));
  if (options.queries > layer.query.extent(2)) {
    return status::error(errc::invalid_argument, "%lld queries are to be verified, query has %lld rows",
                         static_cast<long long>(options.queries), static_cast<long long>(layer.query.extent(2)));
  }
  if (options.hidden > 0) {
    RESTKV_RETURN_IF_FAILED(check_projection(layer, shape));
    RESTKV_RETURN_IF_FAILED(check_equal("W_O", "rows", layer.projection.extent(0), "the plan", options.hidden));
  }
  RESTKV_RETURN_IF_FAILED(check_kept_memory(kept));
  RESTKV_RETURN_IF_FAILED(check_kept_shape(kept, shape.batch, shape.kv_heads));
  RESTKV_RETURN_IF_FAILED(check_equal("the kept set", "heads", kept.heads(), "the plan", options.kept_heads));
  RESTKV_RETURN_IF_FAILED(check_view("tables", tables));
  RESTKV_RETURN_IF_FAILED(check_equal("tables", "elements", tables.extent(0), "the plan", plan.table_elements()));
  if (tables.dense()) return {};
  return status::error(errc::shape_mismatch, "tables has a stride of %lld, must be dense",
                       static_cast<long long>(tables.stride(0)));
}

/// The launches of `output_error`, for arguments that have been checked.
template <class Executor, element T>
[[nodiscard]] status launch_output_error(Executor& executor, const output_error_plan& plan,
                                         const basic_kept_tokens<const position_t, Executor::space>& kept,
                                         const layer_view<T, Executor::space>& layer, double* tables,
                                         const output_error_memory& memory) {
  const problem_shape& shape = plan.shape;
  const index_t queries = plan.options.queries;
  kernel::verified_attention<T> problem;
  problem.query = layer.query.data;
  for (std::size_t axis = 0; axis < 4; ++axis) problem.query_strides[axis] = layer.query.strides[axis];
  RESTKV_RETURN_IF_FAILED(problem.key.assign("key", layer.key));
  RESTKV_RETURN_IF_FAILED(problem.value.assign("value", layer.value));
  problem.spans = memory.spans;
  problem.kept = memory.kept;
  problem.root = std::sqrt(static_cast<double>(shape.head_dim));
  problem.words = memory.words;
  problem.batch = shape.batch;
  problem.query_heads = shape.query_heads;
  problem.kv_heads = shape.kv_heads;
  problem.kept_heads = plan.options.kept_heads;
  problem.head_dim = shape.head_dim;
  problem.queries = queries;
  problem.split_tokens = plan.split_tokens;
  problem.splits = plan.splits;
  kernel::verified_gram gram;
  if (plan.options.metric) {
    gram.data = layer.metric.gram.data;
    for (std::size_t axis = 0; axis < 3; ++axis) gram.strides[axis] = layer.metric.gram.strides[axis];
  }
  const auto table = [&](auto which) { return tables + plan.begin(which); };
  using of = output_error_plan;

  kernel::upload_table(executor, memory.spans, shape.batch * shape.kv_heads, [&](index_t i) {
    const index_t b = i / shape.kv_heads;
    const sequence_span span = sequence(layer, b, i % shape.kv_heads);
    return kernel::verified_span{static_cast<position_t>(span.begin), static_cast<position_t>(span.length),
                                 static_cast<position_t>(first_window_row(layer, b, queries)),
                                 static_cast<position_t>(queries - std::min(queries, shortest_head(layer, b)))};
  });
  kernel::for_each(executor, shape.batch * problem.kept_heads * memory.words,
                   kernel::kept_bits{kernel::kept_rows(kept), memory.kept, memory.words});
  executor.launch(kernel::verify_masses<T>{problem, memory.mass_parts}, problem.blocks());
  kernel::for_each(executor, problem.lanes(), kernel::join_masses{memory.mass_parts, memory.masses, plan.splits});
  const index_t channel_blocks =
      (shape.head_dim + kernel::verify_outputs<T>::threads - 1) / kernel::verify_outputs<T>::threads;
  executor.launch(kernel::verify_outputs<T>{problem, memory.masses, memory.output_parts, channel_blocks},
                  problem.blocks() * channel_blocks);
  executor.launch(
      kernel::verify_rows<T>{problem,
                             memory.masses,
                             memory.output_parts,
                             gram,
                             memory.rows,
                             {table(of::head), table(of::head_output_norm), table(of::head_predicted),
                              table(of::evicted_mass), table(of::head_projected), table(of::head_projected_predicted)}},
      problem.lanes());
  if (plan.options.metric) {
    executor.launch(kernel::verify_value_norms<T>{problem, gram, memory.value_norms, memory.tiles},
                    shape.batch * shape.query_heads * memory.tiles);
  }
  executor.launch(kernel::verify_deletions<T>{problem, memory.masses, gram, memory.rows, memory.value_norms,
                                              memory.tiles * kernel::token_tile, memory.deletion_parts},
                  problem.blocks());
  index_t hidden_tiles = 0;
  if (plan.options.hidden > 0) {
    const kernel::verify_projection<T> projection{layer.projection.data,
                                                  {layer.projection.stride(0), layer.projection.stride(1)},
                                                  memory.rows.change,
                                                  memory.rows.output,
                                                  memory.head_squares,
                                                  memory.row_squares,
                                                  plan.options.hidden,
                                                  shape.query_heads,
                                                  queries,
                                                  shape.head_dim};
    hidden_tiles = projection.tiles(plan.options.hidden);
    executor.launch(projection, projection.blocks(shape.batch));
  }
  kernel::for_each(
      executor, problem.lanes(),
      kernel::finish_lanes{memory.deletion_parts, plan.splits, memory.head_squares, hidden_tiles,
                           table(of::head_predicted), table(of::head_projected_predicted), table(of::head_projected)});
  kernel::for_each(
      executor, shape.batch * queries,
      kernel::finish_queries{memory.row_squares, hidden_tiles, table(of::head), table(of::head_output_norm),
                             table(plan.options.hidden > 0 ? of::head_projected_predicted : of::head_predicted),
                             shape.query_heads, queries, table(of::layer), table(of::layer_output_norm),
                             table(of::layer_predicted)});
  return {};
}

}  // namespace detail

/// Validates and sizes `output_error` for layers of `shape`. Splits are chosen from the shape alone, so that results do
/// not depend on the device. Errors: heads that do not divide each other; sizes out of range; a projection without a
/// metric (errc::missing_input): single deletions are measured with its Gram matrices.
[[nodiscard]] inline status plan_output_error(const problem_shape& shape, const output_error_options& options,
                                              output_error_plan& plan) noexcept {
  const auto ll = [](index_t n) { return static_cast<long long>(n); };
  RESTKV_RETURN_IF_FAILED(check_groups(shape.query_heads, shape.kv_heads));
  if (shape.head_dim < 1 || shape.head_dim > 4096) {
    return status::error(errc::invalid_argument, "head_dim is %lld, must be within [1, 4096]", ll(shape.head_dim));
  }
  constexpr index_t most_tokens = std::numeric_limits<position_t>::max();
  if (shape.batch < 0 || shape.tokens < 0 || shape.tokens > most_tokens) {
    return status::error(errc::invalid_argument, "%lld sequences of %lld tokens: at least 0 of at most %lld",
                         ll(shape.batch), ll(shape.tokens), ll(most_tokens));
  }
  if (options.queries < 1 || options.queries > most_tokens || options.hidden < 0) {
    return status::error(errc::invalid_argument, "%lld queries, W_O of %lld rows: at least 1 query and 0 rows",
                         ll(options.queries), ll(options.hidden));
  }
  if (options.hidden > 0 && !options.metric) {
    return status::error(errc::missing_input,
                         "W_O of %lld rows without a metric: single deletions are measured with layer.metric (see "
                         "output_metric)",
                         ll(options.hidden));
  }
  output_error_plan made{.shape = shape, .options = options};
  if (made.options.kept_heads == 0) made.options.kept_heads = shape.kv_heads;
  if (made.options.kept_heads < 0 || made.options.kept_heads % shape.kv_heads != 0 ||
      shape.query_heads % made.options.kept_heads != 0) {
    return status::error(
        errc::shape_mismatch,
        "the kept set has %lld heads: a multiple of the %lld KV heads that divides the %lld query heads "
        "is needed",
        ll(made.options.kept_heads), ll(shape.kv_heads), ll(shape.query_heads));
  }
  // Enough blocks for a large device, of 256 tokens at least.
  constexpr index_t enough_blocks = 512;
  constexpr index_t least_tokens = 256;
  constexpr index_t lanes_at_once = kernel::exact_tile<float>::vectors;
  const index_t lanes = shape.query_heads / shape.kv_heads * options.queries;
  const index_t units =
      std::max<index_t>(1, shape.batch * shape.kv_heads * ((lanes + lanes_at_once - 1) / lanes_at_once));
  const index_t most_splits = (enough_blocks + units - 1) / units;
  const index_t even = (shape.tokens + most_splits - 1) / most_splits;
  made.split_tokens = (std::max(even, least_tokens) + kernel::token_tile - 1) / kernel::token_tile * kernel::token_tile;
  made.splits = std::max<index_t>(1, (shape.tokens + made.split_tokens - 1) / made.split_tokens);
  workspace counting;
  static_cast<void>(detail::output_error_memory(made, counting));
  RESTKV_RETURN_IF_FAILED(counting.check());
  made.workspace_bytes = counting.required_bytes();
  plan = made;
  return {};
}

/// What a kept set costs the last plan.options.queries queries: fills `tables` (plan.table_elements() doubles, see
/// `output_error_plan::begin`), which `read_output_errors` turns into `output_errors` on the host. The same
/// definitions as `output_error` of the host (restkv/verify/output_error.hpp), and double throughout: products of
/// elements are exact, every sum runs in a fixed order. Both differ by the rounding of double alone.
///
/// kept: from `select`, or a set that `check_kept` has passed; layer, tables and `memory` (plan.workspace_bytes) lie in
/// the backend's memory, lengths on the host. Enqueues; nothing waits. Rows that a sequence does not have hold 0.
/// Values or weights that are not finite make figures that are not; `read_output_errors` refuses those.
///
/// Errors, before a launch: what does not fit the plan; a cache in more than 8 chunks; a workspace too small. Cost: a
/// query, head and token take 6 d multiply-adds in double; with a metric also d more and d^2 a query head and token;
/// with W_O 2 hidden d a head and query.
template <class Executor, element T>
[[nodiscard]] status output_error(
    kernel_backend<Executor>& backend, const output_error_plan& plan,
    const std::type_identity_t<basic_kept_tokens<const position_t, Executor::space>>& kept,
    const layer_view<T, Executor::space>& layer, const tensor_view<double, 1, Executor::space>& tables,
    workspace memory) {
  RESTKV_RETURN_IF_FAILED(detail::check_verification(plan, kept, layer, tables));
  const detail::output_error_memory pieces(plan, memory);
  RESTKV_RETURN_IF_FAILED(memory.check());
  if (tables.extent(0) == 0) return {};
  RESTKV_RETURN_IF_FAILED(detail::launch_output_error(backend.executor(), plan, kept, layer, tables.data, pieces));
  return backend.outcome("output errors");
}

namespace detail {

/// Fills in `output_errors`.
struct output_error_reader {
  template <element T, memory_space Space>
  [[nodiscard]] static output_errors read(const output_error_plan& plan, const layer_view<T, Space>& layer,
                                          std::span<const double> tables) {
    const index_t queries = plan.options.queries;
    output_errors made(plan.shape.batch, plan.shape.query_heads, queries);
    made.projected_ = plan.options.hidden > 0;
    made.has_head_projected_ = plan.options.metric;
    for (index_t b = 0; b < plan.shape.batch; ++b) {
      made.rows_[static_cast<std::size_t>(b)] = std::min(queries, shortest_head(layer, b));
    }
    using plan_t = output_error_plan;
    using errors_t = output_errors;
    static_assert(plan_t::head_tables == index_t{errors_t::head_entries} && plan_t::head == index_t{errors_t::error} &&
                  plan_t::head_output_norm == index_t{errors_t::output_norm} &&
                  plan_t::head_predicted == index_t{errors_t::predicted} &&
                  plan_t::evicted_mass == index_t{errors_t::mass} &&
                  plan_t::head_projected == index_t{errors_t::projected_error} &&
                  plan_t::head_projected_predicted == index_t{errors_t::projected_predicted});
    static_assert(plan_t::layer_tables == index_t{errors_t::layer_entries} &&
                  plan_t::layer == index_t{errors_t::layer_error} &&
                  plan_t::layer_output_norm == index_t{errors_t::layer_norm} &&
                  plan_t::layer_predicted == index_t{errors_t::predicted_sum});
    const auto heads = tables.first(made.head_.size());
    made.head_.assign(heads.begin(), heads.end());
    made.layer_.assign(tables.begin() + static_cast<std::ptrdiff_t>(heads.size()), tables.end());
    return made;
  }
};

}  // namespace detail

/// The figures of tables that `output_error` filled in and that were copied to the host. `layer` is the one that was
/// verified; its lengths are looked at, nothing else. Errors, with `out` as it was: another number of elements than the
/// plan's; a figure that is not finite, because a value or a weight is not (errc::invalid_argument, with its place).
template <element T, memory_space Space>
[[nodiscard]] status read_output_errors(const output_error_plan& plan, const layer_view<T, Space>& layer,
                                        std::span<const double> tables, output_errors& out) {
  RESTKV_RETURN_IF_FAILED(detail::check_equal("tables", "elements", static_cast<index_t>(tables.size()), "the plan",
                                              plan.table_elements()));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("key", "sequences", layer.key.extent(0), "the plan", plan.shape.batch));
  for (std::size_t i = 0; i < tables.size(); ++i) {
    if (std::isfinite(tables[i])) continue;
    return status::error(errc::invalid_argument,
                         "figure %zu of %zu is %g: a value, a weight of W_O or a product of them is not finite", i,
                         tables.size(), tables[i]);
  }
  out = detail::output_error_reader::read(plan, layer, tables);
  return {};
}

}  // namespace restkv
