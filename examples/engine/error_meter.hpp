// SPDX-License-Identifier: Apache-2.0
/// @file
/// `error_meter`: what evictions cost the answers, by the library's verifier.
#pragma once

#include "observer.hpp"

#include <restkv/backend/backend.hpp>
#include <restkv/verify/future_error.hpp>

#include <chrono>

namespace engine {

/// Verifies the eviction of every `each`-th request's prompt against the answer that follows: the exact change of a
/// layer's output for those queries, relative to the output.
template <class Backend>
class error_meter final : public observer {
 public:
  error_meter(Backend& backend, const model& recorded, index_t each)
      : backend_(backend), model_(recorded), each_(each) {}

  /// Mean over the layers and requests that were looked at; 0 without any.
  [[nodiscard]] double mean() const noexcept { return count_ == 0 ? 0 : sum_ / static_cast<double>(count_); }

  /// Spent here, which an engine would not.
  [[nodiscard]] std::chrono::steady_clock::duration time() const noexcept { return time_; }

  void selected(const sequence& s, index_t layer, const restkv::layer_view<float>& view,
                const restkv::const_kept_tokens& kept) override {
    if (s.answered > 0 || s.asked.id % each_ != 0) return;
    const auto begin = std::chrono::steady_clock::now();
    const model_layer& source = model_.layers[static_cast<std::size_t>(layer)];
    const auto answer = [&](const tensor_view<const float, 3>& tensor, index_t first) {
      const tensor_view<const float, 3> part =
          tensor.slice(1, s.asked.answer.front() - first, static_cast<index_t>(s.asked.answer.size()));
      return tensor_view<const float, 4>(part.data, {1, part.extent(0), part.extent(1), part.extent(2)},
                                         {0, part.stride(0), part.stride(1), part.stride(2)});
    };
    restkv::layer_view<float> prompt = view;
    prompt.head_lengths = {};  // before the first eviction all heads have all tokens
    const restkv::future_view<float> future{answer(source.query, model_.first_query), answer(source.key, 0),
                                            answer(source.value, 0)};
    sum_ += restkv::future_error(backend_, kept, prompt, future).mean_relative();
    ++count_;
    time_ += std::chrono::steady_clock::now() - begin;
  }

 private:
  Backend& backend_;
  const model& model_;
  index_t each_;
  double sum_ = 0;
  index_t count_ = 0;
  std::chrono::steady_clock::duration time_{};
};

}  // namespace engine
