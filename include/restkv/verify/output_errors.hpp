// SPDX-License-Identifier: Apache-2.0
/// @file
/// `output_errors`: what a kept set costs, in numbers. `output_error` computes it.
#pragma once

#include <restkv/core/dtype.hpp>
#include <restkv/core/tensor_view.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace restkv {

namespace detail {
template <class Backend, element T>
class error_computation;
struct output_error_reader;
}  // namespace detail

/// What a kept set does to one query head, over all rows of all sequences.
struct head_error_summary {
  double relative = 0;            ///< sqrt(sum head^2 / sum head_output_norm^2)
  double greedy_ratio = 1;        ///< exact / predicted, as `output_errors::greedy_ratio`; through W[h] where known
  double mean_evicted_mass = 0;   ///< mean of A_E
  double worst_evicted_mass = 0;  ///< largest A_E
};

/// The cost of a kept set for each query: per head and for the layer. Owns its numbers, all double. Movable.
///
/// With A the attention over all visible tokens, E the evicted ones among them, A_E their share, o = sum_n A[n] v_n the
/// full output and o' the output of the attention renormalised over the kept tokens (0 where no visible token is kept):
///
///     o' - o = sum_{n in E} A[n] (o - v_n) / (1 - A_E)
///
/// Row i belongs to the i-th of the last `queries()` queries, oldest first. A sequence with fewer tokens than that has
/// only its last `rows(b)` rows; the others are 0 everywhere and count nowhere.
class output_errors {
 public:
  output_errors() = default;

  /// Sequences.
  [[nodiscard]] index_t batch() const noexcept { return batch_; }
  /// Query heads.
  [[nodiscard]] index_t query_heads() const noexcept { return heads_; }
  /// Rows of each table.
  [[nodiscard]] index_t queries() const noexcept { return queries_; }
  /// Rows that sequence `b` has, the last of `queries()`.
  [[nodiscard]] index_t rows(index_t b) const noexcept { return rows_[static_cast<std::size_t>(b)]; }
  /// Whether the layer had its W_O (`layer_view::projection`), so that the layer's tables are measured behind it.
  [[nodiscard]] bool projected() const noexcept { return projected_; }

  /// ||o' - o||. [batch, query_heads, queries]
  [[nodiscard]] tensor_view<const double, 3> head() const noexcept { return head_table(error); }
  /// ||o||. [batch, query_heads, queries]
  [[nodiscard]] tensor_view<const double, 3> head_output_norm() const noexcept { return head_table(output_norm); }
  /// The sum over the evicted n of A[n]/(1 - A[n]) ||o - v_n||: the cost if deletions did not act on each other, which
  /// scores of single tokens assume. [batch, query_heads, queries]
  [[nodiscard]] tensor_view<const double, 3> head_predicted() const noexcept { return head_table(predicted); }
  /// A_E, the attention of the evicted tokens. [batch, query_heads, queries]
  [[nodiscard]] tensor_view<const double, 3> evicted_mass() const noexcept { return head_table(mass); }
  /// ||W[h] (o' - o)||; empty where the layer had neither a projection nor a metric. [batch, query_heads, queries]
  [[nodiscard]] tensor_view<const double, 3> head_projected() const noexcept {
    return has_head_projected_ ? head_table(projected_error) : tensor_view<const double, 3>{};
  }
  /// The sum over the evicted n of A[n]/(1 - A[n]) ||W[h] (o - v_n)||; empty as `head_projected`.
  /// [batch, query_heads, queries]
  [[nodiscard]] tensor_view<const double, 3> head_projected_predicted() const noexcept {
    return has_head_projected_ ? head_table(projected_predicted) : tensor_view<const double, 3>{};
  }

  /// ||sum_h W[h] (o'_h - o_h)||; without W_O the norm of the concatenated heads' change. [batch, queries]
  [[nodiscard]] tensor_view<const double, 2> layer() const noexcept { return layer_table(layer_error); }
  /// ||sum_h W[h] o_h||; without W_O the norm of the concatenated heads' output. [batch, queries]
  [[nodiscard]] tensor_view<const double, 2> layer_output_norm() const noexcept { return layer_table(layer_norm); }
  /// The sum over the heads of what the single deletions predict, `head_projected_predicted` where projected() and else
  /// `head_predicted`: what a greedy choice would expect at most. [batch, queries]
  [[nodiscard]] tensor_view<const double, 2> layer_predicted() const noexcept { return layer_table(predicted_sum); }

  /// sqrt(sum layer^2 / sum layer_output_norm^2) over all rows of all sequences: the norm of the whole change relative
  /// to that of the whole output. 0 where nothing changed; infinity where something did and the output is 0.
  [[nodiscard]] double mean_relative() const noexcept {
    double error_square = 0;
    double norm_square = 0;
    for_each_row([&](double error, double norm) {
      error_square += error * error;
      norm_square += norm * norm;
    });
    return ratio(std::sqrt(error_square), std::sqrt(norm_square));
  }
  /// Largest layer / layer_output_norm of a single row, 0 and infinity as above.
  [[nodiscard]] double worst_relative() const noexcept {
    double worst = 0;
    for_each_row([&](double error, double norm) { worst = std::max(worst, ratio(error, norm)); });
    return worst;
  }

  /// The exact error relative to the predicted one, sum layer / sum layer_predicted over all rows: how far the
  /// assumption of a greedy choice holds, that deletions add up. Below 1 the changes partly cancel, above 1 they make
  /// each other worse (each deletion renormalises what the others left). 1 where nothing was evicted.
  [[nodiscard]] double greedy_ratio() const noexcept {
    double exact = 0;
    double single = 0;
    for (index_t b = 0; b < batch_; ++b) {
      for (index_t i = queries_ - rows(b); i < queries_; ++i) {
        exact += layer()(b, i);
        single += layer_predicted()(b, i);
      }
    }
    return of_predicted(exact, single);
  }

  /// The rows of one query head in a few numbers, over all sequences.
  [[nodiscard]] head_error_summary summary(index_t h) const noexcept {
    const auto errors = has_head_projected_ ? head_projected() : head();
    const auto singles = has_head_projected_ ? head_projected_predicted() : head_predicted();
    head_error_summary made;
    double error_square = 0;
    double norm_square = 0;
    double exact = 0;
    double single = 0;
    index_t count = 0;
    for (index_t b = 0; b < batch_; ++b) {
      for (index_t i = queries_ - rows(b); i < queries_; ++i) {
        error_square += head()(b, h, i) * head()(b, h, i);
        norm_square += head_output_norm()(b, h, i) * head_output_norm()(b, h, i);
        exact += errors(b, h, i);
        single += singles(b, h, i);
        made.mean_evicted_mass += evicted_mass()(b, h, i);
        made.worst_evicted_mass = std::max(made.worst_evicted_mass, evicted_mass()(b, h, i));
        ++count;
      }
    }
    made.relative = ratio(std::sqrt(error_square), std::sqrt(norm_square));
    made.greedy_ratio = of_predicted(exact, single);
    made.mean_evicted_mass /= static_cast<double>(std::max<index_t>(count, 1));
    return made;
  }

 private:
  template <class Backend, element T>
  friend class detail::error_computation;
  friend struct detail::output_error_reader;

  enum head_entry { error, output_norm, predicted, mass, projected_error, projected_predicted, head_entries };
  enum layer_entry { layer_error, layer_norm, predicted_sum, layer_entries };

  output_errors(index_t batch, index_t heads, index_t queries)
      : batch_(batch),
        heads_(heads),
        queries_(queries),
        rows_(static_cast<std::size_t>(batch)),
        head_(static_cast<std::size_t>(head_entries * batch * heads * queries)),
        layer_(static_cast<std::size_t>(layer_entries * batch * queries)) {}

  [[nodiscard]] tensor_view<const double, 3> head_table(head_entry i) const noexcept {
    return {head_.data() + i * batch_ * heads_ * queries_, {batch_, heads_, queries_}};
  }
  [[nodiscard]] tensor_view<const double, 2> layer_table(layer_entry i) const noexcept {
    return {layer_.data() + i * batch_ * queries_, {batch_, queries_}};
  }
  [[nodiscard]] double* head_row(head_entry i, index_t b, index_t h, index_t row) noexcept {
    return head_.data() + ((i * batch_ + b) * heads_ + h) * queries_ + row;
  }
  [[nodiscard]] double& layer_row(layer_entry i, index_t b, index_t row) noexcept {
    return layer_[static_cast<std::size_t>((i * batch_ + b) * queries_ + row)];
  }

  [[nodiscard]] static double ratio(double error, double norm) noexcept {
    return error == 0 ? 0.0 : norm == 0 ? std::numeric_limits<double>::infinity() : error / norm;
  }
  [[nodiscard]] static double of_predicted(double exact, double predicted) noexcept {
    return exact == predicted ? 1.0 : ratio(exact, predicted);
  }
  template <class Visit>
  void for_each_row(const Visit& visit) const noexcept {
    for (index_t b = 0; b < batch_; ++b) {
      for (index_t i = queries_ - rows(b); i < queries_; ++i) visit(layer()(b, i), layer_output_norm()(b, i));
    }
  }

  index_t batch_ = 0;
  index_t heads_ = 0;
  index_t queries_ = 0;
  bool projected_ = false;
  bool has_head_projected_ = false;
  std::vector<index_t> rows_;
  std::vector<double> head_;   // [head_entries, batch, query_heads, queries]
  std::vector<double> layer_;  // [layer_entries, batch, queries]
};

}  // namespace restkv
