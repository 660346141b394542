// SPDX-License-Identifier: Apache-2.0
/// @file
/// `reference_backend`: every primitive as plain loops in double, in the order of the method's description.
///
/// It is slow, allocates, and exists to be read and compared with. Throws std::bad_alloc where memory runs out.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/reference/token_score.hpp>

#include <algorithm>
#include <numeric>
#include <vector>

namespace restkv {

/// The reference: double precision, one thread, no blocking, no pruning.
class reference_backend {
 public:
  using score_type = double;  ///< all arithmetic is double

  /// body(0) .. body(n - 1), in order.
  template <class Body>
  void parallel_for(index_t n, const Body& body) const {
    for (index_t i = 0; i < n; ++i) body(i);
  }

  /// Working memory of a request; see `tensor_backend`.
  template <class Request>
  class scratch {
   public:
    /// Counts where the workspace counts.
    scratch(const reference_backend&, const Request& request, workspace& space)
        : drift_(space.take<double>(request.shape.batch, request.shape.query_heads),
                 {request.shape.batch, request.shape.query_heads}) {}
    /// Room for the drift of every query head. [batch, query_heads]
    [[nodiscard]] tensor_view<double, 2> drift() const noexcept { return drift_; }

   private:
    tensor_view<double, 2> drift_;
  };

  /// See `tensor_backend`.
  template <class Request, element T>
  status token_scores(const Request& request, const layer_view<T>& layer, scratch<Request>&,
                      tensor_view<double, 3> out) const {
    using score_t = std::remove_cvref_t<decltype(request.score)>;
    const index_t group = request.shape.query_heads / request.heads();
    for (index_t b = 0; b < request.shape.batch; ++b) {
      for (index_t row = 0; row < request.heads(); ++row) {
        const index_t past = request.past_of(sequence(layer, b, row * group / request.shape.group()).length);
        if constexpr (head_score<score_t> && !scores_query_heads<score_t>()) {  // the group's: nothing to reduce
          const std::vector<double> scores = head_scores(request, layer, b, row * group);
          std::copy_n(scores.begin(), past, out.data + out.offset(b, row, 0));
          continue;
        }
        for (index_t j = 0; j < group; ++j) {
          const std::vector<double> scores = head_scores(request, layer, b, row * group + j);
          for (index_t n = 0; n < past; ++n) {
            out(b, row, n) = group_fold(request.group, out(b, row, n), scores[static_cast<std::size_t>(n)], j == 0);
          }
        }
        for (index_t n = 0; n < past; ++n) out(b, row, n) = group_finish(request.group, out(b, row, n), group);
      }
    }
    return {};
  }

  /// t = mean over pairs of (mean index in the front half's row - mean index in the rear half's row), each over the
  /// most attended tokens of the row.
  template <class Request, element T>
  status window_drift(const Request& request, const layer_view<T>& layer, std::span<const index_t> most_attended,
                      scratch<Request>&, tensor_view<double, 2> out) const {
    for (index_t b = 0; b < request.shape.batch; ++b) {
      for (index_t h = 0; h < request.shape.query_heads; ++h) {
        const index_t length = sequence(layer, b, h / request.shape.group()).length;
        const index_t window = request.window_of(length);
        const index_t pairs = window / 2;
        const index_t chosen = std::min(most_attended[static_cast<std::size_t>(b)], length);
        double drift = 0;
        for (index_t pair = 0; pair < pairs && chosen > 0; ++pair) {
          drift += mean_index(reference::window_attention(layer, b, h, window, pair), chosen) -
                   mean_index(reference::window_attention(layer, b, h, window, pairs + pair), chosen);
        }
        out(b, h) = pairs > 0 ? drift / static_cast<double>(pairs) : 0.0;
      }
    }
    return {};
  }

 private:
  /// Mean index of the `count` largest shares; among equal ones the smaller index counts.
  [[nodiscard]] static double mean_index(const reference::attention_row& row, index_t count) {
    std::vector<index_t> order(row.share.size());
    std::iota(order.begin(), order.end(), index_t{0});
    std::sort(order.begin(), order.end(), [&](index_t a, index_t b) {
      const double left = row.share[static_cast<std::size_t>(a)];
      const double right = row.share[static_cast<std::size_t>(b)];
      return left != right ? left > right : a < b;
    });
    double sum = 0;
    for (index_t i = 0; i < count; ++i) sum += static_cast<double>(order[static_cast<std::size_t>(i)]);
    return sum / static_cast<double>(count);
  }

  /// Scores of one query head over the past, before the group reduction. [past]
  template <class Request, element T>
  [[nodiscard]] static std::vector<double> head_scores(const Request& request, const layer_view<T>& layer, index_t b,
                                                       index_t head) {
    using score_t = std::remove_cvref_t<decltype(request.score)>;
    if constexpr (head_score<score_t>) {
      const head_view<T> view(layer, request.shape, b, head);
      std::vector<double> scores(static_cast<std::size_t>(view.length()));
      std::vector<double> scratch(static_cast<std::size_t>(scratch_size_of(request.score, request.shape)));
      request.score.score_head(view, std::span<double>(scores), std::span<double>(scratch));
      return scores;
    } else {
      reference::whole_sequence parts;
      const reference::token_range tokens(sequence(layer, b, head / request.shape.group()));
      return reference::scores_of_tokens(request, layer, b, head, tokens, parts);
    }
  }
};

static_assert(tensor_backend<reference_backend>);

}  // namespace restkv
