// SPDX-License-Identifier: Apache-2.0
/// @file
/// `quantise` and `dequantise`: a whole tensor of keys or values to codes and back, and back into a workspace, for
/// scoring.
#pragma once

#include <restkv/cache/gather.hpp>
#include <restkv/cache/overlap.hpp>
#include <restkv/cache/quantised_view.hpp>
#include <restkv/core/workspace.hpp>

#include <algorithm>
#include <array>

namespace restkv {

namespace detail {

/// `may_overlap` for tensors of different element sizes, whose rows of channels count as one element where they are
/// contiguous: codes and scales that alternate in one buffer share no byte.
template <class T, class U, memory_space Space>
[[nodiscard]] bool rows_may_overlap(const tensor_view<T, 4, Space>& first,
                                    const tensor_view<U, 4, Space>& second) noexcept {
  const byte_range a = touched_bytes(first);
  const byte_range b = touched_bytes(second);
  if (!a.overlaps(b)) return false;
  const auto contiguous = [](const auto& view) { return view.extent(3) == 1 || view.stride(3) == 1; };
  if (!contiguous(first) || !contiguous(second)) return may_overlap(first, second);
  std::array<paired_axis, 4> axes{};
  for (std::size_t axis = 0; axis < 3; ++axis) {
    const index_t step_first = first.stride(axis) * static_cast<index_t>(sizeof(T));
    const index_t step_second = second.stride(axis) * static_cast<index_t>(sizeof(U));
    if (step_first != step_second && first.extent(axis) != 1 && second.extent(axis) != 1) return true;
    axes[axis] = {magnitude(first.extent(axis) != 1 ? step_first : step_second), first.extent(axis) - 1,
                  second.extent(axis) - 1};
  }
  axes[3] = {1, first.extent(3) * static_cast<index_t>(sizeof(T)) - 1,
             second.extent(3) * static_cast<index_t>(sizeof(U)) - 1};
  return !nest(axes) || reachable(axes, 0, static_cast<index_t>(b.first - a.first));
}

/// Codes that numbers can be rounded to.
[[nodiscard]] inline status check_integer_codes(const char* name, const code_format& format) noexcept {
  if (!format.e4m3) return {};
  return status::error(errc::unsupported, "%s has codes of %d bits that are floats: they are copied, and never made",
                       name, format.bits);
}

/// A quantised cache to be written: consistent, none of its parts the memory of another or of itself. A scale may lie
/// behind the codes of its token, in one row of bytes.
template <element Scale, memory_space Space>
[[nodiscard]] status check_quantised_output(const quantised_view<Scale, Space>& out) noexcept {
  RESTKV_RETURN_IF_FAILED(out.check());
  RESTKV_RETURN_IF_FAILED(check_distinct("out.codes", out.codes));
  RESTKV_RETURN_IF_FAILED(check_distinct("out.scale", out.scale));
  RESTKV_RETURN_IF_FAILED(check_distinct("out.zero", out.zero));
  RESTKV_RETURN_IF_FAILED(check_distinct("out.offset", out.offset));
  const auto& second = out.zero.data != nullptr ? out.zero : out.offset;
  const auto apart = [](const char* first, const auto& a, const char* other, const auto& b) {
    return rows_may_overlap(a, b) ? overlap_error(first, other, touched_bytes(a), touched_bytes(b)) : status{};
  };
  RESTKV_RETURN_IF_FAILED(apart("out.codes", out.codes, "out.scale", out.scale));
  RESTKV_RETURN_IF_FAILED(apart("out.codes", out.codes, "out's zero points", second));
  RESTKV_RETURN_IF_FAILED(apart("out.scale", out.scale, "out's zero points", second));
  if (out.kind() == quantisation_kind::symmetric && !out.format.is_signed) {
    return status::error(errc::unsupported, "codes of %d bits from 0 need a zero point or an offset", out.format.bits);
  }
  return {};
}

/// That no part of a quantised cache lies within some bytes.
template <element Scale, memory_space Space>
[[nodiscard]] status check_quantised_apart(const char* name, const quantised_view<Scale, Space>& cache,
                                           const char* other, const byte_range& bytes) noexcept {
  RESTKV_RETURN_IF_FAILED(check_disjoint(name, touched_bytes(cache.codes), other, bytes));
  RESTKV_RETURN_IF_FAILED(check_disjoint(name, touched_bytes(cache.scale), other, bytes));
  RESTKV_RETURN_IF_FAILED(check_disjoint(name, touched_bytes(cache.zero), other, bytes));
  return check_disjoint(name, touched_bytes(cache.offset), other, bytes);
}

/// Makes codes and parameters for one group: tokens [first, last) by channels [from, to), whose numbers are
/// number(n, c). Each is asked for twice, the second time just before its code is written; parameters are written last.
template <element Scale, class Number>
void quantise_group(const quantised_view<Scale>& out, index_t b, index_t h, index_t first, index_t last, index_t from,
                    index_t to, const Number& number) noexcept {
  number_range range;
  for (index_t n = first; n < last; ++n) {
    for (index_t c = from; c < to; ++c) range.include(number(n, c));
  }
  const auto group = fit_group<Scale>(range, out.format, out.kind());
  for (index_t n = first; n < last; ++n) {
    for (index_t c = from; c < to; ++c) {
      out.set_code(b, h, n, c, quantise_number(number(n, c), group, out.format, out.kind()));
    }
  }
  out.set_group(b, h, first / out.tokens_per_group, from / out.channels_per_group, group);
}

/// Codes [from, from + count) of a token.
template <int Bits, element Scale, std::floating_point Real>
void read_codes(const quantised_view<const Scale>& in, index_t b, index_t h, index_t n, index_t from, index_t count,
                Real* codes) noexcept {
  constexpr index_t per_byte = 8 / Bits;
  const code_format format{Bits, in.format.is_signed, in.format.packed, in.format.e4m3};
  const bool along_channels = in.format.packed == cache_axis::channels;
  const auto row = in.codes[b][h][along_channels ? n : n / per_byte];
  for (index_t i = 0; i < count; ++i) {
    const index_t c = from + i;
    const std::uint8_t byte = row(along_channels ? c / per_byte : c);
    codes[i] = format.template number<Real>(byte, (along_channels ? c : n) % per_byte);
  }
}

/// Tokens [first, first + out.extent(0)) of one head, as numbers. [tokens, channels]
template <element Scale, element T>
void dequantise_head(const quantised_view<const Scale>& in, index_t b, index_t h, index_t first,
                     const tensor_view<T, 2>& out) noexcept {
  using real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  constexpr index_t block = 64;  // channels whose parameters are widened once for a group of tokens
  std::array<group_parameters<real>, block> groups;
  std::array<real, block> codes;
  for (index_t begin = 0, end = 0; begin < out.extent(0); begin = end) {
    const index_t token_group = (first + begin) / in.tokens_per_group;
    end = std::min(out.extent(0), (token_group + 1) * in.tokens_per_group - first);
    for (index_t from = 0; from < in.channels; from += block) {
      const index_t count = std::min(block, in.channels - from);
      for (index_t i = 0, next = 0; i < count; i = next) {
        const index_t channel_group = (from + i) / in.channels_per_group;
        const auto group = in.group(b, h, token_group, channel_group);
        next = std::min(count, (channel_group + 1) * in.channels_per_group - from);
        std::fill(groups.begin() + i, groups.begin() + next,
                  group_parameters<real>{widen<real>(group.scale), widen<real>(group.zero), widen<real>(group.offset)});
      }
      for (index_t n = begin; n < end; ++n) {
        switch (in.format.bits) {
          case 8:
            read_codes<8>(in, b, h, first + n, from, count, codes.data());
            break;
          case 4:
            read_codes<4>(in, b, h, first + n, from, count, codes.data());
            break;
          default:
            read_codes<2>(in, b, h, first + n, from, count, codes.data());
            break;
        }
        for (index_t i = 0; i < count; ++i) {
          out(n, from + i) =
              narrow<T>(groups[static_cast<std::size_t>(i)].value_at(codes[static_cast<std::size_t>(i)]));
        }
      }
    }
  }
}

}  // namespace detail

/// Quantises a tensor: codes and parameters of every group, as `quantisation.hpp` says.
///
/// in: [batch, heads, tokens, channels], any strides; out: a cache of the same sizes. For one whose sequences do not
/// fill the token axis, slice both.
///
/// Fails, before anything is written: other sizes, an inconsistent cache, one of e4m3 codes, one of unsigned codes with
/// neither zero points nor offsets, and memory that overlaps. Cost: two reads of the tensor, one write of the codes.
template <element T, element Scale, parallel_loop ParallelFor = serial_for>
  requires(!std::is_const_v<Scale>)
[[nodiscard]] status quantise(const tensor_view<T, 4>& in, const quantised_view<Scale>& out,
                              const ParallelFor& parallel_for = {}) {
  RESTKV_RETURN_IF_FAILED(detail::check_view("in", in));
  RESTKV_RETURN_IF_FAILED(detail::check_quantised_output(out));
  RESTKV_RETURN_IF_FAILED(detail::check_integer_codes("out", out.format));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("in", "sequences", in.extent(0), "out", out.batch()));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("in", "heads", in.extent(1), "out", out.heads()));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("in", "tokens", in.extent(2), "out", out.tokens));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("in", "channels", in.extent(3), "out", out.channels));
  RESTKV_RETURN_IF_FAILED(detail::check_quantised_apart("out", out, "in", touched_bytes(in)));
  parallel_for(out.batch() * out.heads(), [&](index_t row) {
    const index_t b = row / out.heads();
    const index_t h = row % out.heads();
    const auto number = [&](index_t n, index_t c) { return widen<double>(in(b, h, n, c)); };
    for (index_t first = 0; first < out.tokens; first += out.tokens_per_group) {
      for (index_t from = 0; from < out.channels; from += out.channels_per_group) {
        detail::quantise_group(out, b, h, first, std::min(out.tokens, first + out.tokens_per_group), from,
                               std::min(out.channels, from + out.channels_per_group), number);
      }
    }
  });
  return {};
}

/// Tokens [first, first + out.extent(2)) of a quantised cache as numbers: out(b, h, n, c) =
/// scale * (code - zero) + offset of token first + n, computed in float (in double for a double `out`) and rounded to
/// T.
///
/// out: [batch, heads, tokens to read, channels], any strides. Fails, before anything is written: an inconsistent
/// cache, other sizes, tokens that the cache does not have, memory that overlaps. Cost: one read, one write.
template <element Scale, element T, parallel_loop ParallelFor = serial_for>
  requires(!std::is_const_v<T>)
[[nodiscard]] status dequantise(const quantised_view<Scale>& in, const tensor_view<T, 4>& out, index_t first = 0,
                                const ParallelFor& parallel_for = {}) {
  RESTKV_RETURN_IF_FAILED(in.check());
  RESTKV_RETURN_IF_FAILED(detail::check_view("out", out));
  RESTKV_RETURN_IF_FAILED(detail::check_distinct("out", out));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("out", "sequences", out.extent(0), "in", in.batch()));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("out", "heads", out.extent(1), "in", in.heads()));
  RESTKV_RETURN_IF_FAILED(detail::check_equal("out", "channels", out.extent(3), "in", in.channels));
  if (first < 0 || first > in.tokens || out.extent(2) > in.tokens - first) {
    return status::error(errc::shape_mismatch, "%lld tokens from token %lld on: the cache has %lld",
                         static_cast<long long>(out.extent(2)), static_cast<long long>(first),
                         static_cast<long long>(in.tokens));
  }
  RESTKV_RETURN_IF_FAILED(detail::check_quantised_apart("in", in, "out", touched_bytes(out)));
  const quantised_view<const std::remove_const_t<Scale>> from = in;
  parallel_for(in.batch() * in.heads(), [&](index_t row) {
    const index_t b = row / in.heads();
    const index_t h = row % in.heads();
    detail::dequantise_head<std::remove_const_t<Scale>>(from, b, h, first, out[b][h]);
  });
  return {};
}

/// A quantised cache as a tensor that a `layer_view` takes: T numbers in memory taken from a workspace, which the next
/// layer may use again. `half` or `bfloat16` take as much memory as the cache of a model that is not quantised.
///
/// tensor: [batch, heads, tokens, channels], dense, valid as long as the workspace's memory. With a counting workspace
/// only its size is added up and `tensor` is null, so that planning and running are the same call.
///
/// Fails as the other `dequantise` does, and when the workspace is too small; `tensor` is then as it was.
template <element T, element Scale, parallel_loop ParallelFor = serial_for>
[[nodiscard]] status dequantise(const quantised_view<Scale>& in, workspace& memory, tensor_view<T, 4>& tensor,
                                const ParallelFor& parallel_for = {}) {
  RESTKV_RETURN_IF_FAILED(in.check());
  tensor_view<T, 4> made(nullptr, {in.batch(), in.heads(), in.tokens, in.channels});
  made.data = memory.take<T>(made.size());
  RESTKV_RETURN_IF_FAILED(memory.check());
  if (!memory.counting()) RESTKV_RETURN_IF_FAILED(dequantise(in, made, 0, parallel_for));
  tensor = made;
  return {};
}

}  // namespace restkv
