// SPDX-License-Identifier: Apache-2.0
/// @file
/// What a kept set costs a layer whose heads lie on several ranks.
#pragma once

#include <restkv/distributed/agreement.hpp>
#include <restkv/verify/output_error.hpp>

namespace restkv::distributed {

/// The numbers of a layer whose heads lie on several ranks, the same on each of them.
struct layer_output_errors {
  index_t queries = 0;                ///< rows that were asked for
  std::vector<double> error{};        ///< ||sum_h W[h] (o'_h - o_h)|| over all ranks' heads. [batch, queries]
  std::vector<double> output_norm{};  ///< ||sum_h W[h] o_h|| likewise. [batch, queries]
};

/// `output_error` of this rank's heads, and the layer's own error: sums over all heads of vectors of the hidden width,
/// which one all_reduce of 16 hidden batch queries bytes adds up. Called on every rank, each with its heads' keys,
/// values, queries and columns of W_O (layer.projection, [hidden, this rank's query heads * head_dim]).
///
/// `whole` agrees with layer() and layer_output_norm() of one process up to the order in which the ranks' sums are
/// added: each of its numbers within R 2^-53 sum over ranks ||sum over its heads||, to first order, besides the
/// communicator's order.
///
/// Errors: those of `output_error` and of the communicator, a layer without projection, ranks with other shapes of W_O.
template <tensor_backend Backend, element T, communicator Ranks>
[[nodiscard]] status output_error(Backend& backend, const const_kept_tokens& kept, const layer_view<T>& layer,
                                  Ranks& ranks, output_errors& own, layer_output_errors& whole, index_t queries = 0) {
  if (queries == 0) queries = layer.query.extent(2);
  std::vector<double> sums;  // [batch, queries, 2, hidden]
  const index_t hidden = layer.projection.extent(0);
  const auto compute = [&]() -> status {
    if (layer.projection.data == nullptr) {
      return status::error(errc::missing_input, "the error of a layer needs W_O: set layer.projection");
    }
    RESTKV_RETURN_IF_FAILED(restkv::detail::check_verification(kept, layer, queries));
    sums.resize(static_cast<std::size_t>(layer.key.extent(0) * queries * 2 * hidden));
    return restkv::detail::error_computation<Backend, T>(backend, kept, layer, queries, sums.data()).run(own);
  };
  RESTKV_RETURN_IF_FAILED(detail::all_ok(ranks, compute()));
  // Whether all sums have the same size: the largest and, as its complement, the smallest.
  std::uint64_t sizes[2] = {sums.size(), ~static_cast<std::uint64_t>(sums.size())};
  RESTKV_RETURN_IF_FAILED(ranks.all_reduce(std::span<std::uint64_t>(sizes), reduction::max));
  if (sizes[0] != ~sizes[1]) {
    return status::error(errc::shape_mismatch,
                         "the ranks' sums have %llu to %llu numbers: W_O, sequences or queries differ",
                         static_cast<unsigned long long>(~sizes[1]), static_cast<unsigned long long>(sizes[0]));
  }
  RESTKV_RETURN_IF_FAILED(ranks.all_reduce(std::span<double>(sums), reduction::sum));
  whole.queries = queries;
  whole.error.clear();
  whole.output_norm.clear();
  for (index_t i = 0; i < layer.key.extent(0) * queries; ++i) {
    double squares[2] = {};
    for (index_t part = 0; part < 2; ++part) {
      for (index_t r = 0; r < hidden; ++r) {
        const double x = sums[static_cast<std::size_t>((2 * i + part) * hidden + r)];
        squares[part] += x * x;
      }
    }
    whole.error.push_back(std::sqrt(squares[0]));
    whole.output_norm.push_back(std::sqrt(squares[1]));
  }
  return {};
}

}  // namespace restkv::distributed
