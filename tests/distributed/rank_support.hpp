// SPDX-License-Identifier: Apache-2.0
// What tests of several ranks share: threads as ranks, a rank's part of a layer, and a communicator that fails.
#pragma once

#include "policy/selection_support.hpp"

#include <restkv/distributed/counting.hpp>
#include <restkv/distributed/thread_team.hpp>

#include <thread>

namespace restkv_test {

namespace distributed = restkv::distributed;

/// Calls body(communicator) on `ranks` threads and waits for all. Checks stay outside: the test library is not made for
/// threads.
template <class Body>
void on_ranks(index_t ranks, const Body& body, std::chrono::milliseconds patience = std::chrono::seconds(60)) {
  distributed::thread_team team(ranks, patience);
  std::vector<std::thread> threads;
  for (index_t r = 0; r < ranks; ++r) {
    threads.emplace_back([&team, &body, r] {
      distributed::thread_communicator communicator(team, r);
      body(communicator);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

/// A communicator whose call number `fail_at` fails without a word to the others: as a rank that dies.
template <distributed::communicator C>
class failing_communicator {
 public:
  failing_communicator(C& ranks, index_t fail_at) : ranks_(ranks), left_(fail_at) {}
  [[nodiscard]] index_t rank() const { return ranks_.rank(); }
  [[nodiscard]] index_t size() const { return ranks_.size(); }
  [[nodiscard]] bool failed() const { return left_ < 0; }
  template <distributed::reducible T>
  [[nodiscard]] status all_reduce(std::span<T> data, distributed::reduction how) {
    return dies() ? death() : ranks_.all_reduce(data, how);
  }
  [[nodiscard]] status all_gather(std::span<const std::byte> own, std::span<std::byte> all) {
    return dies() ? death() : ranks_.all_gather(own, all);
  }
  [[nodiscard]] status broadcast(std::span<std::byte> data, index_t root) {
    return dies() ? death() : ranks_.broadcast(data, root);
  }

 private:
  [[nodiscard]] bool dies() { return left_-- <= 0; }
  [[nodiscard]] static status death() {
    return status::error(restkv::errc::communication_failure, "the test's failure");
  }

  C& ranks_;
  index_t left_;
};

/// A part of the axis of a cache: chunk by chunk.
template <class T>
std::vector<tensor_view<const T, 4>> slice_cache(const restkv::chunked_tensor_view<const T>& cache, std::size_t axis,
                                                 index_t first, index_t count) {
  std::vector<tensor_view<const T, 4>> parts;
  for (index_t i = 0; i < cache.chunks(); ++i) {
    const auto& chunk = cache.chunk(i);
    if (axis != 2) {
      parts.push_back(chunk.slice(axis, first, count));
      continue;
    }
    const index_t begin = std::clamp<index_t>(first, 0, chunk.extent(2));
    const index_t end = std::clamp<index_t>(first + count, begin, chunk.extent(2));
    parts.push_back(chunk.slice(2, begin, end - begin));
    first -= chunk.extent(2);
  }
  return parts;
}

/// The KV heads [first, first + count) of a layer, with their query heads and their part of W_O. Refers to the layer.
template <class T>
struct part_of_heads {
  std::vector<tensor_view<const T, 4>> key, value;
  layer_view<T> view;

  part_of_heads(const layer_view<T>& whole, index_t first, index_t count) : view(whole) {
    const index_t group = whole.query.extent(1) / whole.key.extent(1);
    const index_t channels = whole.key.extent(3);
    key = slice_cache(whole.key, 1, first, count);
    value = slice_cache(whole.value, 1, first, count);
    view.key = {key.data(), std::ssize(key)};
    view.value = {value.data(), std::ssize(value)};
    view.query = whole.query.slice(1, first * group, count * group);
    if (!whole.metric.missing()) {
      view.metric.gram = whole.metric.gram.slice(0, first * group, count * group);
      view.metric.factor = whole.metric.factor.slice(0, first * group, count * group);
      view.metric.spectrum = whole.metric.spectrum.slice(0, first * group, count * group);
    }
    if (whole.projection.data != nullptr) {
      view.projection = whole.projection.slice(1, first * group * channels, count * group * channels);
    }
  }
};

/// What one rank, or one process, made of a problem. Row b * heads + h.
struct rank_outcome {
  status result;
  std::vector<std::vector<position_t>> kept;
  distributed::traffic said;

  void take(const restkv::const_kept_tokens& tokens) {
    for (index_t b = 0; b < tokens.batch(); ++b) {
      for (index_t h = 0; h < tokens.heads(); ++h) {
        const position_t* const row = tokens.positions.data + tokens.positions.offset(b, h, 0);
        kept.emplace_back(row, row + tokens.lengths(b, h));
      }
    }
  }
};

/// What `select` keeps in one process.
template <class Backend, class Policy, class T>
rank_outcome select_alone(const Policy& policy, const layer_view<T>& layer, const restkv::problem_shape& shape) {
  rank_outcome outcome;
  Backend backend;
  restkv::plan<Policy> plan;
  outcome.result = make_plan(backend, policy, shape, plan);
  if (!outcome.result.ok()) return outcome;
  std::vector<std::byte> memory(plan.workspace_bytes, std::byte{0xff});
  kept_tokens kept;
  outcome.result = select(backend, plan, layer, restkv::workspace(memory.data(), memory.size()), kept);
  if (outcome.result.ok()) outcome.take(kept);
  return outcome;
}

}  // namespace restkv_test
