// SPDX-License-Identifier: Apache-2.0
// Random lives of sequences in a paged cache, compared after every step with lists of tokens.
#include "cache/cache_support.hpp"

#include <restkv/cache/paged_compact.hpp>
#include <restkv/cache/paged_gather.hpp>
#include <restkv/cache/paged_sequence.hpp>

#include <map>
#include <set>
#include <string>

using namespace restkv_test;
using restkv::errc;
using restkv::page_t;
using restkv::status;

namespace {

using tag = std::uint32_t;

/// Keys of two channels, values of one, of another type and in another order: (2 n, 2 n + 1) and n for token n.
class paged_model {
 public:
  struct shape {
    index_t pages, page_size, tables, heads_per_page, sequences, most_pages;
  };

  paged_model(const shape& how, unsigned seed)
      : s(how),
        random(seed),
        key(random, {s.pages, s.heads_per_page, s.page_size, 2},
            {.contiguous_channels = chance(random, 50), .gaps = true}),
        value(random, {s.pages, s.heads_per_page, s.page_size, 1}, {.reversed_axes = true}),
        ids(static_cast<std::size_t>(s.sequences * s.tables * s.most_pages), restkv::no_page),
        lengths(static_cast<std::size_t>(s.sequences * s.tables), 0),
        tables({ids.data(), {s.sequences, s.tables, s.most_pages}}, {lengths.data(), {s.sequences, s.tables}}),
        pool_memory(restkv::page_pool::required_bytes(s.pages)),
        plan_memory(restkv::page_moves_bytes(tables)),
        model(static_cast<std::size_t>(s.sequences * heads())) {
    require(pool.reset(s.pages, restkv::workspace(pool_memory)).ok());
  }

  [[nodiscard]] index_t heads() const { return s.tables * s.heads_per_page; }
  [[nodiscard]] index_t steps() const { return steps_; }
  [[nodiscard]] const std::map<std::string, index_t>& counts() const { return counts_; }

  void step() {
    ++steps_;
    const index_t sequence = pick(random, 0, s.sequences - 1);
    const index_t kind = pick(random, 0, 99);
    if (kind < 45) {
      append(sequence);
    } else if (kind < 60) {
      fork(sequence, pick(random, 0, s.sequences - 1));
    } else if (kind < 90) {
      evict(sequence);
    } else {
      free(sequence);
    }
    check_pages();
    if (steps_ % 8 == 0) check_contents();
  }

 private:
  std::vector<tag>& of(index_t b, index_t h) { return model[static_cast<std::size_t>(b * heads() + h)]; }
  void count(const std::string& what) { ++counts_[what]; }
  /// Cheaper than an assertion of the framework, of which there would be millions.
  void require(bool holds) {
    if (!holds)
      FAIL("step " << steps_ << ", " << s.pages << " pages of " << s.page_size << ", " << s.tables << " tables of "
                   << s.heads_per_page << " heads");
  }

  struct state {
    std::vector<page_t> ids;
    std::vector<position_t> lengths;
    std::vector<index_t> references;
    bool operator==(const state&) const = default;
  };
  [[nodiscard]] state now() const {
    state made{ids, lengths, {}};
    for (page_t page = 0; page < s.pages; ++page) made.references.push_back(pool.references(page));
    return made;
  }

  void append(index_t b) {
    const index_t count_of = pick(random, 0, 3) == 0 ? pick(random, 0, 3 * s.page_size) : 1;
    index_t needed = 0;
    index_t longest = 0;
    for (index_t t = 0; t < s.tables; ++t) {
      const index_t length = tables.lengths(b, t);
      longest = std::max(longest, length + count_of);
      for (index_t n = length; n < length + count_of; ++n) needed += n % s.page_size == 0 ? 1 : 0;
      if (count_of > 0 && length % s.page_size != 0) {
        needed += pool.references(tables.ids(b, t, length / s.page_size)) > 1 ? 1 : 0;
      }
    }
    const state before = now();
    const index_t available = pool.available();
    const status outcome = restkv::extend_sequence(pool, tables, b, count_of, key.view(), value.view());
    if (longest > s.most_pages * s.page_size) {
      count("table full");
      require(outcome.code() == errc::shape_mismatch && now() == before);
      return;
    }
    if (needed > available) {
      count("no page to append to");
      require(outcome.code() == errc::workspace_too_small && now() == before);
      return;
    }
    require(outcome.ok() && pool.available() >= available - needed);
    count("appended");
    for (index_t h = 0; h < heads(); ++h) {
      const index_t length = tables.lengths(b, h / s.heads_per_page);
      // Behind the heads of a table that are shorter lie leftovers, which the model calls 0.
      of(b, h).resize(static_cast<std::size_t>(length - count_of), 0);
      for (index_t n = length - count_of; n < length; ++n) {
        const page_t page = tables.ids(b, h / s.heads_per_page, n / s.page_size);
        require(pool.references(page) == 1);
        const tag token = ++last_;
        of(b, h).push_back(token);
        key.view()(page, h % s.heads_per_page, n % s.page_size, 0) = 2 * token;
        key.view()(page, h % s.heads_per_page, n % s.page_size, 1) = 2 * token + 1;
        value.view()(page, h % s.heads_per_page, n % s.page_size, 0) = static_cast<std::uint16_t>(token);
      }
    }
  }

  void free(index_t b) {
    count("freed");
    require(restkv::release_sequence(pool, tables, s.page_size, b).ok());
    for (index_t h = 0; h < heads(); ++h) of(b, h).clear();
  }

  void fork(index_t from, index_t to) {
    if (from != to && chance(random, 60)) free(to);
    bool empty = from != to;
    for (index_t t = 0; t < s.tables; ++t) empty = empty && tables.lengths(to, t) == 0;
    const state before = now();
    const status outcome = restkv::fork_sequence(pool, tables, s.page_size, from, to);
    if (!empty) {
      require(outcome.code() == errc::invalid_argument && now() == before);
      return;
    }
    count("forked");
    require(outcome.ok());
    for (index_t h = 0; h < heads(); ++h) of(to, h) = of(from, h);
  }

  void evict(index_t b) {
    const index_t capacity = s.most_pages * s.page_size;
    std::vector<position_t> positions(static_cast<std::size_t>(heads() * capacity), -5);
    std::vector<position_t> kept_lengths(static_cast<std::size_t>(heads()));
    const index_t kind = pick(random, 0, 9);
    const bool whole_pages = chance(random, 25);  // the same in all heads of a table
    std::vector<bool> page_kept(static_cast<std::size_t>(s.tables * s.most_pages));
    for (std::size_t i = 0; i < page_kept.size(); ++i) page_kept[i] = chance(random, 60);
    for (index_t h = 0; h < heads(); ++h) {
      const index_t length = tables.lengths(b, h / s.heads_per_page);
      const index_t prefix = chance(random, 40) ? pick(random, 0, length) : 0;
      const index_t percent = kind == 0 ? 0 : kind == 1 ? 100 : pick(random, 0, 100);
      const index_t hole = kind >= 2 && kind < 6 ? pick(random, 0, length) : length;
      const index_t behind_hole = pick(random, hole, length);
      for (index_t n = 0; n < length; ++n) {
        const bool falls =
            n >= hole ? n < behind_hole : !(kind != 0 && n < prefix) && !chance(random, static_cast<int>(percent));
        const index_t page = h / s.heads_per_page * s.most_pages + n / s.page_size;
        if (kind >= 2 && whole_pages ? !page_kept[static_cast<std::size_t>(page)] : falls) continue;
        positions[static_cast<std::size_t>(h * capacity + kept_lengths[static_cast<std::size_t>(h)]++)] =
            static_cast<position_t>(n);
      }
    }
    const restkv::const_kept_tokens kept({positions.data(), {1, heads(), capacity}},
                                         {kept_lengths.data(), {1, heads()}});

    // What shared pages hold; which pages are taken over as they are, which are written where they are, how many copies
    // are needed and how many own pages are free for them: by definition.
    std::map<page_t, std::vector<tag>> shared;
    index_t needed = 0;
    index_t copies = 0;
    index_t relinked = 0;
    for (index_t t = 0; t < s.tables; ++t) {
      const index_t first_head = t * s.heads_per_page;
      const index_t before_pages = restkv::pages_of(tables.lengths(b, t), s.page_size);
      const auto all_slots = [&](index_t i, const auto& holds) {
        for (index_t h = first_head; h < first_head + s.heads_per_page; ++h) {
          for (index_t slot = i * s.page_size; slot < std::min<index_t>((i + 1) * s.page_size, kept.lengths(0, h));
               ++slot) {
            if (!holds(kept.positions(0, h, slot), slot)) return false;
          }
        }
        return true;
      };
      position_t longest = 0;
      for (index_t h = first_head; h < first_head + s.heads_per_page; ++h)
        longest = std::max(longest, kept.lengths(0, h));
      std::set<index_t> gone, mixed;
      for (index_t i = 0; i < restkv::pages_of(longest, s.page_size); ++i) {
        index_t from = -1;
        for (index_t j = 0; j < before_pages; ++j) {
          if (all_slots(i, [&](index_t position, index_t slot) {
                return position - j * s.page_size == slot - i * s.page_size;
              })) {
            from = j;
          }
        }
        if (from < 0) mixed.insert(i);
        if (from >= 0) gone.insert(from);
        relinked += from > i ? 1 : 0;
      }
      index_t table_copies = 0;
      index_t idle = 0;
      for (index_t i = 0; i < before_pages; ++i) {
        const page_t page = tables.ids(b, t, i);
        if (pool.references(page) > 1) shared.emplace(page, content(page));
        const bool own = pool.references(page) == 1;
        if (mixed.count(i) > 0 && own && gone.count(i) == 0) continue;  // written where it is
        table_copies += mixed.count(i) > 0 ? 1 : 0;
        bool keeps = gone.count(i) > 0;
        for (index_t h = first_head; h < first_head + s.heads_per_page; ++h) {
          for (index_t j = 0; j < kept.lengths(0, h); ++j) keeps = keeps || kept.positions(0, h, j) / s.page_size == i;
        }
        idle += own && !keeps ? 1 : 0;
      }
      copies += table_copies;
      needed += std::max<index_t>(0, table_copies - idle);
    }
    const state before = now();
    restkv::page_moves moves;
    const index_t available = pool.available();
    const status outcome = restkv::compact_pages(pool, kept, tables.sequence(b), restkv::workspace(plan_memory), moves,
                                                 key.view(), value.view());
    if (!outcome.ok()) {
      count("no page to copy to");
      require(outcome.code() == errc::workspace_too_small && needed > available && now() == before);
      for (const auto& [page, bytes] : shared) require(content(page) == bytes);
      return;
    }
    require(needed <= available && static_cast<index_t>(moves.fresh.size()) == needed);
    count(kind == 0 ? "kept none" : kind == 1 ? "kept all" : "evicted");
    if (!moves.fresh.empty()) count("copied to free pages");
    if (copies > needed) count("copied to own pages");
    if (relinked > 0) count("taken over");
    for (const auto& [page, bytes] : shared) {
      require(content(page) == bytes);
      if (pool.references(page) == before.references[static_cast<std::size_t>(page)]) count("stayed shared");
    }
    std::set<page_t> freed;
    for (page_t page = 0; page < s.pages; ++page) {
      if (before.references[static_cast<std::size_t>(page)] > 0 && pool.references(page) == 0) freed.insert(page);
    }
    require(std::set<page_t>(moves.freed.begin(), moves.freed.end()) == freed && moves.freed.size() == freed.size());
    if (kind == 1) require(now() == before);
    for (index_t h = 0; h < heads(); ++h) {
      std::vector<tag> left;
      for (index_t i = 0; i < kept.lengths(0, h); ++i) {
        const auto n = static_cast<std::size_t>(kept.positions(0, h, i));
        left.push_back(n < of(b, h).size() ? of(b, h)[n] : 0);
      }
      of(b, h) = left;
    }
    for (index_t t = 0; t < s.tables; ++t) {
      position_t longest = 0;
      for (index_t h = t * s.heads_per_page; h < (t + 1) * s.heads_per_page; ++h)
        longest = std::max(longest, kept.lengths(0, h));
      require(tables.lengths(b, t) == longest);
      for (index_t i = restkv::pages_of(longest, s.page_size); i < s.most_pages; ++i) {
        require(tables.ids(b, t, i) == restkv::no_page);
      }
    }
  }

  [[nodiscard]] std::vector<tag> content(page_t page) const {
    std::vector<tag> numbers;
    for (index_t h = 0; h < s.heads_per_page; ++h) {
      for (index_t n = 0; n < s.page_size; ++n) {
        numbers.push_back(key.view()(page, h, n, 0));
        numbers.push_back(key.view()(page, h, n, 1));
        numbers.push_back(value.view()(page, h, n, 0));
      }
    }
    return numbers;
  }

  /// No page leaked, freed while in use, or counted wrongly.
  void check_pages() {
    std::vector<index_t> references(static_cast<std::size_t>(s.pages), 0);
    for (index_t b = 0; b < s.sequences; ++b) {
      for (index_t t = 0; t < s.tables; ++t) {
        for (index_t i = 0; i * s.page_size < tables.lengths(b, t); ++i) {
          ++references[static_cast<std::size_t>(tables.ids(b, t, i))];
        }
      }
    }
    index_t available = 0;
    for (page_t page = 0; page < s.pages; ++page) {
      require(pool.references(page) == references[static_cast<std::size_t>(page)]);
      available += references[static_cast<std::size_t>(page)] == 0 ? 1 : 0;
    }
    require(pool.available() == available);
  }

  void check_contents() {
    for (index_t b = 0; b < s.sequences; ++b) {
      for (index_t h = 0; h < heads(); ++h) {
        const std::vector<tag>& tokens = of(b, h);
        require(static_cast<index_t>(tokens.size()) <= tables.lengths(b, h / s.heads_per_page));
        for (index_t n = 0; n < static_cast<index_t>(tokens.size()); ++n) {
          const page_t page = tables.ids(b, h / s.heads_per_page, n / s.page_size);
          const tag token = tokens[static_cast<std::size_t>(n)];
          if (token == 0) continue;
          const index_t row = h % s.heads_per_page;
          const index_t place = n % s.page_size;
          require(key.view()(page, row, place, 0) == 2 * token && key.view()(page, row, place, 1) == 2 * token + 1 &&
                  value.view()(page, row, place, 0) == static_cast<std::uint16_t>(token));
        }
      }
    }
  }

  shape s;
  random_engine random;
  guarded_tensor<tag, 4> key;
  guarded_tensor<std::uint16_t, 4> value;
  std::vector<page_t> ids;
  std::vector<position_t> lengths;
  restkv::page_tables tables;
  std::vector<std::byte> pool_memory;
  std::vector<std::byte> plan_memory;
  restkv::page_pool pool;
  std::vector<std::vector<tag>> model;  // [sequences * heads], tokens
  tag last_ = 0;
  index_t steps_ = 0;
  std::map<std::string, index_t> counts_;
};

}  // namespace

TEST_CASE("paged sequences grow, fork, shrink and end as lists of tokens do") {
  random_engine random(11);
  std::map<std::string, index_t> counts;
  index_t steps = 0;
  for (unsigned trial = 0; trial < 250; ++trial) {
    const bool together = chance(random, 50);
    const index_t heads = pick(random, 1, 4);
    const index_t groups = chance(random, 20) ? pick(random, 1, 3) : 1;
    paged_model::shape shape{.pages = pick(random, 0, 24),
                             .page_size = chance(random, 25) ? 1 : pick(random, 2, 6),
                             .tables = together ? groups : heads,
                             .heads_per_page = together ? heads : groups,
                             .sequences = pick(random, 1, 5),
                             .most_pages = pick(random, 0, 9)};
    if (chance(random, 80))
      shape.pages = std::max<index_t>(shape.pages, 6), shape.most_pages = std::max<index_t>(shape.most_pages, 3);
    paged_model model(shape, trial);
    for (int i = 0; i < 600; ++i) model.step();
    steps += model.steps();
    for (const auto& [what, count] : model.counts()) counts[what] += count;
  }
  CHECK(steps >= 100000);
  for (const char* what :
       {"appended", "no page to append to", "table full", "forked", "evicted", "kept none", "kept all",
        "no page to copy to", "copied to free pages", "copied to own pages", "taken over", "stayed shared", "freed"}) {
    INFO(what << ": " << counts[what]);
    CHECK(counts[what] > 50);
  }
}
