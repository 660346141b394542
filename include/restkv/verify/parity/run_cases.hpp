// SPDX-License-Identifier: Apache-2.0
/// @file
/// Problems one after the other until one shows a difference, and that one made as small as it gets.
#pragma once

#include <restkv/verify/parity/report.hpp>

#include <algorithm>
#include <array>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace restkv::parity {

/// Which members of a problem matter to a comparison; the others stay 1.
struct problem_space {
  bool has_heads = false;                         ///< kv_heads, head_dim
  bool has_queries = false;                       ///< group, window
  index_t usual_window = 32;                      ///< the window to try most
  std::array<bool, 3> types{true, false, false};  ///< by element_type
  bool has_lengths = true;                        ///< padded sequences
  /// Cost of a problem in multiply-adds, about; problems beyond 2^24 are cut down.
  std::function<double(const problem&)> work{};
};

namespace detail {

/// The random choices of one problem.
class chooser {
 public:
  chooser(std::uint64_t seed, index_t index) noexcept : seed_(seed), index_(index) {}

  /// Uniform in [low, high].
  index_t pick(index_t low, index_t high) noexcept {
    return low + static_cast<index_t>((bits() >> 11) % static_cast<std::uint64_t>(high - low + 1));
  }
  /// One of a list.
  template <std::size_t N>
  index_t one_of(const std::array<index_t, N>& list) noexcept {
    return list[static_cast<std::size_t>(pick(0, static_cast<index_t>(N) - 1))];
  }
  std::uint64_t bits() noexcept { return counter_bits(seed_, index_, draws_++); }

 private:
  std::uint64_t seed_;
  index_t index_;
  index_t draws_ = 0;
};

inline problem draw(const problem_space& space, const options& how, index_t index, index_t attempt) {
  chooser choose(how.seed + static_cast<std::uint64_t>(attempt) * 0x51ed27, index);
  problem p;
  p.seed = choose.bits() >> 44;
  // Every distribution in turn, so that none is left out of few cases; another one where a problem was not accepted.
  p.values = static_cast<distribution>((index + attempt) % 8);
  p.k = choose.one_of<10>({1, 2, 3, 7, 8, 16, 31, 64, 100, 256});
  p.batch = choose.one_of<6>({1, 1, 1, 2, 3, 5});
  constexpr std::array<index_t, 5> tiles{32, 64, 128, 256, 1024};
  switch (choose.pick(0, 9)) {
    case 0:
      p.tokens = choose.pick(0, 2);
      break;
    case 1:
    case 2:
    case 3:
      p.tokens = p.k + choose.pick(-1, 1);
      break;
    case 4:
      p.tokens = choose.pick(0, how.most_tokens);
      break;
    default:
      p.tokens = choose.one_of(tiles) * choose.pick(1, 2) + choose.pick(-1, 1);
      break;
  }
  p.tokens = std::clamp<index_t>(p.tokens, 0, how.most_tokens);
  p.order = static_cast<memory_order>(choose.pick(0, 3));
  if (space.has_lengths && choose.pick(0, 2) == 0) p.lengths = static_cast<sequence_lengths>(choose.pick(1, 2));
  for (index_t type = choose.pick(0, 2), tries = 0; tries < 3; ++tries) {
    p.type = static_cast<element_type>((type + tries) % 3);
    if (space.types[static_cast<std::size_t>(p.type)]) break;
  }
  if (space.has_heads) {
    p.kv_heads = choose.one_of<5>({1, 2, 2, 3, 8});
    p.head_dim = std::min(how.most_head_dim, choose.one_of<8>({1, 3, 8, 16, 32, 64, 80, 128}));
  }
  if (space.has_queries) {
    p.group = choose.one_of<5>({1, 2, 3, 4, 8});
    p.window = choose.one_of<4>({1, 2, space.usual_window, space.usual_window});
  }
  constexpr double most_work = 0x1p24;
  for (int tries = 0; space.work && space.work(p) > most_work && tries < 32; ++tries) {
    switch (tries % 4) {
      case 0:
        p.head_dim = std::max<index_t>(1, p.head_dim / 2);
        break;
      case 1:
        p.group = std::max<index_t>(1, p.group / 2);
        break;
      case 2:
        p.batch = std::max<index_t>(1, p.batch / 2);
        break;
      default:
        p.kv_heads = std::max<index_t>(1, p.kv_heads / 2);
        break;
    }
    if (tries > 8) p.tokens /= 2;
  }
  return p;
}

/// Smaller problems than `p`, the boldest first.
inline std::vector<problem> simpler(const problem& p) {
  std::vector<problem> all;
  const auto set = [&](auto problem::*member, auto value) {
    if (p.*member == value) return;
    all.push_back(p);
    all.back().*member = value;
  };
  const auto reduce = [&](index_t problem::*member, index_t least) {
    const index_t value = p.*member;
    if (value <= least) return;
    set(member, least);
    for (index_t cut = (value - least + 1) / 2; cut > 0; cut /= 2) {
      if (value - cut > least) set(member, value - cut);
    }
  };
  if (p.lengths != sequence_lengths::whole) {
    for (index_t b = 0; b < std::min<index_t>(p.batch, 4); ++b) {  // one of the sequences alone, without padding
      all.push_back(p);
      all.back().batch = 1;
      all.back().tokens = p.length_of(b);
      all.back().lengths = sequence_lengths::whole;
    }
  }
  set(&problem::lengths, sequence_lengths::whole);
  set(&problem::order, memory_order::heads_tokens);
  set(&problem::type, element_type::float32);
  reduce(&problem::batch, 1);
  reduce(&problem::kv_heads, 1);
  reduce(&problem::group, 1);
  reduce(&problem::tokens, 0);
  for (index_t tile = 4; tile < p.tokens; tile *= 2) {  // for what happens at the end of a tile alone
    for (index_t tokens = tile - 1; tokens <= tile + 1 && tokens < p.tokens; ++tokens) set(&problem::tokens, tokens);
  }
  reduce(&problem::window, 1);
  reduce(&problem::head_dim, 1);
  reduce(&problem::k, 1);
  set(&problem::values, distribution::normal);
  // Where a difference needs an odd length or several sequences, together with one less of something else.
  if (p.tokens > 1 && p.k > 1) {
    all.push_back(p);
    --all.back().tokens;
    --all.back().k;
  }
  // Other numbers, where these need every element they have.
  constexpr std::uint64_t other_seeds = 9;
  for (std::uint64_t seed = 1; seed < other_seeds; ++seed) {
    if (p.seed >= other_seeds) set(&problem::seed, seed);
    for (const auto& [member, least] : {std::pair{&problem::batch, index_t{1}}, std::pair{&problem::tokens, index_t{1}},
                                        std::pair{&problem::k, index_t{1}}}) {
      if (p.*member <= least) continue;
      all.push_back(p);
      all.back().seed = seed;
      all.back().*member = member == &problem::batch ? least : p.*member - std::max<index_t>(1, p.*member / 4);
    }
  }
  return all;
}

}  // namespace detail

/// Runs `check(problem, tally, explain)`, which returns what differs, a sentence, or nothing, on one problem after the
/// other. The first that differs is made smaller, greedily, as long as something differs and steps are left; the
/// smallest is explained, if `check` knows how.
template <class Check>
[[nodiscard]] report run_cases(const std::string& what, const problem_space& space, const options& how,
                               const Check& check) {
  report result;
  const auto usable = [&](const problem& p) {
    return space.types[static_cast<std::size_t>(p.type)] && (!how.accepts || how.accepts(p));
  };
  const index_t cases = how.only ? 1 : how.cases;
  for (index_t i = 0; i < cases; ++i) {
    problem p;
    if (how.only) {
      p = *how.only;
    } else {
      constexpr index_t most_attempts = 64;
      index_t attempt = 0;
      do {
        p = detail::draw(space, how, i, attempt);
      } while (!usable(p) && ++attempt < most_attempts);
      if (attempt == most_attempts) continue;
    }
    if (how.progress) how.progress(i);
    ++result.cases;
    result.difference = check(std::as_const(p), result.counts, false);
    if (result.difference.empty()) continue;
    result.first = p;
    bool smaller = !how.only;
    while (smaller) {
      smaller = false;
      for (const problem& candidate : detail::simpler(p)) {
        if (result.shrink_steps >= how.shrink_steps) break;
        if (!usable(candidate)) continue;
        ++result.shrink_steps;
        tally unused;
        std::string difference = check(candidate, unused, false);
        if (difference.empty()) continue;
        result.difference = std::move(difference);
        p = candidate;
        smaller = true;
        break;
      }
    }
    result.smallest = p;
    tally unused;
    if (std::string explained = check(std::as_const(p), unused, true); !explained.empty()) {
      result.difference = std::move(explained);
    }
    break;
  }
  if (result.cases == 0) result.difference = "no problem was tried: options.accepts refuses all of them, or cases is 0";
  result.finish(what);
  return result;
}

}  // namespace restkv::parity
