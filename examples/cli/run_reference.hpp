// SPDX-License-Identifier: Apache-2.0
/// @file
/// The sources of reference_backend: run_reference.cpp and run_reference_*.cpp.
#pragma once

#include "run_policy.hpp"

#include <restkv/reference/backend.hpp>

namespace restkv::cli {

/// The reference, which does not compute the same scores twice.
class remembering_reference : public reference_backend {
 public:
  explicit remembering_reference(std::vector<std::vector<double>>& scores) : scores_(scores) {}

  template <class Request, element T>
  status token_scores(const Request& request, const layer_view<T>& layer, scratch<Request>& scratch,
                      tensor_view<double, 3> out) {
    if (asked_ == scores_.size()) {
      RESTKV_RETURN_IF_FAILED(reference_backend::token_scores(request, layer, scratch, out));
      scores_.emplace_back(out.data, out.data + out.size());
    } else {
      std::copy(scores_[asked_].begin(), scores_[asked_].end(), out.data);
    }
    ++asked_;
    return {};
  }

 private:
  std::vector<std::vector<double>>& scores_;
  std::size_t asked_ = 0;  // a selection asks for the same scores in the same order
};
static_assert(tensor_backend<remembering_reference>);

}  // namespace restkv::cli

RESTKV_CLI_ATTENTION_SCORES(extern, restkv::cli::remembering_reference)
RESTKV_CLI_RESCORED_SCORES(extern, restkv::cli::remembering_reference)
RESTKV_CLI_VALUE_SCORES(extern, restkv::cli::remembering_reference)
RESTKV_CLI_CACHE_SCORES(extern, restkv::cli::remembering_reference)
