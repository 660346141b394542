// SPDX-License-Identifier: Apache-2.0
// An account of every page and token of examples/engine, kept apart from it: what a cache must hold is a mask over all
// tokens that a sequence ever had, who holds a page is counted from the tables, and attention is computed in double
// from the recording, which never was in pages.
#pragma once

#include "support/catch.hpp"

#include <engine/scheduler.hpp>

#include <cmath>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace restkv_test {

class ledger final : public engine::observer {
 public:
  ledger(engine::paged_cache& cache, const engine::model& recorded, std::span<const engine::token> system)
      : cache_(cache), model_(recorded) {
    start(system_, 0);
    grow(system_, system);
  }

  /// How often something happened that a test must have seen.
  std::map<std::string, long> seen;
  /// Requests that left for good.
  std::set<restkv::index_t> done;

  void appended(const engine::sequence& s, std::span<const engine::token> tokens) override {
    life& mine = lives_[s.asked.id];
    if (mine.kept.empty()) start(mine, s.slot);
    grow(mine, tokens);
    require(mine.tokens == s.tokens && mine.slot == s.slot, "a sequence has its own tokens and slot");
  }

  void evicted(const engine::sequence& s, restkv::index_t layer, const restkv::const_kept_tokens& kept) override {
    life& mine = lives_.at(s.asked.id);
    for (restkv::index_t h = 0; h < kept.heads(); ++h) {
      std::set<restkv::index_t> slots;
      for (restkv::index_t i = 0; i < kept.lengths(0, h); ++i) slots.insert(kept.positions(0, h, i));
      restkv::index_t slot = 0;
      std::vector<bool>& mask = mine.mask(layer * model_.kv_heads() + h);
      for (std::size_t n = 0; n < mask.size(); ++n) {
        if (mask[n] && slots.count(slot++) == 0) mask[n] = false;
      }
      require(static_cast<restkv::index_t>(slots.size()) == kept.lengths(0, h), "kept tokens are unique");
      if (mask[0] && !std::all_of(mask.begin(), mask.end(), [](bool b) { return b; }))
        ++seen["evicted behind a prefix"];
    }
    ++seen["evicted"];
  }

  void attended(const engine::sequence& s, restkv::index_t layer, std::span<const float> output) override {
    life& mine = lives_.at(s.asked.id);
    const engine::model_layer& source = model_.layers[static_cast<std::size_t>(layer)];
    const restkv::index_t channels = model_.head_dim();
    const restkv::index_t group = model_.query_heads() / model_.kv_heads();
    const double scale = 1 / std::sqrt(static_cast<double>(channels));
    for (restkv::index_t head = 0; head < model_.query_heads(); ++head) {
      const std::vector<bool>& mask = mine.mask(layer * model_.kv_heads() + head / group);
      const float* const query = model_.query(layer, head, mine.tokens.back());
      std::vector<double> logits;
      std::vector<engine::token> tokens;
      double logit_magnitude = 0;
      for (std::size_t n = 0; n < mask.size(); ++n) {
        if (!mask[n]) continue;
        double dot = 0;
        double sizes = 0;
        for (restkv::index_t c = 0; c < channels; ++c) {
          const double product = double{query[c]} * double{source.key(head / group, mine.tokens[n], c)};
          dot += product;
          sizes += std::abs(product);
        }
        tokens.push_back(mine.tokens[n]);
        logits.push_back(scale * dot);
        logit_magnitude = std::max(logit_magnitude, scale * sizes);
      }
      const double most = *std::max_element(logits.begin(), logits.end());
      double sum = 0;
      for (double& logit : logits) sum += logit = std::exp(logit - most);
      for (restkv::index_t c = 0; c < channels; ++c) {
        double expected = 0;
        double magnitude = 0;
        for (std::size_t i = 0; i < tokens.size(); ++i) {
          const double term = logits[i] / sum * double{source.value(head / group, tokens[i], c)};
          expected += term;
          magnitude += std::abs(term);
        }
        const double off = std::abs(double{output[static_cast<std::size_t>(head * channels + c)]} - expected);
        const double bound =
            float_bound(static_cast<std::int64_t>(tokens.size()), channels, logit_magnitude, magnitude);
        require(off <= bound, "attention is that over the kept tokens");  // false for what is not a number
      }
    }
    ++seen["attended"];
  }

  void left(const engine::sequence& s, engine::outcome why) override {
    seen["cancelled while waiting"] += why == engine::outcome::cancelled && lives_.count(s.asked.id) == 0 ? 1 : 0;
    seen["cancelled in the batch"] += why == engine::outcome::cancelled && lives_.count(s.asked.id) != 0 ? 1 : 0;
    seen["preempted"] += why == engine::outcome::preempted ? 1 : 0;
    lives_.erase(s.asked.id);
    if (why == engine::outcome::finished)
      require(s.answered == static_cast<restkv::index_t>(s.asked.answer.size()), "who finishes has an answer");
    if (why != engine::outcome::preempted) require(done.insert(s.asked.id).second, "a request leaves once");
  }

  void stepped(std::span<const engine::sequence> batch) override {
    require(batch.size() == lives_.size(), "the batch has the sequences that did not leave");
    std::set<restkv::index_t> slots{0};
    for (const engine::sequence& s : batch)
      require(slots.insert(s.slot).second && lives_.at(s.asked.id).slot == s.slot, "a slot has one sequence");
    check_pages();
  }

  /// After the last step: nothing but the system prompt has pages.
  void check_end() {
    require(lives_.empty(), "all sequences have left");
    check_pages();
    const auto tables = cache_.tables();
    for (restkv::index_t b = 1; b < tables.batch(); ++b) {
      for (restkv::index_t t = 0; t < tables.tables(); ++t) require(tables.lengths(b, t) == 0, "its tables are empty");
    }
  }

 private:
  struct life {
    restkv::index_t slot = 0;
    std::vector<engine::token> tokens{};    // all that were appended
    std::vector<std::vector<bool>> kept{};  // [layers * kv_heads][tokens]
    std::vector<bool>& mask(restkv::index_t row) { return kept[static_cast<std::size_t>(row)]; }
  };
  /// One entry of a table, and the tokens that its page must hold for it.
  struct holder {
    restkv::index_t layer;
    restkv::index_t first_head;
    std::vector<std::vector<engine::token>> tokens;  // [heads_per_page][at most page_size]
    bool operator==(const holder&) const = default;
  };

  /// Cheaper than an assertion of the framework, of which there would be millions.
  void require(bool holds, const char* what) {
    if (!holds) FAIL(what);
  }

  void start(life& mine, restkv::index_t slot) {
    mine.slot = slot;
    mine.kept.resize(static_cast<std::size_t>(static_cast<restkv::index_t>(model_.layers.size()) * model_.kv_heads()));
  }
  static void grow(life& mine, std::span<const engine::token> tokens) {
    mine.tokens.insert(mine.tokens.end(), tokens.begin(), tokens.end());
    for (std::vector<bool>& mask : mine.kept) mask.resize(mine.tokens.size(), true);
  }

  /// Every page is free or held, by as many tables as it has references, and has what each of them needs. Only the
  /// system prompt is shared.
  void check_pages() {
    std::map<restkv::page_t, std::vector<holder>> held;
    hold(system_, held);
    for (auto& [id, mine] : lives_) hold(mine, held);
    const restkv::page_pool& pool = cache_.pool();
    for (restkv::page_t page = 0; page < pool.pages(); ++page) {
      const auto holders = held.find(page);
      const std::size_t references = holders == held.end() ? 0 : holders->second.size();
      require(static_cast<std::size_t>(pool.references(page)) == references, "references are those of the tables");
    }
    require(static_cast<std::size_t>(pool.available()) + held.size() == static_cast<std::size_t>(pool.pages()),
            "a page that nobody holds is free");
    const auto system_tokens = static_cast<engine::token>(system_.tokens.size());
    for (const auto& [page, holders] : held) {
      for (const holder& one : holders) {
        check_content(page, one);
        if (holders.size() == 1) continue;
        require(one == holders.front(), "who shares a page has the same tokens in it");
        for (const auto& row : one.tokens) {
          for (const engine::token n : row) require(n < system_tokens, "a shared page is of the system prompt");
        }
      }
      seen["shared"] += holders.size() > 1 ? 1 : 0;
    }
  }

  /// What a sequence's tables hold, by the masks.
  void hold(life& mine, std::map<restkv::page_t, std::vector<holder>>& held) {
    const auto& size = cache_.size();
    const auto tables = cache_.tables();
    for (restkv::index_t t = 0; t < tables.tables(); ++t) {
      const restkv::index_t first_row = t * size.heads_per_page;
      std::vector<std::vector<engine::token>> rows(static_cast<std::size_t>(size.heads_per_page));
      std::size_t longest = 0;
      for (std::size_t h = 0; h < rows.size(); ++h) {
        const std::vector<bool>& mask = mine.mask(first_row + static_cast<restkv::index_t>(h));
        for (std::size_t n = 0; n < mask.size(); ++n) {
          if (mask[n]) rows[h].push_back(mine.tokens[n]);
        }
        longest = std::max(longest, rows[h].size());
      }
      require(static_cast<std::size_t>(tables.lengths(mine.slot, t)) == longest, "a table is as long as its masks say");
      const auto page_size = static_cast<std::size_t>(size.page_size);
      for (std::size_t i = 0; i * page_size < longest; ++i) {
        holder one{first_row / size.kv_heads, first_row % size.kv_heads, {}};
        for (const auto& row : rows) {
          const auto begin = row.begin() + static_cast<std::ptrdiff_t>(std::min(row.size(), i * page_size));
          const auto end = row.begin() + static_cast<std::ptrdiff_t>(std::min(row.size(), (i + 1) * page_size));
          one.tokens.emplace_back(begin, end);
        }
        held[tables.ids(mine.slot, t, static_cast<restkv::index_t>(i))].push_back(one);
      }
    }
  }

  void check_content(restkv::page_t page, const holder& one) {
    const auto keys = cache_.keys(0, 0).pages;
    const auto values = cache_.values(0, 0).pages;
    const engine::model_layer& source = model_.layers[static_cast<std::size_t>(one.layer)];
    const std::size_t bytes = static_cast<std::size_t>(model_.head_dim()) * sizeof(float);
    for (std::size_t h = 0; h < one.tokens.size(); ++h) {
      const auto row = static_cast<restkv::index_t>(h);
      for (std::size_t i = 0; i < one.tokens[h].size(); ++i) {
        const auto place = static_cast<restkv::index_t>(i);
        const restkv::index_t n = one.tokens[h][i];
        require(std::memcmp(&keys(page, row, place, 0), &source.key(one.first_head + row, n, 0), bytes) == 0 &&
                    std::memcmp(&values(page, row, place, 0), &source.value(one.first_head + row, n, 0), bytes) == 0,
                "a page holds the tokens that the masks say");
      }
    }
  }

  engine::paged_cache& cache_;
  const engine::model& model_;
  life system_;
  std::map<restkv::index_t, life> lives_;  // by request, of those in the batch
};

}  // namespace restkv_test
