// SPDX-License-Identifier: Apache-2.0
/// @file
/// What evicting a set of tokens does to one query head: the attention split into the kept tokens, the evicted token
/// with the largest share, and the other evicted ones. `output_error` puts the heads together.
#pragma once

#include <restkv/core/layer.hpp>
#include <restkv/selection/kept_tokens.hpp>
#include <restkv/verify/attention_split.hpp>

#include <cmath>
#include <limits>
#include <memory>
#include <new>

namespace restkv::detail {

/// Elements larger than this in magnitude are refused: below it no product or square of theirs leaves double's range,
/// and every float lies below it.
inline constexpr double largest_verified_element = 1e60;

/// Columns that `add_rows` sums side by side. Vectors are padded to a multiple.
inline constexpr index_t verify_lanes = 32;

[[nodiscard]] constexpr index_t padded_channels(index_t channels) noexcept {
  return (channels + verify_lanes - 1) / verify_lanes * verify_lanes;
}

/// out[j] += sum_i x[i] rows[i * stride + j], j < verify_lanes. The columns are independent sums in a fixed order, so a
/// compiler may use vector instructions without changing a bit.
inline void add_rows(const double* x, const double* rows, index_t stride, index_t count, double* out) noexcept {
  double sum[verify_lanes];
  for (index_t j = 0; j < verify_lanes; ++j) sum[j] = out[j];
  for (index_t i = 0; i < count; ++i) {
    const double factor = x[i];
    const double* const row = rows + i * stride;
    for (index_t j = 0; j < verify_lanes; ++j) sum[j] += factor * row[j];
  }
  for (index_t j = 0; j < verify_lanes; ++j) out[j] = sum[j];
}

[[nodiscard]] inline double squared_norm(const double* x, index_t channels) noexcept {
  double sum = 0;
  for (index_t c = 0; c < channels; ++c) sum += x[c] * x[c];
  return sum;
}

/// W[h]^T W[h] of one head, dense, and folded into its lower triangle so that x^T G x takes half the multiplications.
struct dense_gram {
  const double* full = nullptr;    ///< G, [channels, padded_channels]; null: distances are Euclidean only
  const double* folded = nullptr;  ///< G_rr on the diagonal, 2 G_rc left of it, [channels, padded_channels]

  /// x^T G x.
  [[nodiscard]] double operator()(const double* x, index_t channels) const noexcept {
    double sum = 0;
    for (index_t r = 0; r < channels; ++r) {
      double row = 0;
      for (index_t c = 0; c <= r; ++c) row += folded[r * padded_channels(channels) + c] * x[c];
      sum += x[r] * row;
    }
    return std::max(sum, 0.0);
  }
};

/// One query head of one sequence, and the rows of its observation window that are asked for.
template <element T>
struct split_problem {
  const layer_view<T>* layer = nullptr;
  const_kept_tokens kept{};
  index_t batch = 0;
  index_t query_head = 0;
  index_t window = 0;     ///< row i of it sees the sequence's first length - window + i + 1 tokens
  index_t first_row = 0;  ///< within the window
  index_t rows = 0;
  dense_gram gram{};
};

/// Where the answers go; row i of each table belongs to row first_row + i of the window.
struct split_result {
  double* error = nullptr;                ///< ||o' - o||
  double* output_norm = nullptr;          ///< ||o||
  double* predicted = nullptr;            ///< sum over evicted n of a/(1-a) ||o - v_n||
  double* projected_predicted = nullptr;  ///< the same through the Gram matrix; null without one
  double* evicted_mass = nullptr;         ///< A_E
  double* change = nullptr;               ///< o' - o, [rows, padded_channels]
  double* output = nullptr;               ///< o, [rows, padded_channels]
  double* value_norms = nullptr;          ///< v^T G v of the evicted tokens, [length], in the order of the split
  bool value_norms_known = false;         ///< filled by an earlier block of rows of the same head
};

/// Attention of a few queries of one head over a sequence, split by what a kept set does to it.
///
/// With K the kept and E the evicted visible tokens, o' the output of K's own softmax, m the output of E's, and A_E the
/// share of E: o = (1 - A_E) o' + A_E m, so o' - o = A_E (o' - m), which equals sum_E a_n (o - v_n) / (1 - A_E) and
/// loses no digits where little is evicted (A_E -> 0) or nearly everything (A_E -> 1). K and E are softmaxed apart, and
/// the top token T of E apart from the rest of E, each against its own largest logit.
///
/// Single deletions: a_T/(1-a_T) ||o - v_T|| = a_T ||o_without_T - v_T||; every other evicted token has a share of at
/// most a half, where 1 - a loses nothing.
template <element T>
class split_attention {
 public:
  static constexpr index_t tile = verify_lanes;  // tokens
  static constexpr index_t block = 16;           // queries

  split_attention(const split_problem<T>& problem, const split_result& result) noexcept
      : p_(problem),
        r_(result),
        kv_head_(problem.query_head / (problem.layer->query.extent(1) / problem.layer->key.extent(1))),
        span_(sequence(*problem.layer, problem.batch, kv_head_)),
        channels_(problem.layer->key.extent(3)),
        width_(padded_channels(channels_)) {}

  /// False where memory runs out: 8 (rows + 1) bytes a token.
  [[nodiscard]] bool run() noexcept {
    const index_t vectors = 4 * p_.rows + 1 + tile;
    positions_ = allocate<position_t>(span_.length);
    weights_ = allocate<double>(p_.rows * span_.length + tile);
    memory_ = allocate<double>(vectors * width_ + (channels_ + 3) * tile);
    if (positions_ == nullptr || weights_ == nullptr || memory_ == nullptr) return false;
    double* next = memory_.get();
    const auto take = [&next](index_t count) {
      double* const piece = next;
      next += count;
      return piece;
    };
    queries_ = take(p_.rows * width_);
    kept_output_ = take(p_.rows * width_);
    other_output_ = take(p_.rows * width_);
    gram_output_ = take(p_.rows * width_);
    difference_ = take(width_);
    tile_rows_ = take(tile * width_);
    tile_columns_ = take(channels_ * tile);
    tile_dots_ = take(tile);
    tile_gram_dots_ = take(tile);
    tile_norms_ = take(tile);
    list_positions();
    read_queries();
    compute_logits();
    for (index_t i = 0; i < p_.rows; ++i) splits_[i] = exponentiate(i);
    sum_values();
    for (index_t i = 0; i < p_.rows; ++i) finish_row(i);
    predict();
    return true;
  }

 private:
  /// The masses of one query.
  struct split : split_masses {
    index_t top_entry = -1;
    double other_scale = 0;  ///< as in split_shares
    double output_square = 0;
    double gram_output_square = 0;
  };

  template <class U>
  [[nodiscard]] static std::unique_ptr<U[]> allocate(index_t count) noexcept {
    return std::unique_ptr<U[]>(new (std::nothrow) U[static_cast<std::size_t>(std::max<index_t>(count, 1))]());
  }

  [[nodiscard]] double* weights(index_t row) const noexcept { return weights_.get() + row * span_.length; }
  [[nodiscard]] index_t visible(index_t row) const noexcept {
    return span_.length - p_.window + p_.first_row + row + 1;
  }

  /// Kept positions first, then the evicted ones, both ascending and counted from the beginning of the sequence.
  void list_positions() noexcept {
    const index_t kept_head = p_.query_head / (p_.layer->query.extent(1) / p_.kept.heads());
    kept_count_ = p_.kept.lengths(p_.batch, kept_head);
    index_t evicted = kept_count_;
    index_t position = 0;
    for (index_t j = 0; j <= kept_count_; ++j) {
      const index_t next = j < kept_count_ ? p_.kept.positions(p_.batch, kept_head, j) - span_.begin : span_.length;
      if (j < kept_count_) positions_[static_cast<std::size_t>(j)] = static_cast<position_t>(next);
      while (position < next) positions_[static_cast<std::size_t>(evicted++)] = static_cast<position_t>(position++);
      position = next + 1;
    }
  }

  void read_queries() noexcept {
    const auto rows = window_queries(*p_.layer, p_.batch, p_.query_head, p_.window);
    for (index_t i = 0; i < p_.rows; ++i) {
      for (index_t c = 0; c < channels_; ++c) {
        queries_[i * width_ + c] = widen<double>(rows(p_.first_row + i, c));
      }
    }
  }

  /// Calls write(j, c, element) for the tokens of list entries [first, first + count).
  template <class Write>
  void read_tokens(const chunked_tensor_view<const T>& cache, index_t first, index_t count,
                   const Write& write) const noexcept {
    index_t begin = 0;  // token at which `part` begins
    tensor_view<const T, 4> part;
    for (index_t j = 0; j < count; ++j) {
      const index_t token = span_.begin + positions_[static_cast<std::size_t>(first + j)];
      if (j == 0 || token < begin || token - begin >= part.extent(2)) {  // the evicted tokens begin again at 0
        part = cache.from_token(token);
        begin = token;
      }
      const T* const row = part.data + part.offset(p_.batch, kv_head_, token - begin, 0);
      for (index_t c = 0; c < channels_; ++c) write(j, c, widen<double>(row[c * part.stride(3)]));
    }
  }

  void read_columns(const chunked_tensor_view<const T>& cache, index_t first, index_t count) const noexcept {
    read_tokens(cache, first, count, [&](index_t j, index_t c, double x) { tile_columns_[c * tile + j] = x; });
  }

  /// x times each column of the tile.
  void tile_products(const double* x, index_t count, double* out) const noexcept {
    for (index_t j = 0; j < tile; j += verify_lanes) {
      for (index_t lane = 0; lane < verify_lanes; ++lane) out[j + lane] = 0;
      add_rows(x, tile_columns_ + j, tile, count, out + j);
    }
  }

  /// s_n = q k_n / sqrt(d) of every query and visible token; -inf beyond the visible ones.
  void compute_logits() noexcept {
    const double root = std::sqrt(static_cast<double>(channels_));
    for (index_t first = 0; first < span_.length; first += tile) {
      const index_t count = std::min(tile, span_.length - first);
      read_columns(p_.layer->key, first, count);
      for (index_t i = 0; i < p_.rows; ++i) {
        tile_products(queries_ + i * width_, channels_, tile_dots_);
        double* const logits = weights(i) + first;
        for (index_t j = 0; j < count; ++j) {
          const bool seen = positions_[static_cast<std::size_t>(first + j)] < visible(i);
          logits[j] = seen ? verified_logit(tile_dots_[j], root) : -std::numeric_limits<double>::infinity();
        }
      }
    }
  }

  /// Turns logits [first, last) into e^(s - largest).
  [[nodiscard]] static attention_mass softmax(double* logits, index_t first, index_t last) noexcept {
    attention_mass mass;
    for (index_t j = first; j < last; ++j) mass.largest = std::max(mass.largest, logits[j]);
    for (index_t j = first; j < last; ++j) {
      // Unseen tokens of a row that sees none would give inf - inf.
      logits[j] = std::isinf(logits[j]) ? 0.0 : std::exp(logits[j] - mass.largest);
      mass.sum += logits[j];
    }
    return mass;
  }

  [[nodiscard]] split exponentiate(index_t row) noexcept {
    double* const logits = weights(row);
    split s;
    s.kept = softmax(logits, 0, kept_count_);
    for (index_t j = kept_count_; j < span_.length; ++j) {
      if (logits[j] > s.top.largest) {
        s.top = {logits[j], 1.0};
        s.top_entry = j;
      }
    }
    if (s.top_entry >= 0) logits[s.top_entry] = -std::numeric_limits<double>::infinity();
    s.others = softmax(logits, kept_count_, span_.length);
    return s;
  }

  /// The outputs of the kept and of the other evicted tokens, each of its own softmax.
  void sum_values() noexcept {
    const auto sum_range = [&](index_t begin, index_t end, double* outputs) {
      for (index_t first = begin; first < end; first += tile) {
        const index_t count = std::min(tile, end - first);
        read_tokens(p_.layer->value, first, count,
                    [&](index_t j, index_t c, double x) { tile_rows_[j * width_ + c] = x; });
        for (index_t i = 0; i < p_.rows; ++i) {
          for (index_t c = 0; c < width_; c += verify_lanes) {
            add_rows(weights(i) + first, tile_rows_ + c, width_, count, outputs + i * width_ + c);
          }
        }
      }
    };
    sum_range(0, kept_count_, kept_output_);
    sum_range(kept_count_, span_.length, other_output_);
    for (index_t i = 0; i < p_.rows; ++i) {
      for (index_t c = 0; c < width_; ++c) {
        kept_output_[i * width_ + c] /= std::max(splits_[i].kept.sum, 1.0);
        other_output_[i * width_ + c] /= std::max(splits_[i].others.sum, 1.0);
      }
    }
  }

  /// o, o' - o and their norms, and the deletion of the top evicted token.
  void finish_row(index_t i) noexcept {
    split& s = splits_[i];
    const double* const kept = kept_output_ + i * width_;     // 0 where nothing is kept
    const double* const others = other_output_ + i * width_;  // 0 where there are none
    double* const change = r_.change + i * width_;
    double* const output = r_.output + i * width_;
    double* const top_difference = difference_;
    for (index_t c = 0; c < width_; ++c) tile_rows_[c] = 0;
    if (s.top_entry >= 0) {
      read_tokens(p_.layer->value, s.top_entry, 1, [&](index_t, index_t c, double x) { tile_rows_[c] = x; });
    }
    const split_shares shares(s);
    s.other_scale = shares.other_scale;
    for (index_t c = 0; c < width_; ++c) {
      const auto channel = shares.of(kept[c], tile_rows_[c], others[c]);
      change[c] = channel.change;
      output[c] = channel.output;
      top_difference[c] = channel.top_difference;
    }
    s.output_square = squared_norm(output, channels_);
    r_.error[i] = std::sqrt(squared_norm(change, channels_));
    r_.output_norm[i] = std::sqrt(s.output_square);
    r_.evicted_mass[i] = shares.evicted;
    r_.predicted[i] = shares.top * std::sqrt(squared_norm(top_difference, channels_));
    if (p_.gram.full == nullptr) return;
    double* const through_gram = gram_output_ + i * width_;
    for (index_t c = 0; c < width_; c += verify_lanes) {
      add_rows(output, p_.gram.full + c, width_, channels_, through_gram + c);
    }
    s.gram_output_square = p_.gram(output, channels_);
    r_.projected_predicted[i] = shares.top * std::sqrt(p_.gram(top_difference, channels_));
  }

  /// Adds the single deletions of the other evicted tokens. ||o - v||^2 = o.o - 2 o.v + v.v needs one product a token
  /// and query instead of a square form; where it would cancel, the difference is formed first.
  void predict() noexcept {
    constexpr double cancels = 1e-8;
    for (index_t first = kept_count_; first < span_.length; first += tile) {
      const index_t count = std::min(tile, span_.length - first);
      read_columns(p_.layer->value, first, count);
      for (index_t j = 0; j < tile; ++j) tile_norms_[j] = 0;
      for (index_t c = 0; c < channels_; ++c) {
        for (index_t j = 0; j < tile; ++j) {
          tile_norms_[j] += tile_columns_[c * tile + j] * tile_columns_[c * tile + j];
        }
      }
      double* const gram_norms = p_.gram.full == nullptr ? nullptr : r_.value_norms + first;
      if (gram_norms != nullptr && !r_.value_norms_known) measure_values(gram_norms, count);
      for (index_t i = 0; i < p_.rows; ++i) {
        const split& s = splits_[i];
        const double* const weight = weights(i) + first;
        const double* const output = r_.output + i * width_;
        tile_products(output, channels_, tile_dots_);
        if (gram_norms != nullptr) tile_products(gram_output_ + i * width_, channels_, tile_gram_dots_);
        double sum = 0;
        double gram_sum = 0;
        for (index_t j = 0; j < count; ++j) {
          const double attention = weight[j] * s.other_scale;
          if (attention == 0) continue;
          const double odds = attention / (1.0 - attention);
          const double squares = s.output_square + tile_norms_[j];
          double square = squares - 2 * tile_dots_[j];
          if (square < cancels * squares) square = squared_norm(difference(output, j), channels_);
          sum += odds * std::sqrt(square);
          if (gram_norms == nullptr) continue;
          const double gram_squares = s.gram_output_square + gram_norms[j];
          square = gram_squares - 2 * tile_gram_dots_[j];
          if (square < cancels * gram_squares) square = p_.gram(difference(output, j), channels_);
          gram_sum += odds * std::sqrt(square);
        }
        r_.predicted[i] += sum;
        if (gram_norms != nullptr) r_.projected_predicted[i] += gram_sum;
      }
    }
  }

  /// v^T G v of the tile's tokens.
  void measure_values(double* norms, index_t count) noexcept {
    double sums[tile] = {};
    for (index_t r = 0; r < channels_; ++r) {
      tile_products(p_.gram.folded + r * width_, r + 1, tile_dots_);
      for (index_t j = 0; j < tile; ++j) sums[j] += tile_columns_[r * tile + j] * tile_dots_[j];
    }
    for (index_t j = 0; j < count; ++j) norms[j] = std::max(sums[j], 0.0);
  }

  [[nodiscard]] const double* difference(const double* output, index_t j) const noexcept {
    for (index_t c = 0; c < channels_; ++c) difference_[c] = output[c] - tile_columns_[c * tile + j];
    return difference_;
  }

  split_problem<T> p_;
  split_result r_;
  index_t kv_head_;
  sequence_span span_;
  index_t channels_;
  index_t width_;
  index_t kept_count_ = 0;
  split splits_[block];
  std::unique_ptr<position_t[]> positions_;  // [length], kept then evicted
  std::unique_ptr<double[]> weights_;        // [rows, length], in the order of positions_
  std::unique_ptr<double[]> memory_;
  double* queries_ = nullptr;         // [rows, width]
  double* kept_output_ = nullptr;     // [rows, width]
  double* other_output_ = nullptr;    // [rows, width]
  double* gram_output_ = nullptr;     // G o, [rows, width]
  double* difference_ = nullptr;      // [width]
  double* tile_rows_ = nullptr;       // [tile, width]
  double* tile_columns_ = nullptr;    // [channels, tile]
  double* tile_dots_ = nullptr;       // [tile]
  double* tile_gram_dots_ = nullptr;  // [tile]
  double* tile_norms_ = nullptr;      // [tile]
};

}  // namespace restkv::detail
