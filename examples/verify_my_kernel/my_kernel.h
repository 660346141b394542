/* SPDX-License-Identifier: Apache-2.0 */
/* A kernel of somebody's own, with a plain C interface: how much attention the last queries pay to each token before
   them.

   scores[b][h][n] = mean over the last `window` rows i of `query` of softmax over m of (q[b][h][i] k[b][h / group][m] /
   sqrt(head_dim)), where query i sees the tokens m up to its own, and n < tokens - window.

   Tensors are [batch, heads, rows or tokens, head_dim] in float; strides are in elements, of the first three axes, the
   last is contiguous. Scores are dense, [batch, query_heads, tokens]. Returns 0, or an error number of the platform. */
#ifndef MY_KERNEL_H
#define MY_KERNEL_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct my_attention {
  const float* query;
  int64_t query_strides[3];
  int64_t rows; /* of the query tensor; the last `window` are used */
  const float* key;
  int64_t key_strides[3];
  int64_t batch, query_heads, kv_heads, head_dim, tokens, window;
  float* scores;
};

int my_attention_scores(const struct my_attention* problem);

#ifdef __cplusplus
}
#endif

#endif
