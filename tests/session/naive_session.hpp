// SPDX-License-Identifier: Apache-2.0
// A session as lists of tokens, in double and without a thought for speed: what restkv::session is compared with. It
// shares no code with the library.
#pragma once

#include "support/random.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

namespace restkv_test {

struct naive_token {
  index_t position = 0;
  std::vector<float> key, value;
  std::vector<double> running;  // of the query heads of its KV head
  index_t observers = 0;
};

/// One token as it comes: for each head.
struct naive_input {
  std::vector<std::vector<float>> query, key, value;
  std::vector<std::vector<double>> attention;  // [query_heads][slots], where the engine gives it
};

struct naive_rule {
  index_t query_heads = 4, kv_heads = 2;
  index_t budget = 8, sink = 1, recent = 2;
  index_t mark = 12, every = 0, refresh = 1, window = 0;
  index_t slots = 0;           // of a head, speculation left out
  bool compete = false;        // heads compete for the layer's budget, without a floor
  bool shared = false;         // one set for all heads
  bool rows = false;           // attention is given
  /// The running score of a token after one more query that pays it `attention`; empty: none is kept.
  std::function<double(double running, double attention, index_t observers)> fold;
  /// What a token is worth without a running score: of query head q of its KV head.
  std::function<double(const naive_token&)> worth;
  /// What runs, as a score.
  std::function<double(double running, index_t observers)> score = [](double running, index_t) { return running; };
};

/// One layer.
struct naive_layer {
  std::vector<std::vector<naive_token>> heads;  // [kv_heads]
  std::deque<std::vector<std::vector<float>>> queries;  // the last ones, oldest first
  index_t seen = 0, since = 0, evictions = 0;

  [[nodiscard]] index_t longest() const {
    std::size_t most = 0;
    for (const auto& head : heads) most = std::max(most, head.size());
    return static_cast<index_t>(most);
  }
};

class naive_session {
 public:
  explicit naive_session(naive_rule rule, index_t layer_count = 1) : rule(std::move(rule)) {
    layers.resize(static_cast<std::size_t>(layer_count));
    for (auto& layer : layers) layer.heads.resize(static_cast<std::size_t>(this->rule.kv_heads));
  }

  naive_rule rule;
  std::vector<naive_layer> layers;

  [[nodiscard]] index_t room(const naive_layer& layer) const {
    index_t total = 0;
    for (const auto& head : layer.heads) total += static_cast<index_t>(head.size());
    index_t tokens = 0;  // counted, not computed
    while (total + (tokens + 1) * rule.kv_heads <= rule.mark * rule.kv_heads &&
           layer.longest() + tokens + 1 <= rule.slots && (rule.every == 0 || layer.since + tokens < rule.every)) {
      ++tokens;
    }
    return tokens;
  }

  void append(naive_layer& layer, const naive_input& token) {
    if (!rule.rows && room(layer) == 0) evict(layer);
    store(layer, token);
    observe(layer, token);
  }

  void store(naive_layer& layer, const naive_input& token) const {
    for (std::size_t h = 0; h < layer.heads.size(); ++h) {
      naive_token stored;
      stored.position = layer.seen;
      stored.key = token.key[h];
      stored.value = token.value[h];
      stored.running.assign(static_cast<std::size_t>(group()), 0.0);
      layer.heads[h].push_back(stored);
    }
    layer.queries.push_back(token.query);
    while (static_cast<index_t>(layer.queries.size()) > rule.window) layer.queries.pop_front();
    ++layer.seen;
    ++layer.since;
  }

  /// Softmax, term by term.
  [[nodiscard]] static std::vector<double> attention(const std::vector<float>& query,
                                                     const std::vector<naive_token>& tokens, std::size_t visible) {
    std::vector<double> shares(visible);
    double sum = 0;
    for (std::size_t n = 0; n < visible; ++n) {
      double dot = 0;
      for (std::size_t c = 0; c < query.size(); ++c) dot += double{query[c]} * double{tokens[n].key[c]};
      shares[n] = std::exp(dot / std::sqrt(static_cast<double>(query.size())));
      sum += shares[n];
    }
    for (double& share : shares) share /= sum;
    return shares;
  }

  void observe(naive_layer& layer, const naive_input& token) const {
    if (!rule.fold || layer.seen % rule.refresh != 0) return;
    for (index_t q = 0; q < rule.query_heads; ++q) {
      auto& tokens = layer.heads[static_cast<std::size_t>(q / group())];
      const std::vector<double> shares = rule.rows ? token.attention[static_cast<std::size_t>(q)]
                                                   : attention(token.query[static_cast<std::size_t>(q)], tokens,
                                                               tokens.size());
      for (std::size_t n = 0; n < tokens.size(); ++n) {
        double& running = tokens[n].running[static_cast<std::size_t>(q % group())];
        running = rule.fold(running, shares[n], tokens[n].observers);
      }
    }
    for (auto& head : layer.heads) {
      for (auto& token_of_head : head) ++token_of_head.observers;
    }
  }

  /// Brings the layer down to the budget: sinks, recent tokens, and of the others the best.
  void evict(naive_layer& layer) {
    layer.since = 0;
    if (layer.longest() <= rule.budget) return;
    struct candidate {
      double score;
      std::size_t head, slot;
    };
    std::vector<std::vector<candidate>> of_head(layer.heads.size());
    for (std::size_t h = 0; h < layer.heads.size(); ++h) {
      const std::vector<double> scores = scores_of(layer, h);
      const auto length = static_cast<index_t>(layer.heads[h].size());
      for (index_t n = rule.sink; n < length - rule.recent; ++n) {
        of_head[h].push_back({scores[static_cast<std::size_t>(n)], h, static_cast<std::size_t>(n)});
      }
    }
    if (rule.shared) {
      for (std::size_t i = 0; i < of_head[0].size(); ++i) {
        double sum = 0;
        for (const auto& head : of_head) sum += head[i].score;
        for (auto& head : of_head) head[i].score = sum / static_cast<double>(of_head.size());
      }
    }
    const auto better = [](const candidate& a, const candidate& b) {
      if (a.score != b.score) return a.score > b.score;
      return a.head != b.head ? a.head < b.head : a.slot < b.slot;
    };
    const auto base = static_cast<std::size_t>(rule.budget - rule.sink - rule.recent);
    std::vector<std::size_t> counts(of_head.size(), base);
    if (rule.compete) {
      std::vector<candidate> all;
      for (const auto& head : of_head) all.insert(all.end(), head.begin(), head.end());
      std::sort(all.begin(), all.end(), better);
      all.resize(std::min(all.size(), base * of_head.size()));
      std::fill(counts.begin(), counts.end(), std::size_t{0});
      for (const auto& one : all) ++counts[one.head];
    }
    bool dropped = false;
    for (std::size_t h = 0; h < of_head.size(); ++h) {
      std::sort(of_head[h].begin(), of_head[h].end(), better);
      std::vector<bool> gone(layer.heads[h].size(), false);
      for (std::size_t i = counts[h]; i < of_head[h].size(); ++i) gone[of_head[h][i].slot] = dropped = true;
      std::vector<naive_token> kept;
      for (std::size_t n = 0; n < gone.size(); ++n) {
        if (!gone[n]) kept.push_back(layer.heads[h][n]);
      }
      layer.heads[h] = kept;
    }
    layer.evictions += dropped ? 1 : 0;
  }

 private:
  [[nodiscard]] index_t group() const { return rule.query_heads / rule.kv_heads; }

  /// Means over the query heads of a KV head.
  [[nodiscard]] std::vector<double> scores_of(const naive_layer& layer, std::size_t h) const {
    const auto& tokens = layer.heads[h];
    std::vector<double> scores(tokens.size(), 0.0);
    for (std::size_t n = 0; n < tokens.size(); ++n) {
      if (rule.fold) {
        for (const double running : tokens[n].running) scores[n] += rule.score(running, tokens[n].observers);
      } else if (rule.worth) {
        scores[n] = rule.worth(tokens[n]) * static_cast<double>(group());
      }
    }
    if (!rule.fold && !rule.worth) {  // the mean attention of the window
      for (std::size_t i = 0; i < layer.queries.size(); ++i) {
        const std::size_t visible = tokens.size() - layer.queries.size() + i + 1;
        for (index_t j = 0; j < group(); ++j) {
          const auto& query = layer.queries[i][static_cast<std::size_t>(static_cast<index_t>(h) * group() + j)];
          const std::vector<double> shares = attention(query, tokens, visible);
          for (std::size_t n = 0; n < visible; ++n) scores[n] += shares[n] / static_cast<double>(layer.queries.size());
        }
      }
    }
    for (double& score : scores) score /= static_cast<double>(group());
    return scores;
  }
};

}  // namespace restkv_test
