// SPDX-License-Identifier: Apache-2.0
/// @file
/// Attention of a few queries over tokens that come one after the other, in double: what the guards of merging and
/// `merged_output_error` compute outputs with.
#pragma once

#include <restkv/core/vector_math.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace restkv::detail {

/// q . k / sqrt(d). What is not a number counts as the lowest, as in the verifier.
[[nodiscard]] inline double attention_logit(const double* query, const double* key, index_t channels) noexcept {
  constexpr double most = std::numeric_limits<double>::max();
  const double logit = dot(query, key, channels) / std::sqrt(static_cast<double>(channels));
  return std::isnan(logit) ? -most : std::clamp(logit, -most, most);
}

/// The attention of `rows` queries: for each the largest logit so far, the sum of e^(s - largest), and the sum of
/// e^(s - largest) v.
class running_attention {
 public:
  /// Of queries [rows, channels]; `room` has rows * (channels + 2) doubles.
  running_attention(index_t channels, index_t rows, double* queries, double* room) noexcept
      : channels_(channels),
        queries_(queries),
        sums_(room),
        largest_(room + rows * channels),
        masses_(room + rows * (channels + 1)) {}

  [[nodiscard]] index_t channels() const noexcept { return channels_; }
  [[nodiscard]] double* query(index_t row) const noexcept { return queries_ + row * channels_; }
  [[nodiscard]] double& mass(index_t row) const noexcept { return masses_[row]; }
  [[nodiscard]] double* sum(index_t row) const noexcept { return sums_ + row * channels_; }

  /// Forgets all tokens.
  void clear(index_t rows) const noexcept {
    std::fill(sums_, sums_ + rows * channels_, 0.0);
    std::fill(masses_, masses_ + rows, 0.0);
    std::fill(largest_, largest_ + rows, -std::numeric_limits<double>::infinity());
  }

  /// Adds a token that query `row` sees.
  void add(index_t row, const double* key, const double* value) const noexcept {
    const double logit = attention_logit(query(row), key, channels_);
    double* const total = sum(row);
    if (logit > largest_[row]) {
      const double shrunk = std::exp(largest_[row] - logit);  // 0 for the first token
      for (index_t c = 0; c < channels_; ++c) total[c] = total[c] * shrunk + value[c];
      masses_[row] = masses_[row] * shrunk + 1;
      largest_[row] = logit;
      return;
    }
    const double weight = std::exp(logit - largest_[row]);
    for (index_t c = 0; c < channels_; ++c) total[c] += weight * value[c];
    masses_[row] += weight;
  }

  /// e^(s - largest) of a token.
  [[nodiscard]] double weight(index_t row, const double* key) const noexcept {
    return std::exp(attention_logit(query(row), key, channels_) - largest_[row]);
  }
  /// The attention that query `row` gives a token it has seen.
  [[nodiscard]] double share(index_t row, const double* key) const noexcept { return weight(row, key) / masses_[row]; }

  /// The output of query `row`, 0 where it saw no token. [channels]
  void output(index_t row, double* out) const noexcept {
    const double* const total = sum(row);
    for (index_t c = 0; c < channels_; ++c) out[c] = masses_[row] > 0 ? total[c] / masses_[row] : 0.0;
  }

 private:
  index_t channels_;
  double* queries_;  // [rows, channels]
  double* sums_;     // [rows, channels]
  double* largest_;  // [rows]
  double* masses_;   // [rows]
};

}  // namespace restkv::detail
