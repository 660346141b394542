// SPDX-License-Identifier: Apache-2.0
/// @file
/// Context parallelism: a layer whose tokens lie on several ranks.
#pragma once

#include <restkv/distributed/token_drift.hpp>
#include <restkv/distributed/token_problem.hpp>
#include <restkv/distributed/token_smoothing.hpp>

namespace restkv::distributed {

namespace detail {

/// One selection over tokens on several ranks: the steps of `select`, each of which ends with what all ranks know.
template <class Policy, element T, communicator Ranks>
class token_run {
  using key_t = std::uint64_t;
  using rows_t = std::vector<std::vector<key_t>>;

 public:
  token_run(token_problem<Policy, T>& problem, Ranks& ranks, token_sums sums)
      : problem_(problem), ranks_(ranks), parts_(ranks, sums) {}

  [[nodiscard]] status run(std::vector<std::vector<position_t>>& kept) {
    RESTKV_RETURN_IF_FAILED(all_ok(ranks_, problem_.check(ranks_.size())));
    facts_.resize(at(ranks_.size()));
    RESTKV_RETURN_IF_FAILED(
        agree_on_problem(ranks_, problem_.digest_of(), "tokens", problem_.axis(), problem_.here(), facts_));
    RESTKV_RETURN_IF_FAILED(count_candidates());
    keys_.resize(at(shape().batch * rows()));
    counts_.resize(keys_.size());
    cuts_.resize(keys_.size());
    equal_left_.resize(keys_.size());
    bool choose = false;
    for (index_t b = 0; b < shape().batch; ++b) {
      const bool keeps_all = part(b).keeps_all();
      choose = choose || !keeps_all;
      if (keeps_all) {
        make_keys(b, [](index_t, index_t) { return key_t{1}; });
      } else {
        rank_sequence(b);
      }
      RESTKV_RETURN_IF_FAILED(allocate(b));
    }
    if (choose) find_cuts();
    RESTKV_RETURN_IF_FAILED(parts_.failure());
    write(kept);
    return {};
  }

 private:
  [[nodiscard]] static std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  [[nodiscard]] const Policy& policy() const noexcept { return problem_.policy(); }
  [[nodiscard]] const problem_shape& shape() const noexcept { return problem_.shape(); }
  [[nodiscard]] index_t rows() const noexcept { return problem_.made().rows; }
  [[nodiscard]] const sequence_part& part(index_t b) const noexcept { return sequences_[at(b)]; }

  /// The mask is known where its tokens lie: their numbers are added up, 8 bytes a sequence.
  [[nodiscard]] status count_candidates() {
    std::vector<std::uint64_t> candidates(at(shape().batch));
    for (index_t b = 0; b < shape().batch; ++b) {
      sequences_.push_back(problem_.part_of(b));
      for (index_t u = part(b).first; u < part(b).end; ++u) {
        candidates[at(b)] += problem_.may_evict(b, part(b), u) ? 1 : 0;
      }
    }
    RESTKV_RETURN_IF_FAILED(parts_.add_up(candidates));
    const auto ll = [](index_t n) { return static_cast<long long>(n); };
    for (index_t b = 0; b < shape().batch; ++b) {
      sequence_part& own = sequences_[at(b)];
      const index_t unmasked = own.problem.protected_tokens();
      own.problem.candidates = static_cast<index_t>(candidates[at(b)]);
      own.units_per_head = policy().budget.tokens_per_head(own.problem);
      RESTKV_RETURN_IF_FAILED(check_problem(policy().budget, own.problem));
      const index_t kept = own.problem.protected_tokens();
      const index_t budget = std::min(own.units_per_head, own.problem.length);
      if ((budget < kept && kept > unmasked) ||
          own.tokens.length - own.problem.candidates * problem_.unit() > problem_.made().capacity) {
        return status::error(errc::invalid_argument,
                             "sequence %lld: the budget is %lld %s per head, the mask and window protect %lld", ll(b),
                             ll(budget), problem_.unit() == 1 ? "tokens" : "chunks or pages", ll(kept));
      }
    }
    return {};
  }

  /// Scores, smoothing and order keys of one sequence's rows.
  void rank_sequence(index_t b) {
    const auto request = make_score_request(policy(), shape());
    const reference::token_range& tokens = part(b).tokens;
    const index_t past = request.past_of(tokens.length);
    const std::size_t own = tokens.until(past);
    const std::vector<row_context> contexts = contexts_of(b);
    std::vector<double> smoothed(at(rows()) * own);
    for (index_t h = 0; h < request.heads(); ++h) {
      const std::vector<double> scores = score_row(request, b, h);
      const bool shared = policy().granularity.shared;
      for (std::size_t n = 0; n < own; ++n) {
        double& score = smoothed[at(shared ? 0 : h) * own + n];
        score = shared ? group_fold(request.group, score, scores[n], h == 0) : scores[n];
        if (shared && h + 1 == request.heads()) score = group_finish(request.group, score, request.heads());
      }
    }
    std::vector<index_t> held;  // tokens of the past on each rank
    for (const rank_facts& of_rank : facts_) {
      const auto first = static_cast<index_t>(of_rank.first);
      const auto range = problem_.range_of(b, first, first + static_cast<index_t>(of_rank.count));
      held.push_back(static_cast<index_t>(range.until(past)));
    }
    smooth_rows(policy().spatial, std::span<const row_context>(contexts), std::span<const index_t>(held), ranks_.rank(),
                std::span<double>(smoothed), parts_);
    make_keys(b, [&](index_t row, index_t u) {
      const index_t unit = problem_.unit();
      const std::span<const double> of_row(smoothed.data() + at(row) * own, own);
      const std::size_t first = tokens.until(u * unit);
      if (unit == 1) return order_key(of_row[first]);
      return order_key(policy().granularity(of_row.subspan(first, at(unit))));
    });
  }

  /// The row of a KV head, or of a query head without group reduction.
  template <class Request>
  [[nodiscard]] std::vector<double> score_row(const Request& request, index_t b, index_t row) {
    std::vector<double> folded;
    if constexpr (!head_score<decltype(policy().score)>) {
      const index_t group = shape().query_heads / request.heads();
      for (index_t j = 0; j < group; ++j) {
        const std::vector<double> scores =
            reference::scores_of_tokens(request, problem_.layer(), b, row * group + j, part(b).tokens, parts_);
        folded.resize(scores.size());
        for (std::size_t n = 0; n < scores.size(); ++n) {
          folded[n] = group_fold(request.group, folded[n], scores[n], j == 0);
        }
      }
      for (double& score : folded) score = group_finish(request.group, score, group);
    }
    return folded;
  }

  /// What smoothing knows of each row: the mean drift of its query heads.
  [[nodiscard]] std::vector<row_context> contexts_of(index_t b) {
    std::vector<row_context> contexts(at(rows()), row_context{.sequence = b});
    if (!uses_drift(policy().spatial)) return contexts;
    const index_t length = part(b).tokens.length;
    const index_t window = make_score_request(policy(), shape()).window_of(length);
    const index_t budget = std::min(part(b).units_per_head * problem_.unit(), length);
    const index_t group = shape().query_heads / rows();
    for (index_t h = 0; h < rows(); ++h) {
      double& drift = contexts[at(h)].drift;
      for (index_t j = 0; j < group; ++j) {
        drift += window_drift(problem_.layer(), b, h * group + j, part(b).tokens, window,
                              std::max<index_t>(0, budget - window), parts_);
      }
      drift /= static_cast<double>(group);
    }
    return contexts;
  }

  template <class KeyOf>
  void make_keys(index_t b, const KeyOf& key_of) {
    for (index_t row = 0; row < rows(); ++row) {
      std::vector<key_t>& keys = keys_[at(b * rows() + row)];
      keys.resize(at(part(b).units()));
      for (index_t u = part(b).first; u < part(b).end; ++u) {
        keys[at(u - part(b).first)] = problem_.may_evict(b, part(b), u) ? key_of(row, u) : key_t{excluded_key};
      }
    }
  }

  /// The budgets of one sequence's rows.
  [[nodiscard]] status allocate(index_t b) {
    const std::span<index_t> counts(counts_.data() + b * rows(), at(rows()));
    const budget_problem& problem = part(b).problem;
    if (part(b).keeps_all()) {
      std::fill(counts.begin(), counts.end(), problem.candidates);
      return {};
    }
    std::vector<index_t> room(counts.size());
    std::vector<double> scratch(counts.size());
    std::vector<std::uint64_t> histogram(at(std::max(digits, 2 * rows())));
    budget_channel channel{.ranks = &parts_, .counts = room, .scratch = scratch, .histogram = histogram};
    channel.add_up = [](void* of, std::span<std::uint64_t> data) {
      return static_cast<token_parts<Ranks>*>(of)->add_up(data);
    };
    const layer_budget<decltype(policy().budget)> budget{policy().budget, {0, rows()}, ranks_.size() > 1, &channel};
    std::vector<key_t> keys;
    for (index_t row = 0; row < rows(); ++row) {
      const std::vector<key_t>& of_row = keys_[at(b * rows() + row)];
      keys.insert(keys.end(), of_row.begin(), of_row.end());
    }
    budget.allocate(problem, tensor_view<const key_t, 2>(keys.data(), {rows(), part(b).units()}), counts, scratch);
    for (const index_t count : counts) {
      if (count >= 0 && count <= problem.candidates) continue;
      return status::error(
          errc::invalid_argument, "the budget allocator gave a head of sequence %lld %lld of %lld candidates",
          static_cast<long long>(b), static_cast<long long>(count), static_cast<long long>(problem.candidates));
    }
    return channel.failure;
  }

  /// Where each row is cut, and how many of the keys at the cut are kept here.
  void find_cuts() {
    std::vector<std::uint64_t> histograms(keys_.size() * at(digits));
    for (std::size_t i = 0; i < keys_.size(); ++i) cuts_[i].k = counts_[i];
    parts_.note(find_pivots(
        std::span(cuts_), std::span(histograms), [&](std::span<std::uint64_t> counts) { return parts_.add_up(counts); },
        [&](index_t i, const auto& visit) {
          for (const key_t key : keys_[at(i)]) visit(key);
        }));
    std::vector<std::uint64_t> equal(keys_.size());
    std::vector<index_t> wanted;
    for (std::size_t i = 0; i < keys_.size(); ++i) {
      equal[i] = static_cast<std::uint64_t>(std::count(keys_[i].begin(), keys_[i].end(), cuts_[i].found.key));
      wanted.push_back(cuts_[i].found.equal);
    }
    equal_left_ = parts_.share_in_order(equal, wanted);
  }

  /// The kept positions on this rank's token axis. [batch * heads]
  void write(std::vector<std::vector<position_t>>& kept) {
    const index_t heads = problem_.made().heads;
    for (index_t i = 0; i < shape().batch * heads; ++i) {
      const index_t b = i / heads;
      const auto row = at(b * rows() + i % heads * rows() / heads);
      const reference::token_range& tokens = part(b).tokens;
      index_t equal_left = equal_left_[row];
      auto& positions = kept.emplace_back();
      for (index_t u = part(b).first; u < part(b).end; ++u) {
        const key_t key = keys_[row][at(u - part(b).first)];
        const top_k_pivot<key_t>& cut = cuts_[row].found;
        const bool chosen =
            part(b).keeps_all() || key == excluded_key || key > cut.key || (key == cut.key && equal_left-- > 0);
        for (index_t n = u * problem_.unit(); chosen && n < std::min(tokens.end, (u + 1) * problem_.unit()); ++n) {
          positions.push_back(static_cast<position_t>(tokens.begin + n));
        }
      }
    }
  }

  token_problem<Policy, T>& problem_;
  Ranks& ranks_;
  token_parts<Ranks> parts_;
  std::vector<rank_facts> facts_{};
  std::vector<sequence_part> sequences_{};
  rows_t keys_{};                            // [batch * rows], of the units that are here
  std::vector<index_t> counts_{};            // [batch * rows]
  std::vector<pivot_search<key_t>> cuts_{};  // [batch * rows]
  std::vector<index_t> equal_left_{};        // [batch * rows]
};

}  // namespace detail

/// The tokens that are kept of those on this rank. Owns its memory; movable.
class token_selection {
 public:
  /// What the last successful `run` chose: positions on this rank's token axis, as `compact` wants them for this rank's
  /// keys and values; rows of KV heads, or of query heads. Valid until the next, and as long as this object lives.
  [[nodiscard]] const_kept_tokens kept() const noexcept {
    return {{positions_.data(), {batch_, heads_, capacity_}}, {lengths_.data(), {batch_, heads_}}};
  }

  /// Chooses the tokens that are kept of those on this rank: those that `select` with `reference_backend` keeps where
  /// one process has all tokens, bit for bit with `token_sums::in_order`. Called on every rank with the same policy and
  /// queries.
  ///
  /// `tokens` says which tokens of the axis `layer` has: ranks lie behind each other, in parts of any sizes, empty ones
  /// too, but units of eviction (pages) are not cut. `layer.query` holds the last queries of each sequence on every
  /// rank, whatever the padding; `layer.lengths` are the sequences' lengths on the whole axis; the mask is that of the
  /// tokens here. All arithmetic is in double. Never sends keys or values, but for the one with the most attention of a
  /// query; scores at the edges of the ranks (docs/distributed.md has the sums), whole rows of them where a smoother
  /// looks beyond 128 neighbours.
  ///
  /// Allocates; throws std::bad_alloc. Errors: those of `make_plan` and `select`, of the communicator, ranks with
  /// different problems, a rank that cannot go on, a page that is cut; what looks at whole rows or heads: head scores,
  /// rescorers, attention that is averaged over neighbours, `ada_kv::normalise`.
  template <class Policy, element T, communicator Ranks>
  [[nodiscard]] status run(const Policy& policy, const layer_view<T>& layer, const axis_part& tokens, Ranks& ranks,
                           token_sums sums = token_sums::in_order, index_t index = 0, index_t layers = 1) {
    detail::token_problem<Policy, T> problem(policy, layer, tokens, index, layers);
    std::vector<std::vector<position_t>> kept;
    RESTKV_RETURN_IF_FAILED((detail::token_run<Policy, T, Ranks>(problem, ranks, sums).run(kept)));
    batch_ = problem.shape().batch;
    heads_ = problem.made().heads;
    capacity_ = 0;
    for (const auto& row : kept) capacity_ = std::max(capacity_, static_cast<index_t>(row.size()));
    positions_.assign(kept.size() * static_cast<std::size_t>(capacity_), position_t{0});
    lengths_.clear();
    for (const auto& row : kept) {
      std::copy(row.begin(), row.end(), positions_.begin() + std::ssize(lengths_) * capacity_);
      lengths_.push_back(static_cast<position_t>(row.size()));
    }
    return {};
  }

 private:
  std::vector<position_t> positions_;
  std::vector<position_t> lengths_;
  index_t batch_ = 0;
  index_t heads_ = 0;
  index_t capacity_ = 0;
};

}  // namespace restkv::distributed
