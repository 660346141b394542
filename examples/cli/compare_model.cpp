// SPDX-License-Identifier: Apache-2.0
#include "compare_model.hpp"

#include "layers_selection.hpp"

#include <restkv/backend/eigen/backend.hpp>

#include <chrono>

namespace restkv::cli {

std::vector<selection> select_over_layers(const trace_file& trace, const configuration& c, int threads,
                                          const layer_scorer& score) {
  eigen_backend backend(threads);
  const auto count = static_cast<index_t>(trace.layers().size());
  layers_selection chooser(c, backend, shape_of(trace.layers().front().prompt(), 0, count));
  std::vector<selection> layers(trace.layers().size());
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const layer_view<float> layer = trace.layers()[i].prompt();
    selection scored;
    if (chooser.takes_scores()) scored = score(i);
    const auto begin = std::chrono::steady_clock::now();
    if (chooser.takes_scores()) {
      chooser.add_layer(backend, layer, scored);
    } else {
      chooser.add_layer(backend, layer);
    }
    layers[i].seconds =
        scored.seconds + std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const kept_tokens kept = chooser.kept(static_cast<index_t>(i));
    layers[i].heads = kept.heads();
    for (index_t h = 0; h < kept.heads(); ++h) {
      layers[i].lengths.push_back(kept.lengths(0, h));
      const position_t* const row = &kept.positions(0, h, 0);
      layers[i].positions.insert(layers[i].positions.end(), row, row + kept.capacity());
    }
  }
  return layers;
}

}  // namespace restkv::cli
