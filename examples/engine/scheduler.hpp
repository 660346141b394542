// SPDX-License-Identifier: Apache-2.0
/// @file
/// `scheduler`: a continuous-batching loop over a paged cache with eviction.
#pragma once

#include "../decode_attention/attention.hpp"
#include "observer.hpp"
#include "paged_cache.hpp"
#include "selector.hpp"

#include <algorithm>
#include <array>
#include <deque>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

namespace engine {

/// When to evict.
struct eviction {
  selector* policy = nullptr;   ///< null: keep everything
  index_t tokens_per_head = 0;  ///< what the policy leaves on average
  index_t slack = 16;           ///< tokens a head may grow beyond that, until the next eviction
};

/// What a run came to.
struct counters {
  index_t steps = 0;
  index_t finished = 0;
  index_t cancelled = 0;
  index_t preempted = 0;
  index_t refused = 0;
  index_t evictions = 0;   ///< of one layer of one sequence
  index_t postponed = 0;   ///< of those, for want of pages to copy shared ones to
  index_t most_batch = 0;  ///< sequences at a time
  index_t most_pages = 0;  ///< in use at a time
  ///@{
  /// Pages, summed over the steps: that all tokens so far would take in a cache of each sequence's own; that eviction
  /// saves of them; and that sharing saves of the rest, without the pages that the system prompt has by itself.
  double full_steps = 0;
  double evicted_steps = 0;
  double shared_steps = 0;
  ///@}
};

/// Requests join when their prompt fits, answer a token a step, and leave when they are done or cancelled. In each step
/// all sequences of the batch advance. Slot 0 of the cache holds the system prompt, whose pages every sequence shares.
///
/// A request's life is counted in events: a step in which it waits, its prompt in the cache, an eviction, a token
/// appended, a token attended to. After `cancel_after` of them it is cancelled, wherever that is.
///
/// When a token finds no free page, the sequence that joined last makes room: it is released, and starts over when
/// there are pages again. When an eviction needs pages to copy shared ones to and finds none, it waits for the next
/// step.
class scheduler {
 public:
  /// requests: in order of arrival. All of it must outlive the scheduler.
  scheduler(paged_cache& cache, const model& recorded, eviction how, std::span<const token> system_prompt,
            std::vector<request> requests, observer& watching)
      : cache_(cache),
        model_(recorded),
        eviction_(how),
        system_(system_prompt.begin(), system_prompt.end()),
        coming_(requests.begin(), requests.end()),
        observer_(watching),
        output_(static_cast<std::size_t>(recorded.query_heads() * recorded.head_dim())) {
    restkv::throw_if_failed(cache_.append(0, model_, system_));
    for (index_t slot = cache_.size().sequences - 1; slot > 0; --slot) free_slots_.push_back(slot);
  }

  [[nodiscard]] const counters& count() const noexcept { return count_; }

  /// One step; false when no request is left.
  bool step() {
    while (!coming_.empty() && coming_.front().arrival <= count_.steps) {
      waiting_.push_back({.asked = std::move(coming_.front())});
      coming_.pop_front();
    }
    for (auto s = waiting_.begin(); s != waiting_.end();) {
      if (!passes(*s)) {
        ++s;
        continue;
      }
      leave(*s, outcome::cancelled);
      s = waiting_.erase(s);
    }
    admit();
    // Whoever is preempted is at the end of the batch, so those before it keep their places.
    for (std::size_t i = 0; i < batch_.size();) {
      const std::optional<outcome> left = advance(i);
      if (!left) {
        ++i;
      } else {
        remove(i, *left);
      }
    }
    observer_.stepped(batch_);
    count_pages();
    ++count_.steps;
    return !batch_.empty() || !waiting_.empty() || !coming_.empty();
  }

 private:
  /// Counts an event; whether it was one too many for the user.
  static bool passes(sequence& s) noexcept { return s.events++ >= s.asked.cancel_after; }

  /// Waiting requests join in order while there are slots, and pages for their prompts.
  void admit() {
    while (!waiting_.empty() && !free_slots_.empty()) {
      sequence s = std::move(waiting_.front());
      waiting_.pop_front();
      s.slot = free_slots_.back();
      const std::span<const token> own = std::span<const token>(s.asked.prompt).subspan(system_.size());
      restkv::throw_if_failed(cache_.share(0, s.slot));
      const restkv::status appended = cache_.append(s.slot, model_, own);
      if (!appended.ok()) {
        restkv::throw_if_failed(cache_.release(s.slot));
        if (appended.code() != restkv::errc::workspace_too_small) throw restkv::error(appended);
        if (batch_.empty()) {
          leave(s, outcome::refused);
          continue;
        }
        waiting_.push_front(std::move(s));
        return;
      }
      free_slots_.pop_back();
      s.tokens = s.asked.prompt;
      batch_.push_back(std::move(s));
      sequence& joined = batch_.back();
      observer_.appended(joined, joined.tokens);
      if (passes(joined) || !evict(joined)) remove(batch_.size() - 1, outcome::cancelled);
    }
  }

  /// One token of one sequence: its key and value into the cache, its attention, an eviction where one is due. Why the
  /// sequence must leave, if it must.
  std::optional<outcome> advance(std::size_t i) {
    const token next = batch_[i].asked.answer[static_cast<std::size_t>(batch_[i].answered)];
    for (;;) {
      const restkv::status appended = cache_.append(batch_[i].slot, model_, {&next, 1});
      if (appended.ok()) break;
      if (appended.code() != restkv::errc::workspace_too_small) throw restkv::error(appended);
      if (batch_.size() == 1) return outcome::refused;
      if (i + 1 == batch_.size()) return outcome::preempted;
      remove(batch_.size() - 1, outcome::preempted);
    }
    sequence& s = batch_[i];
    s.tokens.push_back(next);
    ++s.answered;
    observer_.appended(s, {&next, 1});
    if (passes(s)) return outcome::cancelled;
    for (index_t l = 0; l < cache_.size().layers; ++l) {
      attend_over_pages(s, l, next);
      observer_.attended(s, l, output_);
    }
    if (passes(s)) return outcome::cancelled;
    if (s.answered == static_cast<index_t>(s.asked.answer.size())) return outcome::finished;
    if (!evict(s)) return outcome::cancelled;
    return {};
  }

  /// Evicts in every layer where it is due; false when the user lost patience meanwhile.
  bool evict(sequence& s) {
    if (eviction_.policy == nullptr) return true;
    for (index_t l = 0; l < cache_.size().layers; ++l) {
      const index_t slack = s.answered == 0 ? 0 : eviction_.slack;
      const restkv::page_tables tables = cache_.tables(s.slot, l);
      index_t tokens = 0;
      for (index_t t = 0; t < tables.tables(); ++t) tokens += tables.lengths(0, t);
      if (tokens <= tables.tables() * (eviction_.tokens_per_head + slack)) continue;
      ++count_.evictions;
      const restkv::layer_view<float> view = look_at(s, l);
      const restkv::const_kept_tokens kept = eviction_.policy->select(view, l);
      check_tables_suffice(kept);
      observer_.selected(s, l, view, kept);
      const restkv::status outcome = cache_.keep(s.slot, l, kept);
      if (outcome.code() == restkv::errc::workspace_too_small) {
        ++count_.postponed;
        continue;
      }
      restkv::throw_if_failed(outcome);
      observer_.evicted(s, l, kept);
      if (passes(s)) return false;
    }
    return true;
  }

  /// A layer of a sequence as a policy sees it: the pages where they are if heads share them, else a copy; and the last
  /// queries, which an engine would keep beside its cache.
  restkv::layer_view<float> look_at(const sequence& s, index_t layer) {
    const paged_cache::sizes& size = cache_.size();
    restkv::layer_view<float> view;
    const auto rows = std::min(eviction_.policy->window(), static_cast<index_t>(s.tokens.size()));
    queries_.clear();
    for (index_t h = 0; h < model_.query_heads(); ++h) {
      for (auto n = s.tokens.end() - rows; n != s.tokens.end(); ++n) {
        const float* const query = model_.query(layer, h, *n);
        queries_.insert(queries_.end(), query, query + size.head_dim);
      }
    }
    view.query = {queries_.data(), {1, model_.query_heads(), rows, size.head_dim}};
    const restkv::paged_layout<float> keys = cache_.keys(s.slot, layer);
    const restkv::paged_layout<float> values = cache_.values(s.slot, layer);
    if (keys.tables.tables() == 1) {
      const auto pages = static_cast<std::size_t>(restkv::pages_of(keys.length(0, 0), size.page_size));
      key_chunks_.resize(pages);
      value_chunks_.resize(pages);
      restkv::throw_if_failed(restkv::page_chunks(keys, 0, 0, key_chunks_, view.key));
      restkv::throw_if_failed(restkv::page_chunks(values, 0, 0, value_chunks_, view.value));
    } else {
      index_t longest = 0;
      for (index_t h = 0; h < size.kv_heads; ++h) longest = std::max(longest, keys.length(0, h));
      const std::array<index_t, 4> extents{1, size.kv_heads, longest, size.head_dim};
      const auto elements = static_cast<std::size_t>(size.kv_heads * longest * size.head_dim);
      key_copy_.resize(elements);
      value_copy_.resize(elements);
      const tensor_view<float, 4> key(key_copy_.data(), extents);
      const tensor_view<float, 4> value(value_copy_.data(), extents);
      restkv::throw_if_failed(restkv::copy_pages(keys, key));
      restkv::throw_if_failed(restkv::copy_pages(values, value));
      view.key = key;
      view.value = value;
      view.head_lengths = keys.tables.lengths;
      view.pad = restkv::padding::right;
    }
    const model_layer& source = model_.layers[static_cast<std::size_t>(layer)];
    view.projection = source.projection;
    view.metric = source.metric;
    return view;
  }

  /// Heads that share a table must keep the same number of tokens: the table has one length.
  void check_tables_suffice(const restkv::const_kept_tokens& kept) const {
    for (index_t h = 1; h < kept.heads(); ++h) {
      if (cache_.tables_of_layer() > 1 || kept.lengths(0, h) == kept.lengths(0, 0)) continue;
      throw std::runtime_error("heads keep " + std::to_string(kept.lengths(0, 0)) + " and " +
                               std::to_string(kept.lengths(0, h)) +
                               " tokens: with such a policy each needs a table of its own (heads_per_page = 1)");
    }
  }

  /// softmax(q k / sqrt(d)) v of the newest token over what the cache holds, into output_.
  void attend_over_pages(const sequence& s, index_t layer, token newest) {
    const restkv::paged_layout<float> keys = cache_.keys(s.slot, layer);
    const restkv::paged_layout<float> values = cache_.values(s.slot, layer);
    const index_t channels = model_.head_dim();
    for (index_t head = 0; head < model_.query_heads(); ++head) {
      const index_t h = head / (model_.query_heads() / model_.kv_heads());
      attend(
          model_.query(layer, head, newest), keys.length(0, h), channels,
          [&](index_t n) { return static_cast<const float*>(keys.row(0, h, n).data); },
          [&](index_t n) { return static_cast<const float*>(values.row(0, h, n).data); },
          output_.data() + head * channels);
    }
  }

  /// Takes a sequence out of the batch. Those behind it move up, so that the batch stays in the order of joining.
  void remove(std::size_t i, outcome why) {
    sequence s = std::move(batch_[i]);
    batch_.erase(batch_.begin() + static_cast<std::ptrdiff_t>(i));
    restkv::throw_if_failed(cache_.release(s.slot));
    free_slots_.push_back(s.slot);
    leave(s, why);
    if (why == outcome::preempted) waiting_.push_front({.asked = std::move(s.asked), .events = s.events});
  }

  void leave(const sequence& s, outcome why) {
    switch (why) {
      case outcome::finished:
        ++count_.finished;
        break;
      case outcome::cancelled:
        ++count_.cancelled;
        break;
      case outcome::preempted:
        ++count_.preempted;
        break;
      case outcome::refused:
        ++count_.refused;
        break;
    }
    observer_.left(s, why);
  }

  void count_pages() {
    const index_t used = cache_.pool().pages() - cache_.pool().available();
    const restkv::page_tables tables = cache_.tables();
    index_t full = 0;
    index_t held = 0;
    for (const sequence& s : batch_) {
      full += tables.tables() * restkv::pages_of(static_cast<index_t>(s.tokens.size()), cache_.size().page_size);
      for (index_t t = 0; t < tables.tables(); ++t) {
        held += restkv::pages_of(tables.lengths(s.slot, t), cache_.size().page_size);
      }
    }
    count_.most_batch = std::max(count_.most_batch, static_cast<index_t>(batch_.size()));
    count_.most_pages = std::max(count_.most_pages, used);
    count_.full_steps += static_cast<double>(full);
    count_.evicted_steps += static_cast<double>(full - held);
    count_.shared_steps += static_cast<double>(held - used);
  }

  paged_cache& cache_;
  const model& model_;
  eviction eviction_;
  std::vector<token> system_;
  std::deque<request> coming_;    // in order of arrival
  std::deque<sequence> waiting_;  // have arrived, or were preempted
  std::vector<sequence> batch_;   // in order of joining
  std::vector<index_t> free_slots_;
  observer& observer_;
  counters count_;
  std::vector<float> output_;      // [query_heads, head_dim]
  std::vector<float> queries_;     // [query_heads, rows, head_dim]
  std::vector<float> key_copy_;    // [kv_heads, longest, head_dim]
  std::vector<float> value_copy_;  // the same
  std::vector<tensor_view<const float, 4>> key_chunks_;
  std::vector<tensor_view<const float, 4>> value_chunks_;
};

}  // namespace engine
