// SPDX-License-Identifier: Apache-2.0
/// @file
/// A backend for a rank that holds a part of a layer's heads.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/distributed/agreement.hpp>

namespace restkv::distributed {

/// A backend whose heads are a part of the layer's (`head_sharing_backend`). Scores are those of the backend it refers
/// to; after each of its steps the ranks agree that all can go on (8 bytes), so that none waits for one that failed. It
/// offers no bounds: which tokens are pruned would have to be agreed upon.
template <tensor_backend Backend, communicator Ranks>
class heads_backend {
 public:
  using score_type = typename Backend::score_type;  ///< the backend's
  /// The backend's: constructed from this one.
  template <class Request>
  using scratch = typename Backend::template scratch<Request>;

  /// Refers to both. `heads` are this rank's KV heads.
  heads_backend(Backend& backend, Ranks& ranks, const axis_part& heads, index_t count) noexcept
      : backend_(backend), ranks_(ranks), heads_(heads), count_(count) {}

  /// For the construction of scratch memory.
  operator const Backend&() const noexcept { return backend_; }  // NOLINT(google-explicit-constructor)

  ///@{
  /// See `tensor_backend`.
  template <class Body>
  void parallel_for(index_t n, const Body& body) const {
    backend_.parallel_for(n, body);
  }
  template <class Request, element T>
  [[nodiscard]] status token_scores(const Request& request, const layer_view<T>& layer, scratch<Request>& scratch,
                                    tensor_view<score_type, 3> out) {
    return detail::all_ok(ranks_, backend_.token_scores(request, layer, scratch, out));
  }
  template <class Request, element T>
  [[nodiscard]] status window_drift(const Request& request, const layer_view<T>& layer,
                                    std::span<const index_t> most_attended, scratch<Request>& scratch,
                                    tensor_view<double, 2> out) {
    return detail::all_ok(ranks_, backend_.window_drift(request, layer, most_attended, scratch, out));
  }
  ///@}

  ///@{
  /// See `head_sharing_backend`.
  template <class T, class Fold>
  [[nodiscard]] status fold_heads(std::span<T> running, const Fold& fold) {
    return fold_in_order(ranks_, running, fold);
  }
  [[nodiscard]] index_t heads_of_layer(index_t here) const noexcept { return here / count_ * heads_.whole; }
  ///@}

 private:
  Backend& backend_;
  Ranks& ranks_;
  axis_part heads_;
  index_t count_;
};

}  // namespace restkv::distributed
