// SPDX-License-Identifier: Apache-2.0
// Runs a policy of one's own beside the library's default on a recorded prompt: on both backends, through selection,
// compaction and the verifier.
//
//   custom_policy examples/data/trace-2k.safetensors [TOKENS_PER_HEAD [LAYER...]]
#include "recorded_layer.hpp"
#include "value_weighted_attention.hpp"

#include <restkv/restkv.hpp>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using restkv::index_t;
using restkv::position_t;

/// What a selection chose, and what that costs.
struct outcome {
  std::vector<std::vector<position_t>> heads;  ///< kept positions of each KV head
  double window_error = 0;                     ///< of the window's queries, relative to the layer's output
  double future_error = 0;                     ///< of the queries that came after the prompt
  std::size_t cache_bytes = 0;                 ///< of the compacted keys and values
};

template <class Backend, class Policy>
[[nodiscard]] outcome run(Backend& backend, const Policy& policy, const recorded_layer& recorded) {
  const restkv::layer_view<float>& layer = recorded.prompt();
  const auto plan = restkv::make_plan(backend, policy, restkv::shape_of(layer));
  std::vector<std::byte> memory(plan.workspace_bytes);
  const restkv::kept_tokens kept = restkv::select(backend, plan, layer, restkv::workspace(memory));

  // Heads keep different numbers of tokens, so they are stored one behind the other.
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(kept.heads()) + 1);
  const restkv::tensor_view<std::int64_t, 1> ends(offsets.data(), {kept.heads() + 1});
  restkv::throw_if_failed(restkv::ragged_offsets(kept, ends));
  const index_t head_dim = plan.shape.head_dim;
  std::vector<float> keys(static_cast<std::size_t>(kept.total() * head_dim));
  std::vector<float> values(keys.size());
  const auto ragged = [&](std::vector<float>& rows) {
    return restkv::ragged_layout<float>{{rows.data(), {kept.total(), head_dim}}, ends, 1, kept.heads()};
  };
  restkv::compact(backend, kept, layer.key, layer.value, ragged(keys), ragged(values));

  outcome result;
  result.window_error = restkv::output_error(backend, kept, layer, plan.policy.window).mean_relative();
  result.future_error = restkv::future_error(backend, kept, layer, recorded.future()).mean_relative();
  result.cache_bytes = (keys.size() + values.size()) * sizeof(float);
  for (index_t h = 0; h < kept.heads(); ++h) {
    const position_t* const first = &kept.positions(0, h, 0);
    result.heads.emplace_back(first, first + kept.lengths(0, h));
    // The compacted cache holds what the kept set says, in its order.
    for (index_t slot = 0; slot < kept.lengths(0, h); ++slot) {
      const float* const compacted = keys.data() + (offsets[static_cast<std::size_t>(h)] + slot) * head_dim;
      const auto token = layer.key.from_token(first[slot]);
      if (std::memcmp(compacted, &token(0, h, 0, 0), static_cast<std::size_t>(head_dim) * sizeof(float)) != 0) {
        throw std::runtime_error("slot " + std::to_string(slot) + " does not hold token " + std::to_string(first[slot]));
      }
    }
  }
  return result;
}

/// Positions that only one of two selections kept.
[[nodiscard]] std::size_t difference(const outcome& a, const outcome& b) {
  std::vector<position_t> different;
  for (std::size_t h = 0; h < a.heads.size(); ++h) {
    std::set_symmetric_difference(a.heads[h].begin(), a.heads[h].end(), b.heads[h].begin(), b.heads[h].end(),
                                  std::back_inserter(different));
  }
  return different.size();
}

[[nodiscard]] index_t number(const char* text) {
  index_t value = 0;
  const char* const end = text + std::strlen(text);
  if (std::from_chars(text, end, value).ptr != end) throw std::runtime_error(std::string(text) + " is not a number");
  return value;
}

/// True when all is as it should be.
[[nodiscard]] bool compare(const char* path, index_t budget, const std::vector<index_t>& layers) {
  restkv::safetensors_file file;
  restkv::throw_if_failed(restkv::safetensors_file::open(path, file));
  restkv::eigen_backend fast(2);
  restkv::reference_backend reference;
  std::printf("%lld tokens per KV head; relative errors of the layer's output, window's queries / future queries\n",
              static_cast<long long>(budget));
  std::printf("layer    bytes         my_policy          standard   backends differ in\n");
  bool good = true;
  for (const index_t i : layers) {
    const recorded_layer layer(file, "layers." + std::to_string(i) + ".");
    const outcome mine = run(fast, my_policy(budget), layer);
    const outcome by_loops = run(reference, my_policy(budget), layer);
    const outcome standard = run(fast, restkv::presets::standard(budget), layer);
    const std::size_t differing = difference(mine, by_loops);
    std::printf("%5lld %8zu", static_cast<long long>(i), mine.cache_bytes);
    for (const outcome* each : {&mine, &standard}) {
      std::printf("   %.4f / %.4f", each->window_error, each->future_error);
    }
    std::printf("   %zu positions\n", differing);
    good = good && mine.cache_bytes == standard.cache_bytes;
    // Scores in float and in double may rank two tokens that are nearly equal differently.
    good = good && differing <= 4 && mine.future_error < 2 * standard.future_error;
  }
  return good;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: custom_policy TRACE [TOKENS_PER_HEAD [LAYER...]]\n");
    return 2;
  }
  try {
    const index_t budget = count > 2 ? number(arguments[2]) : 384;
    std::vector<index_t> layers{1, 10, 19, 28};
    if (count > 3) layers.clear();
    for (int i = 3; i < count; ++i) layers.push_back(number(arguments[i]));
    return compare(arguments[1], budget, layers) ? 0 : 1;
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "custom_policy: %s\n", problem.what());
    return 2;
  }
}
