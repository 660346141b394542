// SPDX-License-Identifier: Apache-2.0
/// @file
/// The usual mistakes, tried on the reference: which of them gives the scores that a kernel gave?
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/reference/backend.hpp>

#include <array>
#include <cmath>
#include <string>
#include <vector>

namespace restkv::parity {

namespace detail {

/// A copy of a layer in double whose numbers may be changed. Not copyable: the view points into it.
class changed_layer {
 public:
  /// Elements of the tensors whose bit is set in `as_dense` (1 the queries, 2 the keys, 4 the values) are read as if
  /// these were dense: what a kernel gets that ignores strides.
  template <element T>
  explicit changed_layer(const layer_view<T>& layer, unsigned as_dense = 0) {
    view_.query = copy(layer.query, query, (as_dense & 1u) != 0);
    view_.key = copy(layer.key.chunk(0), key, (as_dense & 2u) != 0);
    view_.value = copy(layer.value.chunk(0), value, (as_dense & 4u) != 0);
    for (index_t i = 0; i < layer.projection.size(); ++i)
      projection_.push_back(widen<double>(layer.projection.data[i]));
    view_.projection = {projection_.data(), layer.projection.extents};
    view_.metric = layer.metric;
    view_.lengths = layer.lengths;
    view_.pad = layer.pad;
  }
  changed_layer(const changed_layer&) = delete;
  changed_layer& operator=(const changed_layer&) = delete;

  [[nodiscard]] const layer_view<double>& view() const noexcept { return view_; }
  std::vector<double> query, key, value;  ///< dense

 private:
  template <class T>
  [[nodiscard]] static tensor_view<const double, 4> copy(tensor_view<const T, 4> from, std::vector<double>& to,
                                                         bool as_dense) {
    if (as_dense) from = tensor_view<const T, 4>(from.data, from.extents);
    for (index_t b = 0; b < from.extent(0); ++b) {
      for (index_t h = 0; h < from.extent(1); ++h) {
        for (index_t n = 0; n < from.extent(2); ++n) {
          for (index_t c = 0; c < from.extent(3); ++c) to.push_back(widen<double>(from(b, h, n, c)));
        }
      }
    }
    return {to.data(), from.extents};
  }

  std::vector<double> projection_;
  layer_view<double> view_{};
};

/// The reference's scores of a layer. [batch, heads, tokens]
template <class Request>
[[nodiscard]] std::vector<double> reference_scores(const Request& request, const layer_view<double>& layer) {
  reference_backend backend;
  workspace counting;
  typename reference_backend::scratch<Request> unused(backend, request, counting);
  std::vector<std::byte> memory(counting.required_bytes());
  workspace space(memory.data(), memory.size());
  typename reference_backend::scratch<Request> scratch(backend, request, space);
  const std::array<index_t, 3> extents{request.shape.batch, request.heads(), request.shape.tokens};
  std::vector<double> scores(static_cast<std::size_t>(extents[0] * extents[1] * extents[2]));
  if (!backend.token_scores(request, layer, scratch, tensor_view<double, 3>(scores.data(), extents)).ok()) return {};
  return scores;
}

/// Query head h reads KV head h % kv_heads: its scores are those of head (h % kv_heads) * group + h / kv_heads once the
/// queries are permuted likewise; then the reduction over groups.
template <class Request>
[[nodiscard]] std::vector<double> scores_of_interleaved_heads(const Request& request, changed_layer& layer) {
  const index_t kv_heads = request.shape.kv_heads;
  const index_t group = request.shape.group();
  const auto& query = layer.view().query;
  const index_t head_elements = query.extent(2) * query.extent(3);
  const auto place_of = [&](index_t h) { return h % kv_heads * group + h / kv_heads; };
  const std::vector<double> before = layer.query;
  for (index_t b = 0; b < request.shape.batch; ++b) {
    for (index_t h = 0; h < request.shape.query_heads; ++h) {
      const index_t first = b * request.shape.query_heads;
      for (index_t i = 0; i < head_elements; ++i) {
        layer.query[static_cast<std::size_t>((first + place_of(h)) * head_elements + i)] =
            before[static_cast<std::size_t>((first + h) * head_elements + i)];
      }
    }
  }
  Request each = request;
  each.group = group_reduce::none;
  const std::vector<double> scores = reference_scores(each, layer.view());
  if (scores.empty()) return {};
  std::vector<double> folded(static_cast<std::size_t>(request.shape.batch * request.heads() * request.shape.tokens));
  const index_t members = request.shape.query_heads / request.heads();
  for (index_t b = 0; b < request.shape.batch; ++b) {
    for (index_t row = 0; row < request.heads(); ++row) {
      for (index_t n = 0; n < request.shape.tokens; ++n) {
        double& out = folded[static_cast<std::size_t>((b * request.heads() + row) * request.shape.tokens + n)];
        for (index_t j = 0; j < members; ++j) {
          const index_t place = b * request.shape.query_heads + place_of(row * members + j);
          out = group_fold(request.group, out, scores[static_cast<std::size_t>(place * request.shape.tokens + n)],
                           j == 0);
        }
        out = group_finish(request.group, out, members);
      }
    }
  }
  return folded;
}

/// ". ..." naming the mistake that gives `given` where `expected` was right; empty where none does. A mistake that does
/// not matter on this layer explains nothing.
template <class Request, element T>
[[nodiscard]] std::string explain_scores(const Request& request, const layer_view<T>& layer,
                                         const std::vector<double>& expected, const std::vector<double>& given,
                                         const std::vector<double>& errors) {
  if constexpr (!token_score<std::remove_cvref_t<decltype(request.score)>>) {
    return {};
  } else {
    const auto for_each_score = [&](const auto& use) {
      for (index_t b = 0; b < request.shape.batch; ++b) {
        for (index_t row = 0; row < request.heads(); ++row) {
          const index_t length = sequence(layer, b, row * request.shape.kv_heads / request.heads()).length;
          const index_t past = request.past_of(length);
          for (index_t n = 0; n < past; ++n) {
            use(static_cast<std::size_t>((b * request.heads() + row) * request.shape.tokens + n), n, past);
          }
        }
      }
    };
    const auto explains = [&](const std::vector<double>& scores) {
      if (scores.size() != given.size()) return false;
      bool same = true;
      bool matters = false;
      for_each_score([&](std::size_t at, index_t, index_t) {
        const double tolerance = 1e-4 * std::fabs(scores[at]) + 4 * (std::isfinite(errors[at]) ? errors[at] : 0.0);
        same = same &&
               (std::fabs(scores[at] - given[at]) <= tolerance || (std::isnan(scores[at]) && std::isnan(given[at])));
        matters = matters || scores[at] != expected[at];
      });
      return same && matters;
    };
    if (request.window > 0) {
      changed_layer scaled(layer);
      for (double& q : scaled.query) q *= std::sqrt(static_cast<double>(request.shape.head_dim));
      if (explains(reference_scores(request, scaled.view()))) {
        return ". These are the scores without the division of q k by sqrt(head_dim)";
      }
      changed_layer interleaved(layer);
      if (explains(scores_of_interleaved_heads(request, interleaved))) {
        return ". These are the scores when query head h reads KV head h % kv_heads, instead of h / group";
      }
    }
    bool ascending = true;  // no element of a dense reading lies before the first
    bool dense = true;
    for (const auto& tensor : {layer.query, layer.key.chunk(0), layer.value.chunk(0)}) {
      for (const index_t stride : tensor.strides) ascending = ascending && stride >= 0;
      dense = dense && tensor.dense();
    }
    for (const unsigned which : {7u, 1u, 2u, 4u}) {
      if (!ascending || dense) break;
      const changed_layer packed(layer, which);
      if (explains(reference_scores(request, packed.view()))) {
        const char* const names = which == 1   ? "the queries are"
                                  : which == 2 ? "the keys are"
                                  : which == 4 ? "the values are"
                                               : "tensors are";
        return std::string(". These are the scores when strides are ignored, and ") + names +
               " read as if they were dense, [batch, heads, tokens, head_dim]";
      }
    }
    index_t unwritten = -1, rows_end = 0;
    bool only_ends = true;
    for_each_score([&](std::size_t at, index_t n, index_t past) {
      if (std::isnan(given[at]) && unwritten < 0) unwritten = n;
      only_ends = only_ends && (std::isnan(given[at]) == (unwritten >= 0 && n >= unwritten));
      rows_end = past;
    });
    if (unwritten >= 0 && only_ends) {
      return ". Tokens " + std::to_string(unwritten) + " to " + std::to_string(rows_end - 1) +
             " of each row are not written";
    }
    return {};
  }
}

}  // namespace detail

}  // namespace restkv::parity
