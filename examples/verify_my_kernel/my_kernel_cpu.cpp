// SPDX-License-Identifier: Apache-2.0
// Stands in for my_kernel.cu where there is no GPU, so that the example runs everywhere.
#include "my_kernel.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

extern "C" int my_attention_scores(const my_attention* problem) {
  const my_attention& p = *problem;
  const int64_t past = p.tokens - p.window;
  std::vector<float> logits(static_cast<std::size_t>(p.tokens));
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.query_heads; ++h) {
      const float* const key = p.key + b * p.key_strides[0] + h / (p.query_heads / p.kv_heads) * p.key_strides[1];
      float* const scores = p.scores + (b * p.query_heads + h) * p.tokens;
      std::fill_n(scores, past, 0.0f);
      for (int64_t i = 0; i < p.window; ++i) {
        const float* const query =
            p.query + b * p.query_strides[0] + h * p.query_strides[1] + (p.rows - p.window + i) * p.query_strides[2];
        const auto visible = static_cast<std::size_t>(past + i + 1);
        float largest = -std::numeric_limits<float>::max();
        for (std::size_t n = 0; n < visible; ++n) {
          const float* const k = key + static_cast<int64_t>(n) * p.key_strides[2];
          float dot = 0;
          for (int64_t c = 0; c < p.head_dim; ++c) dot += query[c] * k[c];
          logits[n] = dot / std::sqrt(static_cast<float>(p.head_dim));
          largest = std::max(largest, logits[n]);
        }
        float sum = 0;
        for (std::size_t n = 0; n < visible; ++n) sum += logits[n] = std::exp(logits[n] - largest);
        for (int64_t n = 0; n < past; ++n) {
          scores[n] += logits[static_cast<std::size_t>(n)] / (sum * static_cast<float>(p.window));
        }
      }
    }
  }
  return 0;
}
