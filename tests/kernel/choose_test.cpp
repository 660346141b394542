// SPDX-License-Identifier: Apache-2.0
// The batched top-k kernels on the host group, in shuffled orders, against the top-k of one row.
#include "support/catch.hpp"

#include <restkv/kernel/choose_top_k.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <random>
#include <vector>

using namespace restkv;

namespace {

enum class content { random, five_values, all_equal, same_leading_bits, mostly_excluded, all_excluded, largest };
constexpr content contents[] = {
    content::random,          content::five_values,  content::all_equal, content::same_leading_bits,
    content::mostly_excluded, content::all_excluded, content::largest};

std::uint32_t make_key(content what, std::mt19937& engine) {
  const auto random = [&] { return static_cast<std::uint32_t>(engine()); };
  switch (what) {
    case content::random:
      return random();
    case content::five_values:
      return 0x80000000u + random() % 5;
    case content::all_equal:
      return 0xbf000001u;
    case content::same_leading_bits:
      return 0xbf123400u + random() % 700;
    case content::mostly_excluded:
      return random() % 50 == 0 ? random() | 1u : excluded_key;
    case content::all_excluded:
      return excluded_key;
    case content::largest:
      return random() % 3 == 0 ? ~std::uint32_t{0} : random() % 2 == 0 ? 1u : excluded_key;
  }
  return 0;
}

/// Values with guards before and behind them.
template <class T>
class guarded {
 public:
  explicit guarded(index_t count) : values_(static_cast<std::size_t>(count) + 2 * margin) {
    std::memset(static_cast<void*>(values_.data()), 0xa5, values_.size() * sizeof(T));
    before_ = values_;
  }
  [[nodiscard]] T* data() { return values_.data() + margin; }
  [[nodiscard]] bool intact() const {
    const auto same = [&](std::size_t first) {
      return std::memcmp(&values_[first], &before_[first], margin * sizeof(T)) == 0;
    };
    return same(0) && same(values_.size() - margin);
  }

 private:
  static constexpr std::size_t margin = 16;
  std::vector<T> values_;
  std::vector<T> before_;
};

/// Rows of keys of different lengths, in segments.
struct problem {
  index_t count = 1;
  index_t rows_per_segment = 1;
  index_t rows_per_span = 1;
  index_t units = 0;  // of the longest row
  index_t unit = 1;
  index_t stride = 0;
  content what = content::random;
  unsigned seed = 1;

  std::vector<bulk_span> spans;
  std::vector<index_t> firsts;  // of rows that lie in another order
  std::vector<std::uint32_t> memory;
  const std::uint32_t* keys = nullptr;
  bulk_rows rows;

  void make() {
    std::mt19937 random(seed);
    const auto pick = [&](index_t choices) { return static_cast<index_t>(random()) % choices; };
    stride = units + pick(4);
    spans.clear();
    for (index_t i = 0; i < (count + rows_per_span - 1) / rows_per_span; ++i) {
      bulk_span span;
      span.begin = static_cast<position_t>(pick(9));
      const index_t own = i == 0 ? units : units - pick(units + 1);
      span.length = static_cast<position_t>(own * unit - (own > 0 ? pick(unit) : 0));
      spans.push_back(span);
    }
    const index_t lead = pick(4);  // so that rows begin on no particular address
    memory.assign(static_cast<std::size_t>(lead + count * stride), 0);
    for (auto& key : memory) key = make_key(what, random);
    keys = memory.data() + lead;
    firsts.clear();
    for (index_t r = 0; r < count && seed % 2 == 1; ++r) firsts.push_back((count - 1 - r) * stride);
    rows = {spans.data(), count, rows_per_span, stride, unit, firsts.empty() ? nullptr : firsts.data()};
  }
  [[nodiscard]] index_t segments() const { return (count + rows_per_segment - 1) / rows_per_segment; }
  [[nodiscard]] index_t end(index_t segment) const { return std::min(count, (segment + 1) * rows_per_segment); }
  [[nodiscard]] std::uint32_t key(index_t row, index_t u) const {
    return u < rows.units_of(row) ? keys[rows.begin_of(row) + u] : std::uint32_t{excluded_key};
  }
  [[nodiscard]] top_k_pivot<std::uint32_t> pivot(index_t segment, index_t k) const {
    const index_t first = segment * rows_per_segment;
    return find_pivot<std::uint32_t>(
        end(segment) - first, units, [&](index_t r, index_t u) { return key(first + r, u); }, k);
  }
};

/// Working memory of exactly its size.
struct scratch {
  std::vector<std::byte> bytes;
  std::optional<kernel::top_k_memory> memory;

  scratch(const kernel::radix_tuning& tuning, const problem& p) {
    workspace counting;
    { const kernel::top_k_memory counted(tuning, {p.count, p.units}, counting); }
    bytes.assign(counting.required_bytes(), std::byte{0xcd});
    workspace space(bytes.data(), bytes.size());
    memory.emplace(tuning, bulk_shape{p.count, p.units}, space);
    REQUIRE(space.check().ok());
  }
};

constexpr kernel::radix_tuning one_block{.blocks_to_fill = 1, .least_keys_of_block = 8192};
constexpr kernel::radix_tuning split{.blocks_to_fill = 1 << 20, .least_keys_of_block = 250};
constexpr kernel::radix_tuning between{.blocks_to_fill = 12, .least_keys_of_block = 100};

/// How many keys are asked for: two of these in each turn.
std::array<index_t, 2> counts_of(const problem& p, index_t all, std::uint64_t turn) {
  const index_t some[] = {0, 1, all / 3, all - 1, all, all + 1, p.rows_per_segment * p.units + 5, -1};
  return {some[turn % 8], some[(turn + 3) % 8]};
}

void check_all(const problem& p, const kernel::radix_tuning& tuning, std::uint64_t seed) {
  kernel::conflict_recorder recorder;
  kernel::host_executor executor(seed, &recorder);
  scratch memory(tuning, p);
  index_t all = 0;
  for (index_t r = 0; r < p.end(0); ++r) {
    for (index_t u = 0; u < p.units; ++u) all += p.key(r, u) != excluded_key;
  }
  for (const index_t k : counts_of(p, all, seed)) {
    CAPTURE(p.count, p.rows_per_segment, p.units, p.unit, static_cast<int>(p.what), p.seed, seed, k,
            tuning.blocks_to_fill);
    const std::vector<index_t> wanted(static_cast<std::size_t>(p.segments()), k);
    guarded<top_k_pivot<std::uint32_t>> pivots(p.segments());
    kernel::find_pivots(executor, *memory.memory, p.keys, p.rows, p.rows_per_segment, wanted.data(), pivots.data());
    REQUIRE(pivots.intact());
    for (index_t s = 0; s < p.segments(); ++s) {
      const auto expected = p.pivot(s, k);
      REQUIRE(pivots.data()[s].key == expected.key);
      REQUIRE(pivots.data()[s].greater == expected.greater);
      REQUIRE(pivots.data()[s].equal == expected.equal);
    }

    guarded<index_t> counts(p.count);
    kernel::count_chosen(executor, *memory.memory, p.keys, p.rows, p.rows_per_segment, pivots.data(), counts.data());
    REQUIRE(counts.intact());
    std::vector<top_k_pivot<std::uint32_t>> of_rows(static_cast<std::size_t>(p.count));
    for (index_t s = 0; s < p.segments(); ++s) {
      index_t left = pivots.data()[s].equal;
      for (index_t r = s * p.rows_per_segment; r < p.end(s); ++r) {
        index_t chosen = 0;
        index_t equal = 0;
        for (index_t u = 0; u < p.units; ++u) {
          if (p.key(r, u) == excluded_key) continue;
          chosen += p.key(r, u) > pivots.data()[s].key;
          equal += p.key(r, u) == pivots.data()[s].key;
        }
        const index_t taken = std::min(equal, left);
        left -= taken;
        REQUIRE(counts.data()[r] == chosen + taken);
        of_rows[static_cast<std::size_t>(r)] = {pivots.data()[s].key, chosen, taken};
      }
    }

    const index_t tokens = p.units * p.unit;
    for (const index_t capacity : {tokens, tokens / 2, index_t{0}}) {
      constexpr index_t copies = 2;
      guarded<position_t> positions(p.count * copies * capacity);
      guarded<position_t> lengths(p.count * copies);
      std::vector<index_t> firsts;
      for (index_t row = p.count * copies; row-- > 0 && seed % 3 == 1;) firsts.push_back(row * capacity);
      const bulk_kept kept{positions.data(), lengths.data(), capacity, copies,
                           firsts.empty() ? nullptr : firsts.data()};
      kernel::write_chosen(executor, *memory.memory, p.keys, p.rows, of_rows.data(), kept);
      REQUIRE(positions.intact());
      REQUIRE(lengths.intact());
      for (index_t r = 0; r < p.count; ++r) {
        const auto pivot = of_rows[static_cast<std::size_t>(r)];
        std::vector<position_t> expected;
        index_t left = pivot.equal;
        const bulk_span& span = p.rows.span_of(r);
        for (index_t u = 0; u < p.rows.units_of(r); ++u) {
          const std::uint32_t key = p.key(r, u);
          if (key != excluded_key && key <= pivot.key && !(key == pivot.key && left-- > 0)) continue;
          const index_t of_unit = std::min(p.unit, span.length - u * p.unit);
          if (static_cast<index_t>(expected.size()) + of_unit > capacity) break;
          for (index_t i = 0; i < of_unit; ++i) {
            expected.push_back(static_cast<position_t>(span.begin + u * p.unit + i));
          }
        }
        for (index_t c = 0; c < copies; ++c) {
          REQUIRE(lengths.data()[r * copies + c] == static_cast<position_t>(expected.size()));
          REQUIRE(std::equal(expected.begin(), expected.end(), positions.data() + kept.begin_of(r * copies + c)));
        }
      }
    }
  }
  for (const auto& conflict : recorder.conflicts()) {
    UNSCOPED_INFO("block " << conflict.block << " phase " << conflict.phase << " threads " << conflict.first << ", "
                           << conflict.second);
  }
  CHECK(recorder.conflicts().empty());
}

/// radix_split's counting, without the end of the phase that clears the histogram.
struct forgets_a_phase {
  static constexpr int threads = 64;
  struct shared {
    std::uint32_t histogram[kernel::radix_digit::bins];
  };
  kernel::key_row row;
  std::uint32_t* out;

  template <class Group>
  void operator()(Group& group, shared& memory, index_t) const {
    group.for_each(kernel::radix_digit::bins, [&](index_t i) { group.write(memory.histogram[i], 0u); });
    kernel::for_each_keys(group, row, 0, row.quads(), false, [&](const auto& keys) {
      kernel::count_digits(group, memory.histogram, keys, kernel::radix_digit{0}, 0);
    });
    group.sync();
    group.for_each(kernel::radix_digit::bins, [&](index_t i) { group.write(out[i], group.read(memory.histogram[i])); });
  }
};

/// Blocks that write the same cell.
struct shares_a_cell {
  static constexpr int threads = 32;
  struct shared {};
  index_t* cell;

  template <class Group>
  void operator()(Group& group, shared&, index_t block) const {
    group.for_each(1, [&](index_t) { group.write(*cell, block); });
  }
};

/// A cell that every item reads and one changes in the same phase.
struct changes_what_others_read {
  static constexpr int threads = 32;
  struct shared {
    int cell;
  };
  int* out;

  template <class Group>
  void operator()(Group& group, shared& memory, index_t) const {
    group.for_each(1, [&](index_t) { group.write(memory.cell, 0); });
    group.sync();
    group.for_each(4, [&](index_t i) { group.write(out[i], group.read(memory.cell)); });
    group.for_each(1, [&](index_t) { group.write(memory.cell, group.read(memory.cell) + 1); });
  }
};

}  // namespace

TEST_CASE("Pivots, counts and positions of batches are those of single rows, in any order of the work", "[kernel]") {
  problem p;
  p.units = GENERATE(0, 1, 2, 5, 63, 700);
  p.what = GENERATE(from_range(std::begin(contents), std::end(contents)));
  p.count = 5;
  for (unsigned turn = 0; turn < 6; ++turn) {
    p.seed = turn + 1;
    p.rows_per_segment = turn % 3 == 0 ? 1 : turn % 3 == 1 ? 2 : 5;
    p.rows_per_span = turn % 2 == 1 ? 1 : 2;
    p.unit = turn % 3 == 0 ? 1 : turn % 3 == 1 ? 3 : 16;
    p.make();
    check_all(p, turn % 2 == 0 ? one_block : between, turn);
    check_all(p, split, turn + 1);
  }
}

TEST_CASE("Rows that are a tile long, or a key more or less", "[kernel]") {
  problem p;
  p.units = kernel::chosen_tile::units + GENERATE(-4, -1, 0, 1, 8192);
  p.what = GENERATE(content::five_values, content::random);
  p.count = 2;
  for (const auto& tuning : {one_block, split}) {
    p.seed = static_cast<unsigned>(p.units);
    p.make();
    kernel::conflict_recorder recorder;
    kernel::host_executor executor(p.seed, &recorder);
    scratch memory(tuning, p);
    const std::vector<index_t> wanted(2, p.units / 3);
    std::vector<top_k_pivot<std::uint32_t>> pivots(2);
    kernel::find_pivots(executor, *memory.memory, p.keys, p.rows, 1, wanted.data(), pivots.data());
    guarded<position_t> positions(2 * p.units);
    guarded<position_t> lengths(2);
    kernel::write_chosen(executor, *memory.memory, p.keys, p.rows, pivots.data(),
                         {positions.data(), lengths.data(), p.units, 1});
    CHECK(positions.intact());
    CHECK(lengths.intact());
    for (index_t r = 0; r < 2; ++r) {
      std::vector<position_t> expected(static_cast<std::size_t>(p.units));
      const auto length = static_cast<std::size_t>(p.rows.units_of(r));
      const index_t count = top_k<std::uint32_t>({p.keys + p.rows.begin_of(r), length}, wanted[0], expected.data());
      REQUIRE(lengths.data()[r] == static_cast<position_t>(count));
      const auto begin = p.rows.span_of(r).begin;
      for (index_t i = 0; i < count; ++i) {
        REQUIRE(positions.data()[r * p.units + i] == begin + expected[static_cast<std::size_t>(i)]);
      }
    }
    CHECK(recorder.conflicts().empty());
  }
}

TEST_CASE("Long rows, as a device's tuning splits them", "[kernel]") {
  problem p;
  p.units = 300007;
  p.what = GENERATE(content::five_values, content::random);
  p.count = 3;
  p.make();
  const index_t wanted = p.units / 128;
  for (const auto& tuning : {kernel::radix_tuning_for(80), kernel::radix_tuning_for(90), kernel::radix_tuning_for(100),
                             kernel::radix_tuning{.blocks_to_fill = 1, .least_keys_of_block = 1}}) {
    kernel::host_executor executor(1);
    scratch memory(tuning, p);
    const std::vector<index_t> counts(3, wanted);
    std::vector<top_k_pivot<std::uint32_t>> pivots(3);
    kernel::find_pivots(executor, *memory.memory, p.keys, p.rows, 1, counts.data(), pivots.data());
    std::vector<position_t> positions(static_cast<std::size_t>(3 * p.units));
    std::vector<position_t> lengths(3);
    kernel::write_chosen(executor, *memory.memory, p.keys, p.rows, pivots.data(),
                         {positions.data(), lengths.data(), p.units, 1});
    for (index_t r = 0; r < 3; ++r) {
      std::vector<position_t> expected(static_cast<std::size_t>(wanted));
      const auto length = static_cast<std::size_t>(p.rows.units_of(r));
      const index_t count = top_k<std::uint32_t>({p.keys + p.rows.begin_of(r), length}, wanted, expected.data());
      REQUIRE(lengths[static_cast<std::size_t>(r)] >= static_cast<position_t>(count));  // protected units too
      std::vector<position_t> found;
      for (index_t i = 0; i < lengths[static_cast<std::size_t>(r)]; ++i) {
        const position_t n = positions[static_cast<std::size_t>(r * p.units + i)] - p.rows.span_of(r).begin;
        if (p.key(r, n) != excluded_key) found.push_back(n);
      }
      expected.resize(static_cast<std::size_t>(count));
      REQUIRE(found == expected);
    }
  }
}

TEST_CASE("The recorder finds a phase that is not ended, and blocks that meet", "[kernel]") {
  std::vector<std::uint32_t> keys(500, 0x80000000u);
  std::vector<std::uint32_t> out(kernel::radix_digit::bins);
  kernel::conflict_recorder recorder;
  kernel::host_executor executor(3, &recorder);
  executor.launch(forgets_a_phase{{keys.data(), 500}, out.data()}, 1);
  CHECK_FALSE(recorder.conflicts().empty());

  kernel::conflict_recorder of_readers;
  kernel::host_executor first(3, &of_readers);
  int read[4];
  first.launch(changes_what_others_read{read}, 1);
  CHECK_FALSE(of_readers.conflicts().empty());

  kernel::conflict_recorder of_blocks;
  kernel::host_executor second(3, &of_blocks);
  index_t cell = 0;
  second.launch(shares_a_cell{&cell}, 3);
  CHECK_FALSE(of_blocks.conflicts().empty());
}
