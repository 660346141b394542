// SPDX-License-Identifier: Apache-2.0
// A paged cache under any sequence of calls: sequences grow, fork, are compacted and released, tables are damaged. A
// count of who refers to each page is kept beside the pool and must agree; a call that fails changes nothing; tables of
// any sizes, strides and entries are refused or safe to follow.
#include "fuzz/byte_source.hpp"

#include <restkv/cache/paged_compact.hpp>
#include <restkv/cache/paged_gather.hpp>
#include <restkv/cache/paged_sequence.hpp>
#include <restkv/interop/page_tables.hpp>

#include <cstring>

namespace {

using namespace restkv;
using namespace restkv_test;

using code = std::uint16_t;

class paged_cache {
 public:
  explicit paged_cache(byte_source& bytes)
      : pages_(bytes.within(0, 12)),
        page_size_(bytes.within(1, 4)),
        batch_(bytes.within(1, 3)),
        count_(bytes.within(1, 2)),
        heads_(bytes.within(1, 2)),
        key_(exact_tensor<code, 4>({pages_, heads_, page_size_, 2})),
        value_(exact_tensor<code, 4>({pages_, heads_, page_size_, 3})),
        ids_(exact_tensor<page_t, 3>({batch_, count_, bytes.within(0, 5)})),
        lengths_(exact_tensor<position_t, 2>({batch_, count_})),
        memory_(page_pool::required_bytes(pages_)) {
    require(pool_.reset(pages_, workspace(memory_)).ok());
    tables_ = {ids_.view, lengths_.view};
    if (pages_ > 0 && bytes.chance(3)) {
      auto strided = strided_tensor<code, 4>({pages_, heads_, page_size_, 2}, bytes);
      if (!may_overlap_itself(strided.view)) key_ = std::move(strided);
    }
    for (std::size_t i = 0; i < key_.memory.size(); ++i) key_.memory[i] = static_cast<code>(i);
  }

  /// One call; false where the tables were damaged and the pool can no longer be reckoned with.
  bool step(byte_source& bytes) {
    const auto what = bytes.within(0, 9);
    const index_t sequence = bytes.chance(12) ? bytes.any_number() : bytes.within(0, batch_ - 1);
    const bool damaged = bytes.chance(16);
    page_tables used = tables_;
    auto key = key_.view;
    if (damaged) damage_tables(bytes, used, key);
    const state before(*this);
    status outcome;
    switch (what) {
      case 0:
      case 1:
      case 2:
        outcome = extend_sequence(pool_, used, sequence, bytes.chance(12) ? bytes.any_number() : bytes.within(0, 7),
                                  key, value_.view);
        break;
      case 3:
        outcome = fork_sequence(pool_, used, page_size_, sequence, bytes.within(-1, 3));
        break;
      case 4:
        outcome = release_sequence(pool_, used, page_size_, sequence);
        break;
      case 5:
      case 6:
        outcome = compact(bytes, used, key);
        break;
      case 7:
        read(bytes, used, key);
        break;
      default:
        lists(bytes, used, sequence);
    }
    require(outcome.ok() == (outcome.message()[0] == '\0'));
    if (!outcome.ok()) require(state(*this) == before);
    if (damaged) return false;
    check_references();
    return true;
  }

 private:
  /// Everything that a call may change.
  struct state {
    std::vector<page_t> ids;
    std::vector<position_t> lengths;
    std::vector<code> key;
    index_t available;
    std::vector<index_t> references;
    explicit state(const paged_cache& of)
        : ids(of.ids_.memory), lengths(of.lengths_.memory), key(of.key_.memory), available(of.pool_.available()) {
      for (page_t page = 0; page < of.pages_; ++page) references.push_back(of.pool_.references(page));
    }
    bool operator==(const state&) const = default;
  };

  void damage_tables(byte_source& bytes, page_tables& used, tensor_view<code, 4>& key) {
    switch (bytes.within(0, 4)) {
      case 0:
        damage(used.ids, bytes);
        break;
      case 1:
        damage(used.lengths, bytes);
        break;
      case 2:
        damage(key, bytes);
        break;
      case 3:
        ids_.memory[static_cast<std::size_t>(bytes.within(0, 99)) % ids_.memory.size()] =
            static_cast<page_t>(bytes.chance(2) ? bytes.within(-1, 13) : bytes.any_number());
        break;
      default:
        lengths_.memory[static_cast<std::size_t>(bytes.within(0, 99)) % lengths_.memory.size()] =
            static_cast<position_t>(bytes.chance(2) ? bytes.within(-1, 25) : bytes.any_number());
    }
  }

  status compact(byte_source& bytes, const page_tables& used, const tensor_view<code, 4>& key) {
    const index_t heads = count_ * heads_;
    exact_tensor<position_t, 3> positions({batch_, heads, 20});
    exact_tensor<position_t, 2> lengths({batch_, heads});
    for (index_t b = 0; b < batch_; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        index_t kept = 0;
        for (index_t n = bytes.within(0, 3); n < lengths_.view(b, h / heads_) && kept < 20; n += bytes.within(1, 3)) {
          positions.view(b, h, kept++) = static_cast<position_t>(n);
        }
        lengths.view(b, h) = static_cast<position_t>(kept);
      }
    }
    if (bytes.chance(8))
      positions.view(bytes.within(0, batch_ - 1), 0, 0) = static_cast<position_t>(bytes.any_number());
    if (bytes.chance(8)) lengths.view(bytes.within(0, batch_ - 1), 0) = static_cast<position_t>(bytes.any_number());
    kept_tokens kept(positions.view, lengths.view);
    if (bytes.chance(16)) damage(kept.positions, bytes);
    if (bytes.chance(16)) damage(kept.lengths, bytes);
    std::vector<std::byte> memory(page_moves_bytes(tables_));
    if (bytes.chance(16)) memory.resize(memory.size() / 2);
    page_moves moves;
    return compact_pages(pool_, kept, used, workspace(memory.data(), memory.size()), moves, key, value_.view);
  }

  void read(byte_source& bytes, const page_tables& used, const tensor_view<code, 4>& key) {
    const paged_layout<const code> layout{key, used};
    const exact_tensor<code, 4> out({batch_, count_ * heads_, bytes.within(0, 20), 2});
    static_cast<void>(copy_pages(layout, out.view).ok());
    static_cast<void>(paged_layout<code>{key, used}.check().ok());
    std::vector<tensor_view<const code, 4>> memory(static_cast<std::size_t>(bytes.within(0, 5)));
    chunked_tensor_view<const code> chunks;
    if (page_chunks(layout, bytes.within(-1, 3), bytes.within(-1, 2), memory, chunks).ok()) {
      for (index_t i = 0; i < chunks.chunks(); ++i) {
        const auto& part = chunks.chunk(i);
        for (index_t n = 0; n < part.extent(2); ++n) require(part(0, heads_ - 1, n, 1) == part(0, heads_ - 1, n, 1));
      }
    }
  }

  /// To lists of pages and back.
  void lists(byte_source& bytes, const page_tables& used, index_t sequence) {
    static_cast<void>(check_engine_tables(used, pages_, page_size_).ok());
    const index_t rows = batch_ * count_;
    exact_tensor<page_t, 1> indptr({rows + 1});
    exact_tensor<page_t, 1> indices({bytes.within(0, 30)});
    exact_tensor<position_t, 1> last({rows});
    page_lists made;
    made.indptr = indptr.view;
    made.indices = indices.view;
    made.last_page_len = last.view;
    const bool written = write_page_lists(used, pages_, page_size_, made).ok();
    const bool changed = bytes.chance(2);
    if (changed) {
      auto& memory = bytes.flag() ? indptr.memory : indices.memory;
      memory[static_cast<std::size_t>(bytes.within(0, 99)) % memory.size()] =
          static_cast<page_t>(bytes.chance(2) ? bytes.within(-1, 13) : bytes.any_number());
      last.memory[0] = static_cast<position_t>(bytes.any_number());
      if (bytes.chance(4)) damage(made.indptr, bytes);
      if (bytes.chance(4)) damage(made.indices, bytes);
      if (bytes.chance(4)) damage(made.last_page_len, bytes);
    }
    exact_tensor<page_t, 3> ids({batch_, count_, bytes.within(0, 6)});
    exact_tensor<position_t, 2> lengths({batch_, count_});
    const bool read = read_page_lists(made, pages_, page_size_, {ids.view, lengths.view}).ok();
    if (written && read && !changed) require(lengths.memory == lengths_.memory);
    exact_tensor<std::int64_t, 1> slots({bytes.within(0, 9)});
    auto view = slots.view;
    if (bytes.chance(16)) damage(view, bytes);
    static_cast<void>(slot_mapping(used, pages_, page_size_, sequence, bytes.within(-1, 2),
                                   bytes.chance(8) ? bytes.any_number() : bytes.within(0, 9), view)
                          .ok());
  }

  void check_references() const {
    std::vector<index_t> references(static_cast<std::size_t>(pages_), 0);
    for (index_t b = 0; b < batch_; ++b) {
      for (index_t t = 0; t < count_; ++t) {
        for (index_t i = 0; i < pages_of(lengths_.view(b, t), page_size_); ++i) {
          ++references[static_cast<std::size_t>(ids_.view(b, t, i))];
        }
      }
    }
    index_t free = 0;
    for (page_t page = 0; page < pages_; ++page) {
      require(pool_.references(page) == references[static_cast<std::size_t>(page)]);
      free += references[static_cast<std::size_t>(page)] == 0 ? 1 : 0;
    }
    require(pool_.available() == free);
  }

  index_t pages_;
  index_t page_size_;
  index_t batch_;
  index_t count_;  // tables of a sequence
  index_t heads_;  // of a page
  exact_tensor<code, 4> key_;
  exact_tensor<code, 4> value_;
  exact_tensor<page_t, 3> ids_;
  exact_tensor<position_t, 2> lengths_;
  std::vector<std::byte> memory_;
  page_pool pool_;
  page_tables tables_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  byte_source bytes(data, size);
  paged_cache cache(bytes);
  for (int calls = 0; calls < 40 && cache.step(bytes); ++calls) {
  }
  return 0;
}
