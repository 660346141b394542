// SPDX-License-Identifier: Apache-2.0
// A small user of the installed library: chooses the tokens to keep of one layer, and copies them.
//
// With CONSUMER_EIGEN on the Eigen backend, otherwise on the reference, which needs the standard library alone.
#include <restkv/compact.hpp>
#include <restkv/presets.hpp>
#include <restkv/select.hpp>

#ifdef CONSUMER_EIGEN
#include <restkv/backend/eigen/backend.hpp>
using backend_type = restkv::eigen_backend;
#else
#include <restkv/reference/backend.hpp>
using backend_type = restkv::reference_backend;
#endif

#include <cmath>
#include <cstdio>
#include <vector>

int main() {
  // One sequence of 64 tokens, 2 KV heads of 4 channels, 4 query heads; a window of 8 queries.
  std::vector<float> keys(2 * 64 * 4), values(keys.size()), queries(4 * 8 * 4, 1.0f);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    keys[i] = std::sin(static_cast<float>(i));
    values[i] = std::cos(static_cast<float>(i));
  }
  // Every query of head 0 looks at token 10.
  for (std::size_t c = 0; c < 4; ++c) keys[10 * 4 + c] = 3.0f;

  restkv::layer_view<float> layer;
  layer.query = {queries.data(), {1, 4, 8, 4}};
  layer.key = restkv::tensor_view<const float, 4>(keys.data(), {1, 2, 64, 4});
  layer.value = restkv::tensor_view<const float, 4>(values.data(), {1, 2, 64, 4});

  backend_type backend;
  auto policy = restkv::presets::snap_kv(16);
  policy.window = 8;
  policy.protect.recent = 8;
  policy.spatial.width = 1;
  const restkv::owned_selection chosen = restkv::select(backend, policy, layer);
  const restkv::kept_tokens& kept = chosen.kept();

  std::vector<float> new_keys(2 * 16 * 4), new_values(new_keys.size());
  restkv::compact(backend, kept, layer.key, layer.value,
                  restkv::dense_layout<float>{{new_keys.data(), {1, 2, 16, 4}}},
                  restkv::dense_layout<float>{{new_values.data(), {1, 2, 16, 4}}});

  bool found = false;
  std::printf("head 0 keeps");
  for (restkv::index_t i = 0; i < kept.lengths(0, 0); ++i) {
    const restkv::position_t token = kept.positions(0, 0, i);
    std::printf(" %d", token);
    found = found || (token == 10 && new_keys[static_cast<std::size_t>(i) * 4] == 3.0f);
  }
  std::printf("\n");
  return found && kept.total() == 2 * 16 ? 0 : 1;
}
