// SPDX-License-Identifier: Apache-2.0
/// @file
/// One step of attention three times: over a ragged cache and over pages, as an engine's kernel reads them, and over
/// the whole cache with all but the kept tokens masked out, in double, which is what the other two must give.
#pragma once

#include <restkv/core/dtype.hpp>
#include <restkv/selection/kept_tokens.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

/// What attention must give, and what the bound on a computed output is made of.
struct expected_attention {
  std::vector<double> output;           ///< [batch, query_heads, head_dim], sum of p v over the kept tokens
  std::vector<double> magnitude;        ///< the same shape, sum of p |v|
  std::vector<double> value_sum;        ///< the same shape, sum of |v|
  std::vector<double> logit_magnitude;  ///< [batch, query_heads], largest scale * sum of |q k| of a kept token
  std::vector<std::int64_t> tokens;     ///< [batch, query_heads], kept tokens
};

/// How far a float computation may be off, for one output of `tokens` tokens and `channels` channels, with u = 2^-24:
///
/// - A logit is a sum of `channels` products times a scale: off by (channels + 2) u L, where L is scale * sum |q k|.
///   Subtracting the maximum, 2 L at most, and the exponential's own argument add a few u L.
/// - A weight exp(logit) is then off by the factor exp((channels + 8) u L) and the exponential's own 8 u.
/// - Numerator and denominator are sums of `tokens` terms. Both err in the weights and by `tokens` u in the sum, twice
///   that where partial sums are rescaled; then one division.
///
/// Everything relative to M = sum p |v|: the output is off by at most (2 w + (4 tokens + 8) u) M.
[[nodiscard]] inline double float_bound(std::int64_t tokens, std::int64_t channels, double logit_magnitude,
                                        double magnitude) {
  constexpr double u = 0x1p-24;
  const double weight = std::expm1(static_cast<double>(channels + 8) * u * logit_magnitude) + 8 * u;
  return (2 * weight + static_cast<double>(4 * tokens + 8) * u) * magnitude;
}

/// softmax(scale * q k) v of one query over `count` tokens; key(n) and value(n) point at the channels of token n.
template <class T, class Key, class Value>
void attend(const T* query, std::int64_t count, std::int64_t channels, const Key& key, const Value& value, float* out) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(channels));
  std::vector<float> weights(static_cast<std::size_t>(count));
  float most = -std::numeric_limits<float>::infinity();
  for (std::int64_t n = 0; n < count; ++n) {
    const T* const k = key(n);
    float dot = 0;
    for (std::int64_t c = 0; c < channels; ++c) dot += restkv::widen<float>(query[c]) * restkv::widen<float>(k[c]);
    weights[static_cast<std::size_t>(n)] = dot * scale;
    most = std::max(most, dot * scale);
  }
  float sum = 0;
  std::fill_n(out, channels, 0.0f);
  for (std::int64_t n = 0; n < count; ++n) {
    const float weight = std::exp(weights[static_cast<std::size_t>(n)] - most);
    const T* const v = value(n);
    sum += weight;
    for (std::int64_t c = 0; c < channels; ++c) out[c] += weight * restkv::widen<float>(v[c]);
  }
  for (std::int64_t c = 0; c < channels; ++c) out[c] /= sum;
}

/// What a variable-length kernel gets. A KV head of a sequence is a row of its own, row = b * kv_heads + h, with
/// `group` query heads: so each may have a length of its own.
template <class T>
struct ragged_arguments {
  const T* query;                            ///< [rows, group, channels], which is [batch, query_heads, channels]
  const T* key;                              ///< [total_tokens, channels]
  const T* value;                            ///< [total_tokens, channels]
  std::span<const std::int64_t> cu_seqlens;  ///< [rows + 1]
  std::int64_t group;
  std::int64_t channels;
};

/// [rows, group, channels]
template <class T>
[[nodiscard]] std::vector<float> ragged_attention(const ragged_arguments<T>& a) {
  const auto rows = static_cast<std::int64_t>(a.cu_seqlens.size()) - 1;
  std::vector<float> out(static_cast<std::size_t>(rows * a.group * a.channels));
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t begin = a.cu_seqlens[static_cast<std::size_t>(row)];
    const std::int64_t end = a.cu_seqlens[static_cast<std::size_t>(row + 1)];
    for (std::int64_t g = 0; g < a.group; ++g) {
      const std::int64_t at = (row * a.group + g) * a.channels;
      attend(
          a.query + at, end - begin, a.channels, [&](std::int64_t n) { return a.key + (begin + n) * a.channels; },
          [&](std::int64_t n) { return a.value + (begin + n) * a.channels; }, out.data() + at);
    }
  }
  return out;
}

/// What a kernel for pages gets; rows as above.
template <class T>
struct paged_arguments {
  const T* query;                              ///< [rows, group, channels]
  const T* key_pages;                          ///< [pages, page_size, channels]
  const T* value_pages;                        ///< [pages, page_size, channels]
  std::span<const std::int32_t> block_tables;  ///< [rows, most_pages]
  std::span<const std::int32_t> lengths;       ///< [rows]
  std::int64_t page_size;
  std::int64_t group;
  std::int64_t channels;
};

/// [rows, group, channels]
template <class T>
[[nodiscard]] std::vector<float> paged_attention(const paged_arguments<T>& a) {
  const auto rows = static_cast<std::int64_t>(a.lengths.size());
  const std::int64_t most_pages = static_cast<std::int64_t>(a.block_tables.size()) / rows;
  std::vector<float> out(static_cast<std::size_t>(rows * a.group * a.channels));
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int32_t* const table = a.block_tables.data() + row * most_pages;
    const auto place = [&](std::int64_t n) {
      return (table[n / a.page_size] * a.page_size + n % a.page_size) * a.channels;
    };
    for (std::int64_t g = 0; g < a.group; ++g) {
      const std::int64_t at = (row * a.group + g) * a.channels;
      attend(
          a.query + at, a.lengths[static_cast<std::size_t>(row)], a.channels,
          [&](std::int64_t n) { return a.key_pages + place(n); },
          [&](std::int64_t n) { return a.value_pages + place(n); }, out.data() + at);
    }
  }
  return out;
}

/// Attention restricted to a kept set, over a cache that was never compacted: one mask entry for every token, -inf or
/// 0.
///
/// query: [batch, query_heads, head_dim]. key, value: [batch, kv_heads, tokens, head_dim] of the prompt. more_key,
/// more_value: [batch, kv_heads, n, head_dim], what came after it, of which sequence b has appended[b].
template <class T>
[[nodiscard]] expected_attention masked_attention(const restkv::tensor_view<const T, 3>& query,
                                                  const restkv::tensor_view<const T, 4>& key,
                                                  const restkv::tensor_view<const T, 4>& value,
                                                  const restkv::tensor_view<const T, 4>& more_key,
                                                  const restkv::tensor_view<const T, 4>& more_value,
                                                  const restkv::const_kept_tokens& kept,
                                                  std::span<const std::int32_t> appended) {
  using restkv::index_t;
  constexpr double masked = -std::numeric_limits<double>::infinity();
  const index_t heads = query.extent(1);
  const index_t channels = query.extent(2);
  const index_t prompt = key.extent(2);
  const double scale = 1 / std::sqrt(static_cast<double>(channels));
  expected_attention out;
  for (index_t b = 0; b < query.extent(0); ++b) {
    const index_t all = prompt + appended[static_cast<std::size_t>(b)];
    for (index_t head = 0; head < heads; ++head) {
      const index_t h = head / (heads / key.extent(1));
      std::vector<double> logits(static_cast<std::size_t>(all), masked);
      const auto row = [&](const auto& early, const auto& late, index_t n) {
        return n < prompt ? early[b][h][n] : late[b][h][n - prompt];
      };
      double logit_magnitude = 0;
      const auto unmask = [&](index_t n) {
        double dot = 0;
        double sizes = 0;
        for (index_t c = 0; c < channels; ++c) {
          const double product =
              restkv::widen<double>(query(b, head, c)) * restkv::widen<double>(row(key, more_key, n)(c));
          dot += product;
          sizes += std::abs(product);
        }
        logits[static_cast<std::size_t>(n)] = scale * dot;
        logit_magnitude = std::max(logit_magnitude, scale * sizes);
      };
      for (index_t i = 0; i < kept.lengths(b, h); ++i) unmask(kept.positions(b, h, i));
      for (index_t n = prompt; n < all; ++n) unmask(n);
      const double most = *std::max_element(logits.begin(), logits.end());
      double sum = 0;
      std::vector<double> output(static_cast<std::size_t>(channels));
      std::vector<double> magnitude(output);
      std::vector<double> value_sum(output);
      std::int64_t tokens = 0;
      for (index_t n = 0; n < all; ++n) {
        if (logits[static_cast<std::size_t>(n)] == masked) continue;  // also for padding, which holds no numbers
        const double weight = std::exp(logits[static_cast<std::size_t>(n)] - most);
        sum += weight;
        ++tokens;
        for (index_t c = 0; c < channels; ++c) {
          const auto v = restkv::widen<double>(row(value, more_value, n)(c));
          output[static_cast<std::size_t>(c)] += weight * v;
          magnitude[static_cast<std::size_t>(c)] += weight * std::abs(v);
          value_sum[static_cast<std::size_t>(c)] += std::abs(v);
        }
      }
      for (std::size_t c = 0; c < output.size(); ++c) {
        out.output.push_back(output[c] / sum);
        out.magnitude.push_back(magnitude[c] / sum);
        out.value_sum.push_back(value_sum[c]);
      }
      out.logit_magnitude.push_back(logit_magnitude);
      out.tokens.push_back(tokens);
    }
  }
  return out;
}
