// SPDX-License-Identifier: Apache-2.0
#include "policy_parts.hpp"

#include "command.hpp"

#include <restkv/cache/rope.hpp>
#include <restkv/score/query_statistics.hpp>
#include <restkv/smoothing/key_links.hpp>

#include <algorithm>

namespace restkv::cli {

any_temporal temporal_of(const configuration& c) {
  switch (c.temporal) {
    case temporal_kind::sum: return {sum{}};
    case temporal_kind::ema: return {ema{.alpha = c.alpha}};
    case temporal_kind::last: return {last{}};
    case temporal_kind::max: return {maximum{}};
    case temporal_kind::root_sum_square: return {root_sum_square{}};
    case temporal_kind::mean: break;
  }
  return {mean{}};
}

any_spatial spatial_of(const configuration& c) {
  switch (c.spatial) {
    case spatial_kind::avgpool: return {average_pool{.width = c.kernel}};
    case spatial_kind::maxpool: return {max_pool{.width = c.kernel}};
    case spatial_kind::adaptive:
      return {adaptive_window{.min_width = c.kernel, .scale = c.scale, .shift_rule = c.shift_rule}};
    case spatial_kind::following: return {following_pool{.width = c.kernel}};
    case spatial_kind::segments: return {segment_pool{}};  // its segments depend on the layer
    case spatial_kind::none: break;
  }
  return {no_pool{}};
}

layer_segments::layer_segments(const layer_view<float>& layer, double share, const std::string& where) {
  const index_t batch = layer.key.extent(0);
  const index_t tokens = layer.key.extent(2);
  const auto size = static_cast<std::size_t>(batch * tokens);
  begins_.resize(size);
  std::vector<double> links(size);
  std::vector<double> scratch(
      static_cast<std::size_t>(std::max(key_links_scratch(layer.key.extent(3)), segments_scratch(tokens))));
  std::vector<index_t> lengths;
  for (index_t b = 0; b < batch; ++b) lengths.push_back(sequence(layer, b, 0).length);
  require(add_key_links(layer, {links.data(), {batch, tokens}}, scratch), where);
  require(find_segments({links.data(), {batch, tokens}}, lengths, {begins_.data(), {batch, tokens}}, scratch, share),
          where);
  pool_.begins = {begins_.data(), {batch, tokens}};
}

any_budget budget_of(const configuration& c) {
  switch (c.allocation) {
    case allocation_kind::pyramid: return {pyramid{.budget = c.size(), .beta = c.beta, .rounding = c.rounding}};
    case allocation_kind::adakv: return {ada_kv{.budget = c.size(), .floor = c.floor, .normalise = c.normalize}};
    default: break;
  }
  return {uniform{c.size()}};
}

rest_kv rest_kv_of(const configuration& c) {
  return {.order = c.order,
          .metric_of_distance = c.use_wo ? metric::projection : metric::identity,
          .tau = c.use_wo ? c.tau : 1.0f,  // without W_O the release does not apply it
          .normalised = c.use_norm};
}

position_score position_score_of(const configuration& c) {
  if (c.method == method_kind::streamingllm) return {.choice = streaming_llm{}};
  return {.choice = random_score{.seed = c.seed}};
}

caote_rescoring caote_rescoring_of(const configuration& c) {
  return {.output = c.rescoring == rescoring_kind::fastcaote ? caote_output::mean : caote_output::weighted};
}

namespace {

/// Mean and covariance of the queries that are there, as they will be at the positions to come where RoPE is known.
void find_query_statistics(const configuration& c, const layer_view<float>& layer, bool with_covariance,
                           cache_score& memory, const std::string& where) {
  const index_t batch = layer.query.extent(0);
  const index_t heads = layer.query.extent(1);
  const index_t rows = layer.query.extent(2);
  const index_t channels = layer.query.extent(3);
  const index_t tokens = layer.key.extent(2);
  memory.mean.assign(static_cast<std::size_t>(batch * heads * channels), 0.0);
  query_statistics_view statistics{.mean = {memory.mean.data(), {batch, heads, channels}}};
  if (with_covariance) {
    memory.covariance.assign(static_cast<std::size_t>(batch * heads * channels * channels), 0.0);
    statistics.covariance = {memory.covariance.data(), {batch, heads, channels, channels}};
  }
  std::vector<double> frequencies;
  if (c.rope_theta != 0.0) {
    frequencies.resize(static_cast<std::size_t>(channels / 2));
    require(rope_frequencies(rope_parameters<>{.rotary_dim = channels / 2 * 2, .theta = c.rope_theta}, frequencies),
            where);
  }
  std::vector<double> scratch(static_cast<std::size_t>(query_statistics_scratch(channels)));
  const index_t skipped = std::clamp<index_t>(c.n_sink - (tokens - rows), 0, rows);  // queries of the sinks
  require(query_statistics(layer.query, statistics, scratch, skipped,
                           {.frequencies = frequencies, .first_position = tokens - rows}),
          where);
  if (!frequencies.empty()) {
    require(average_rope(frequencies, rotary_pairs::half_split, tokens, c.n_future, statistics), where);
  }
}

q_filter q_filter_of(const layer_view<float>& layer, cache_score& memory, const std::string& where) {
  const index_t heads = layer.key.extent(1);
  const index_t channels = layer.query.extent(3);
  memory.filters.assign(static_cast<std::size_t>(heads * channels), 0.0f);
  std::vector<double> scratch(static_cast<std::size_t>(q_filter_scratch(channels)));
  const tensor_view<float, 2> filters(memory.filters.data(), {heads, channels});
  require(find_q_filters(layer.query, filters, scratch), where);
  return {.filters = tensor_view<const float, 2>(filters.data, filters.extents)};
}

}  // namespace

any_head_score head_score_of(const configuration& c, const layer_view<float>& layer, cache_score& memory,
                             const std::string& where) {
  switch (c.method) {
    case method_kind::keydiff: return {{.choice = key_diff{}}};
    case method_kind::lagkv:
      return {{.choice = lag_kv{.sink = c.n_sink, .lag = c.lag_size, .cross_scoring = c.cross_scoring}}};
    case method_kind::curdkv:
      return {{.choice = cur_dkv{.leverage = c.leverage_type,
                                 .local_window = c.use_local_approximation ? c.local_window_size : 0}}};
    case method_kind::leverage:
      return {{.choice = leverage_score{.sketch = c.sketch,
                                        .ridge = c.ridge,
                                        .seed = c.seed,
                                        .standardised = c.allocation != allocation_kind::uniform}}};
    case method_kind::qfilter: return {{.choice = q_filter_of(layer, memory, where)}};
    case method_kind::keyredundancy:
      return {{.choice = key_redundancy{.threshold = c.threshold, .recent = c.similar}}};
    case method_kind::valuerange: return {{.choice = value_range{}}};
    case method_kind::lacache:
      return {{.choice = la_cache_score{{.cache_size = std::min(c.size().of(layer.key.extent(2)), layer.key.extent(2)),
                                         .start = c.n_sink,
                                         .span = c.span,
                                         .overlap = c.overlap,
                                         .compensation = false}}}};  // a budget is a budget
    default: break;
  }
  return {{.choice = knorm{}}};
}

any_query_head_score query_head_score_of(const configuration& c, const layer_view<float>& layer, cache_score& memory,
                                         const std::string& where) {
  const bool with_covariance = c.method == method_kind::expectedattention && c.use_covariance;
  find_query_statistics(c, layer, with_covariance, memory, where);
  const index_t batch = layer.query.extent(0);
  const index_t heads = layer.query.extent(1);
  const index_t channels = layer.query.extent(3);
  const tensor_view<const double, 3> mean(memory.mean.data(), {batch, heads, channels});
  if (c.method == method_kind::capkv) {
    return {{.choice = cap_kv{.mean = mean, .tau = static_cast<double>(c.tau), .sink = c.n_sink, .cosine = c.cosine}}};
  }
  expected_attention score{.mean = mean,
                           .sink = c.n_sink,
                           .use_covariance = c.use_covariance,
                           .use_value_norm = c.use_vnorm,
                           .epsilon = static_cast<double>(c.epsilon)};
  if (with_covariance) score.covariance = {memory.covariance.data(), {batch, heads, channels, channels}};
  return {{.choice = score}};
}

}  // namespace restkv::cli
