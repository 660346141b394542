// SPDX-License-Identifier: Apache-2.0
// Whatever moves tokens of a cache - dense, ragged, chunked, quantised, by channels, rotated - over any sizes, strides
// and kept indices: it fails with a reason and writes nothing, or it writes what the kept set says. Every tensor has a
// buffer of exactly the elements it can touch, so that whatever reads or writes beside one is seen by the address
// sanitizer.
#include "fuzz/byte_source.hpp"

#include <restkv/cache/channel_pruning.hpp>
#include <restkv/cache/compact.hpp>
#include <restkv/cache/quantise.hpp>
#include <restkv/cache/quantised_gather.hpp>
#include <restkv/cache/rope.hpp>
#include <restkv/cache/split_kept.hpp>

#include <cstring>

namespace {

using namespace restkv;
using namespace restkv_test;

template <class T, std::size_t Rank>
void fill(exact_tensor<T, Rank>& tensor, byte_source& bytes) {
  auto state = static_cast<std::uint64_t>(bytes.any_number());
  for (T& element : tensor.memory) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    element = static_cast<T>(state >> 48);
  }
}

/// A kept set whose positions mostly ascend within the tokens.
struct kept_set {
  exact_tensor<position_t, 3> positions;
  exact_tensor<position_t, 2> lengths;
  kept_tokens view;

  kept_set(index_t batch, index_t heads, index_t capacity, index_t tokens, byte_source& bytes)
      : positions(strided_tensor<position_t, 3>({batch, heads, capacity}, bytes)),
        lengths(strided_tensor<position_t, 2>({batch, heads}, bytes)),
        view(positions.view, lengths.view) {
    const bool sound = !bytes.chance(6);
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        index_t position = -1;
        index_t kept = 0;
        while (kept < capacity && position + 1 < tokens) {
          position += bytes.within(1, 3);
          if (position >= tokens) break;
          positions.view(b, h, kept++) = static_cast<position_t>(position);
        }
        lengths.view(b, h) = static_cast<position_t>(kept);
        if (sound) continue;
        lengths.view(b, h) = static_cast<position_t>(bytes.chance(2) ? bytes.within(-1, 13) : bytes.any_number());
        if (capacity > 0)
          positions.view(b, h, bytes.within(0, capacity - 1)) = static_cast<position_t>(bytes.any_number());
      }
    }
    if (bytes.chance(16)) damage(view.positions, bytes);
    if (bytes.chance(16)) damage(view.lengths, bytes);
  }
};

/// What a call may have done to `memory`: nothing where it failed.
template <class T>
struct before {
  const std::vector<T>& memory;
  std::vector<T> copy;
  explicit before(const std::vector<T>& of) : memory(of), copy(of) {}
  void check(const status& outcome) const {
    require(outcome.ok() == (outcome.message()[0] == '\0'));
    if (!outcome.ok()) require(std::memcmp(memory.data(), copy.data(), memory.size() * sizeof(T)) == 0);
  }
};

using code = std::uint16_t;

struct sizes {
  index_t batch, heads, group, tokens, dim, capacity;
  explicit sizes(byte_source& bytes)
      : batch(bytes.within(0, 2)),
        heads(bytes.within(0, 3)),
        group(bytes.chance(3) ? 2 : 1),
        tokens(bytes.within(0, 20)),
        dim(bytes.within(0, 6)),
        capacity(bytes.within(0, 12)) {}
};

void gather(byte_source& bytes, const sizes& n) {
  auto source = strided_tensor<code, 4>({n.batch, n.heads, n.tokens, n.dim}, bytes);
  auto beside = strided_tensor<code, 4>({n.batch, n.heads, n.tokens, n.dim}, bytes);
  fill(source, bytes);
  fill(beside, bytes);
  const kept_set kept(n.batch, n.heads * n.group, n.capacity, n.tokens, bytes);
  auto first = source.view;
  auto second = beside.view;
  if (bytes.chance(16)) damage(first, bytes);
  if (bytes.chance(16)) damage(second, bytes);
  const index_t cut = n.tokens > 0 ? bytes.within(0, n.tokens) : 0;
  const tensor_view<const code, 4> chunks[] = {source.view.slice(2, 0, cut), source.view.slice(2, cut, n.tokens - cut)};
  const bool chunked = bytes.chance(3);
  const chunked_tensor_view<const code> key = chunked ? chunked_tensor_view<const code>(chunks, 2) : first;
  auto out =
      strided_tensor<code, 4>({n.batch, n.heads * n.group, bytes.flag() ? n.capacity : n.capacity + 1, n.dim}, bytes);
  auto out_beside = strided_tensor<code, 4>({n.batch, n.heads * n.group, n.capacity, n.dim}, bytes);
  dense_layout<code> layout{out.view};
  if (bytes.chance(16)) damage(layout.rows, bytes);
  const before unchanged(out.memory);
  const before unchanged_beside(out_beside.memory);
  const status outcome = bytes.flag() ? gather_tokens(kept.view, key, layout)
                                      : compact(kept.view, key, second, layout, dense_layout{out_beside.view});
  unchanged.check(outcome);
  unchanged_beside.check(outcome);
  for (index_t b = 0; outcome.ok() && b < n.batch; ++b) {
    for (index_t h = 0; h < n.heads * n.group; ++h) {
      for (index_t i = 0; i < kept.lengths.view(b, h) && layout.rows.extents[2] > 0; ++i) {
        for (index_t c = 0; c < n.dim; ++c) {
          require(out.view(b, h, i, c) == source.view(b, h / n.group, kept.positions.view(b, h, i), c));
        }
      }
    }
  }

  const index_t entries = n.batch * n.heads * n.group + 1;
  auto offsets = strided_tensor<std::int64_t, 1>({entries}, bytes);
  exact_tensor<code, 2> rows({bytes.within(0, 60), n.dim});
  ragged_layout<code> ragged{rows.view, offsets.view, n.batch, n.heads * n.group};
  if (ragged_offsets(kept.view, offsets.view).ok() && bytes.chance(3)) {
    offsets.view(bytes.within(0, entries - 1)) = bytes.chance(2) ? bytes.within(-1, 60) : bytes.any_number();
  }
  if (bytes.chance(16)) damage(ragged.rows, bytes);
  if (bytes.chance(16)) damage(ragged.offsets, bytes);
  if (bytes.chance(16)) ragged.sequences = bytes.any_number();
  if (bytes.chance(16)) ragged.heads_per_sequence = bytes.any_number();
  const before unchanged_rows(rows.memory);
  unchanged_rows.check(gather_tokens(kept.view, key, ragged));

  const before unchanged_key(source.memory);
  const before unchanged_value(beside.memory);
  const status moved = compact_in_place(kept.view, first, second);
  unchanged_key.check(moved);
  unchanged_value.check(moved);
}

void split_and_rotate(byte_source& bytes, const sizes& n) {
  const kept_set kept(n.batch, n.heads, n.capacity, n.tokens, bytes);
  kept_set front(n.batch, n.heads, bytes.within(0, 12), 0, bytes);
  kept_set back(n.batch, n.heads, bytes.within(0, 12), 0, bytes);
  const before unchanged_front(front.positions.memory);
  const before unchanged_back(back.lengths.memory);
  const status split =
      split_kept(kept.view, bytes.chance(8) ? bytes.any_number() : bytes.within(-1, 22), front.view, back.view);
  unchanged_front.check(split);
  unchanged_back.check(split);

  auto keys = strided_tensor<float, 4>({n.batch, n.heads, n.capacity, n.dim}, bytes);
  fill(keys, bytes);
  auto view = keys.view;
  if (bytes.chance(8)) damage(view, bytes);
  std::vector<double> frequencies(static_cast<std::size_t>(bytes.within(0, 4)));
  for (double& frequency : frequencies) frequency = static_cast<double>(bytes.parameter());
  const before unchanged(keys.memory);
  unchanged.check(
      rotate_keys(kept.view, view, frequencies, bytes.flag() ? rotary_pairs::half_split : rotary_pairs::interleaved));
}

/// A quantised cache of the sizes, sometimes with a size that is wrong.
struct quantised_cache {
  exact_tensor<std::uint8_t, 4> codes;
  exact_tensor<half, 4> scale;
  exact_tensor<half, 4> zero;
  quantised_view<half> view;

  quantised_cache(index_t batch, index_t heads, index_t tokens, index_t channels, const code_format& format,
                  index_t of_tokens, index_t of_channels, int kind, byte_source& bytes) {
    const bool along_channels = format.packed == cache_axis::channels;
    const auto parts = [](index_t n, index_t of) { return n / of + (n % of != 0 ? 1 : 0); };
    codes = strided_tensor<std::uint8_t, 4>({batch, heads, along_channels ? tokens : format.bytes(tokens),
                                             along_channels ? format.bytes(channels) : channels},
                                            bytes);
    const std::array groups{batch, heads, parts(tokens, of_tokens), parts(channels, of_channels)};
    scale = strided_tensor<half, 4>(groups, bytes);
    view = {codes.view, scale.view, {}, {}, tokens, channels, of_tokens, of_channels, format};
    if (kind != 0) {
      zero = strided_tensor<half, 4>(groups, bytes);
      (kind == 1 ? view.zero : view.offset) = zero.view;
    }
    if (bytes.chance(16)) damage(view.codes, bytes);
    if (bytes.chance(16)) damage(view.scale, bytes);
    if (kind == 1 && bytes.chance(16)) damage(view.zero, bytes);
    if (bytes.chance(24)) view.tokens = bytes.any_number();
    if (bytes.chance(24)) view.channels = bytes.any_number();
    if (bytes.chance(24)) view.tokens_per_group = bytes.any_number();
    if (bytes.chance(24)) view.channels_per_group = bytes.any_number();
    if (bytes.chance(24)) view.format.bits = static_cast<int>(bytes.any_number());
  }
};

void quantised(byte_source& bytes, const sizes& n) {
  constexpr int bits[] = {2, 4, 8};
  const code_format format{bits[bytes.within(0, 2)], bytes.flag(),
                           bytes.flag() ? cache_axis::channels : cache_axis::tokens};
  const index_t of_tokens = bytes.chance(8) ? index_t(1) << 62 : bytes.within(1, 8);
  const index_t of_channels = bytes.chance(8) ? INT64_MAX : bytes.within(1, 8);
  const int kind = static_cast<int>(bytes.within(0, 2));
  quantised_cache cache(n.batch, n.heads, n.tokens, n.dim, format, of_tokens, of_channels, kind, bytes);
  quantised_cache other(n.batch, n.heads * n.group, n.capacity, n.dim, format, of_tokens, of_channels, kind, bytes);
  auto in = strided_tensor<float, 4>({n.batch, n.heads, n.tokens, n.dim}, bytes);
  fill(in, bytes);
  auto view = in.view;
  if (bytes.chance(8)) damage(view, bytes);
  const before codes(cache.codes.memory);
  codes.check(quantise(view, cache.view));
  auto back = strided_tensor<float, 4>({n.batch, n.heads, bytes.within(0, n.tokens), n.dim}, bytes);
  const before unchanged(back.memory);
  unchanged.check(dequantise(cache.view, back.view, bytes.chance(8) ? bytes.any_number() : bytes.within(-1, 4)));
  const kept_set kept(n.batch, n.heads * n.group, n.capacity, n.tokens, bytes);
  const before unchanged_other(other.codes.memory);
  unchanged_other.check(gather_tokens(kept.view, cache.view, other.view));
  const before unchanged_codes(cache.codes.memory);
  unchanged_codes.check(compact_in_place(kept.view, cache.view));
}

void channels(byte_source& bytes, const sizes& n) {
  auto query = strided_tensor<float, 4>({n.batch, n.heads * n.group, bytes.within(0, n.tokens), n.dim}, bytes);
  auto key = strided_tensor<float, 4>({n.batch, n.heads, n.tokens, n.dim}, bytes);
  fill(query, bytes);
  fill(key, bytes);
  auto scores = strided_tensor<double, 3>({n.batch, n.heads, n.dim}, bytes);
  auto chosen = strided_tensor<position_t, 3>({n.batch, n.heads, bytes.within(0, 7)}, bytes);
  layer_view<float> layer;
  layer.query = query.view;
  if (bytes.chance(8)) damage(layer.query, bytes);
  auto key_view = key.view;
  if (bytes.chance(8)) damage(key_view, bytes);
  layer.key = key_view;
  auto out_scores = scores.view;
  if (bytes.chance(8)) damage(out_scores, bytes);
  const before unchanged_scores(scores.memory);
  unchanged_scores.check(score_channels(layer, bytes.chance(8) ? bytes.any_number() : bytes.within(0, 9), out_scores));
  const before unchanged_chosen(chosen.memory);
  unchanged_chosen.check(select_channels(out_scores, chosen.view));
  if (bytes.chance(4) && !chosen.memory.empty()) chosen.memory[0] = static_cast<position_t>(bytes.any_number());
  auto out = strided_tensor<float, 4>({n.batch, n.heads, n.tokens, chosen.view.extent(2)}, bytes);
  const before unchanged(out.memory);
  unchanged.check(gather_channels(tensor_view<const position_t, 3>(chosen.view), key_view, out.view));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  byte_source bytes(data, size);
  const int what = static_cast<int>(bytes.within(0, 3));
  const sizes n(bytes);
  switch (what) {
    case 0:
      gather(bytes, n);
      break;
    case 1:
      split_and_rotate(bytes, n);
      break;
    case 2:
      quantised(bytes, n);
      break;
    default:
      channels(bytes, n);
  }
  return 0;
}
