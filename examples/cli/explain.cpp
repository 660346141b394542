// SPDX-License-Identifier: Apache-2.0
#include "explain.hpp"

#include "command.hpp"

#include <restkv/reference/window_attention.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace restkv::cli {

namespace {

using vector = std::vector<double>;

double norm_of(const vector& x) { return std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0)); }

/// ||x||, or ||W[h] x||.
double measured_norm(const layer_view<float>& layer, bool through_wo, index_t head, const vector& x) {
  if (!through_wo) return norm_of(x);
  const auto channels = static_cast<index_t>(x.size());
  double squares = 0;
  for (index_t r = 0; r < layer.projection.extent(0); ++r) {
    double image = 0;
    for (index_t c = 0; c < channels; ++c) {
      image += static_cast<double>(layer.projection(r, head * channels + c)) * x[static_cast<std::size_t>(c)];
    }
    squares += image * image;
  }
  return std::sqrt(squares);
}

observed_token observe(const configuration& c, const layer_view<float>& layer, index_t query_head, index_t token) {
  const index_t tokens = layer.key.extent(2);
  const index_t kv_head = query_head / (layer.query.extent(1) / layer.key.extent(1));
  const index_t window = std::min({c.window_of(layer), layer.query.extent(2), tokens});
  std::vector<vector> values;
  for (index_t n = 0; n < tokens; ++n) values.push_back(reference::token_row(layer.value, 0, kv_head, n));
  observed_token observed{.query_head = query_head};
  index_t queries = 0;
  for (index_t i = std::max<index_t>(0, token - (tokens - window)); i < window; ++i) {
    const auto row = reference::window_attention(layer, 0, query_head, window, i);
    vector change(values[0].size());  // o - v, as the sum of a (v_n - v): what is v itself does not cancel
    const vector& value = values[static_cast<std::size_t>(token)];
    for (std::size_t n = 0; n < row.logit.size(); ++n) {
      for (std::size_t channel = 0; channel < change.size(); ++channel) {
        change[channel] += row.share[n] * (values[n][channel] - value[channel]);
      }
    }
    const double attention = row.share[static_cast<std::size_t>(token)];
    observed.attention += attention;
    observed.most_attention = std::max(observed.most_attention, attention);
    observed.odds += attention / std::max(row.rest(token), least_rest);
    observed.distance += measured_norm(layer, c.measures_through_wo(), query_head, change);
    ++queries;
  }
  if (queries == 0) return observed;
  for (double* const sum : {&observed.attention, &observed.odds, &observed.distance}) {
    *sum /= static_cast<double>(queries);
  }
  return observed;
}

/// Ranks the units of a row, and finds the cut.
void rank(const configuration& c, const selection& chosen, const std::vector<bool>& kept, explanation& e) {
  const auto tokens = static_cast<index_t>(kept.size());
  const index_t window = c.observes() && !c.scores_window() ? c.window : 0;
  const index_t recent = std::min(tokens, std::max(window, c.protected_recent()));
  const index_t units = (tokens + c.unit - 1) / c.unit;
  const auto score_of = [&](index_t unit) {
    double score = 0;
    index_t count = 0;
    for (index_t n = unit * c.unit; n < std::min(tokens, (unit + 1) * c.unit); ++n, ++count) {
      const double own = chosen.smoothed[static_cast<std::size_t>(e.head * chosen.past + n)];
      score = count == 0 ? own : c.reduce == unit_reduce::maximum ? std::max(score, own) : score + own;
    }
    return c.reduce == unit_reduce::mean ? score / static_cast<double>(count) : score;
  };
  std::vector<ranked_unit> ranking;
  for (index_t u = 0; u < units; ++u) {
    const bool is_protected = u * c.unit < c.n_sink || (u + 1) * c.unit > tokens - recent;
    if (!is_protected) ranking.push_back({u * c.unit, score_of(u)});
  }
  const auto is_better = [](const ranked_unit& a, const ranked_unit& b) {
    if (std::isnan(a.score) != std::isnan(b.score)) return std::isnan(b.score);
    return a.score > b.score || (!(b.score > a.score) && a.first < b.first);
  };
  std::sort(ranking.begin(), ranking.end(), is_better);
  e.candidates = static_cast<index_t>(ranking.size());
  for (index_t i = 0; i < e.candidates; ++i) {
    const ranked_unit& unit = ranking[static_cast<std::size_t>(i)];
    const bool is_kept = kept[static_cast<std::size_t>(unit.first)];
    e.chosen += is_kept ? 1 : 0;
    if (is_kept) e.last_kept = unit;
    if (!is_kept && !e.first_dropped) e.first_dropped = unit;
    if (unit.first != e.token / c.unit * c.unit) continue;
    e.rank = i + 1;
    e.unit_score = unit.score;
  }
  if (e.rank > 0) return;
  e.protected_as = e.token < c.n_sink ? "sink" : e.token >= tokens - recent ? "recent" : "rest of a unit";
}

}  // namespace

explanation explain(const configuration& c, const layer_view<float>& layer, const selection& chosen, index_t head,
                    index_t token, const std::string& where) {
  const index_t tokens = layer.key.extent(2);
  if (head >= chosen.heads) {
    throw input_error(fmt::format("{}: head {} does not exist: the kept set has {}", where, head, chosen.heads));
  }
  if (token >= tokens)
    throw input_error(fmt::format("{}: token {} does not exist: there are {}", where, token, tokens));
  explanation e;
  e.head = head;
  e.token = token;
  const index_t query_heads = layer.query.data == nullptr ? layer.key.extent(1) : layer.query.extent(1);
  const index_t kv_head = head * layer.key.extent(1) / chosen.heads;
  e.key_norm = norm_of(reference::token_row(layer.key, 0, kv_head, token));
  e.value_norm = norm_of(reference::token_row(layer.value, 0, kv_head, token));
  const index_t group = query_heads / chosen.heads;
  for (index_t j = 0; c.observes() && j < group; ++j) e.observed.push_back(observe(c, layer, head * group + j, token));
  if (token < chosen.past) {
    e.score = chosen.score[static_cast<std::size_t>(head * chosen.past + token)];
    e.smoothed = chosen.smoothed[static_cast<std::size_t>(head * chosen.past + token)];
  }
  std::vector<bool> kept(static_cast<std::size_t>(tokens), false);
  for (const position_t n : chosen.kept_of(head)) kept[static_cast<std::size_t>(n)] = true;
  e.kept = kept[static_cast<std::size_t>(token)];
  e.head_length = chosen.lengths[static_cast<std::size_t>(head)];
  e.mean_length = static_cast<double>(chosen.kept().total()) / static_cast<double>(chosen.heads);
  rank(c, chosen, kept, e);
  return e;
}

}  // namespace restkv::cli
