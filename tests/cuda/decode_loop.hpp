// SPDX-License-Identifier: Apache-2.0
// A decode loop with running scores over memory of a backend's kind, given the attention of every step: what it leaves
// is the same in every memory. Compiled with nvcc too, so without a test framework.
#pragma once

#include <restkv/backend/kernel_running.hpp>
#include <restkv/score/observed_attention.hpp>

#include <cstddef>
#include <vector>

namespace restkv_test {

using restkv::index_t;

/// The policy of these loops: sums, so that no step rounds otherwise where products are contracted.
using decode_policy = restkv::session_policy<
    restkv::eviction_policy<restkv::observed_attention, restkv::mean, restkv::no_pool, restkv::uniform>,
    restkv::running_sum>;

/// What the engine computes: tokens, and what each of their queries pays to every slot.
struct decode_input {
  index_t steps = 0;
  std::vector<float> keys;       ///< [steps, batch, kv_heads, head_dim]
  std::vector<float> values;     ///< likewise
  std::vector<float> attention;  ///< [steps, batch, query_heads, capacity]
};

/// What a loop leaves.
struct decoded {
  restkv::status result;
  std::vector<float> key;                     ///< [batch, kv_heads, capacity, head_dim]
  std::vector<float> value;                   ///< likewise
  std::vector<double> running;                ///< [batch, query_heads, capacity]
  std::vector<restkv::position_t> positions;  ///< [batch, kv_heads, capacity]
  std::vector<restkv::position_t> lengths;    ///< [batch, kv_heads]
  index_t evictions = 0;
  bool guards_hold = false;  ///< nothing was written behind the planned memory
};

/// Stores a token behind those of each head. For each (row, channel).
template <restkv::memory_space Space>
struct store_token {
  const float* token;  ///< [batch, kv_heads, head_dim]
  restkv::tensor_view<float, 4, Space> cache;
  restkv::tensor_view<const restkv::position_t, 2, Space> lengths;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t c = item % cache.extent(3);
    const index_t h = item / cache.extent(3) % cache.extent(1);
    const index_t b = item / cache.extent(3) / cache.extent(1);
    cache(b, h, lengths(b, h), c) = token[item];
  }
};

/// Memory: `backend_type`, `buffer<T>` with data(), put(buffer, values) and get(buffer, values) from and to the host.
template <class Memory>
[[nodiscard]] restkv::status run_decode_loop(const decode_policy& policy, restkv::problem_shape shape,
                                             const decode_input& input, decoded& made) {
  using namespace restkv;
  constexpr memory_space space = Memory::space;
  constexpr std::size_t guard = 256;
  auto backend = Memory::backend();
  running_plan<decode_policy> plan;
  RESTKV_RETURN_IF_FAILED(make_running_plan(backend, policy, shape, plan));
  shape = plan.shape;
  const index_t token_size = shape.batch * shape.kv_heads * shape.head_dim;
  const index_t row_size = shape.batch * shape.query_heads * shape.tokens;
  typename Memory::template buffer<float> keys;
  typename Memory::template buffer<float> values;
  typename Memory::template buffer<float> attention;
  typename Memory::template buffer<float> key_memory;
  typename Memory::template buffer<float> value_memory;
  typename Memory::template buffer<std::byte> state;
  typename Memory::template buffer<std::byte> scratch;
  RESTKV_RETURN_IF_FAILED(Memory::put(keys, std::span<const float>(input.keys)));
  RESTKV_RETURN_IF_FAILED(Memory::put(values, std::span<const float>(input.values)));
  RESTKV_RETURN_IF_FAILED(Memory::put(attention, std::span<const float>(input.attention)));
  const std::vector<float> zeros(static_cast<std::size_t>(token_size * shape.tokens), 0.0f);
  RESTKV_RETURN_IF_FAILED(Memory::put(key_memory, std::span<const float>(zeros)));
  RESTKV_RETURN_IF_FAILED(Memory::put(value_memory, std::span<const float>(zeros)));
  const std::vector<std::byte> for_state(plan.state_bytes + guard, std::byte{0x5c});
  const std::vector<std::byte> for_scratch(plan.workspace_bytes + guard, std::byte{0x5c});
  RESTKV_RETURN_IF_FAILED(Memory::put(state, std::span<const std::byte>(for_state)));
  RESTKV_RETURN_IF_FAILED(Memory::put(scratch, std::span<const std::byte>(for_scratch)));

  running_layer<space> layer;
  RESTKV_RETURN_IF_FAILED(begin_running(backend, plan, workspace(state.data(), plan.state_bytes), layer));
  using cache = tensor_view<float, 4, space>;
  const std::array<index_t, 4> extents{shape.batch, shape.kv_heads, shape.tokens, shape.head_dim};
  const cache key(key_memory.data(), extents);
  const cache value(value_memory.data(), extents);
  for (index_t t = 0; t < input.steps; ++t) {
    if (running_room(plan, layer) == 0) {
      layer_view<float, space> view;
      view.key = tensor_view<const float, 4, space>(key.slice(2, 0, layer.longest));
      running_choice<space> choice;
      RESTKV_RETURN_IF_FAILED(
          choose(backend, plan, layer, view, workspace(scratch.data(), plan.workspace_bytes), choice));
      RESTKV_RETURN_IF_FAILED(compact_in_place(backend, choice.kept, key, value));
      RESTKV_RETURN_IF_FAILED(keep(backend, plan, layer, choice));
      ++made.evictions;
    }
    RESTKV_RETURN_IF_FAILED(
        backend.for_each(token_size, store_token<space>{keys.data() + t * token_size, key, layer.lengths}));
    RESTKV_RETURN_IF_FAILED(
        backend.for_each(token_size, store_token<space>{values.data() + t * token_size, value, layer.lengths}));
    RESTKV_RETURN_IF_FAILED(append_tokens(backend, plan, layer, 1));
    const tensor_view<const float, 3, space> row(attention.data() + t * row_size,
                                                 {shape.batch, shape.query_heads, shape.tokens});
    RESTKV_RETURN_IF_FAILED(observe_scores(backend, plan, layer, row));
  }

  std::vector<std::byte> left;
  RESTKV_RETURN_IF_FAILED(Memory::get(scratch, left));
  made.guards_hold = true;
  const auto look_behind = [&](std::size_t bytes) {
    for (std::size_t i = bytes; i < left.size(); ++i) made.guards_hold = made.guards_hold && left[i] == std::byte{0x5c};
  };
  look_behind(plan.workspace_bytes);
  RESTKV_RETURN_IF_FAILED(Memory::get(state, left));
  look_behind(plan.state_bytes);
  const auto copy_out = [&](const auto& view, auto& values_of) {
    using value_type = typename std::remove_cvref_t<decltype(view)>::value_type;
    const auto at = reinterpret_cast<const std::byte*>(view.data) - reinterpret_cast<const std::byte*>(state.data());
    values_of.resize(static_cast<std::size_t>(view.size()));
    std::memcpy(values_of.data(), left.data() + at, values_of.size() * sizeof(value_type));
  };
  copy_out(layer.running, made.running);
  copy_out(layer.positions, made.positions);
  copy_out(layer.lengths, made.lengths);
  RESTKV_RETURN_IF_FAILED(Memory::get(key_memory, made.key));
  return Memory::get(value_memory, made.value);
}

template <class Memory>
[[nodiscard]] decoded decode_loop(const decode_policy& policy, const restkv::problem_shape& shape,
                                  const decode_input& input) {
  decoded made;
  made.result = run_decode_loop<Memory>(policy, shape, input, made);
  return made;
}

}  // namespace restkv_test
