// SPDX-License-Identifier: Apache-2.0
/// @file
/// What the score kernels share: their inputs, and the features of a token that no query takes part in.
#pragma once

#include <restkv/kernel/attention_rows.hpp>
#include <restkv/kernel/value_images.hpp>

namespace restkv::kernel {

/// What a request's features ask of the kernels.
template <class Request>
struct needs_of {
  using score = std::remove_cvref_t<decltype(Request::score)>;
  using temporal = std::remove_cvref_t<decltype(Request::temporal)>;
  static constexpr feature set = features_of<score>();
  static constexpr bool window = has(set, window_features);
  static constexpr bool output = has(set, output_features);
  static constexpr bool values = has(set, value_features);
  static constexpr bool distance = has(set, feature::distance);
  static constexpr bool alignment = has(set, feature::alignment);
  static constexpr bool projected = has(set, feature::projected_norm_l1);
  static constexpr bool keys = has(set, feature::key_norm);
  static constexpr bool l1 = has(set, feature::value_norm_l1);
  /// Features that values or keys are read for, chunk by chunk.
  static constexpr bool chunks = values || keys;
  /// Features that an image M v is needed for.
  static constexpr bool image =
      has(set, feature::distance | feature::alignment | feature::value_norm | feature::mean_distance);
};

/// Where scores go, in the executor's memory: row (b, r) at data + b * strides[0] + r * strides[1].
struct score_rows {
  float* data = nullptr;  ///< [batch, heads, tokens]
  index_t strides[3] = {};
};

/// What bounds on distances are made of, see score_bounds.hpp.
struct distance_bounds {
  float* centre = nullptr;   ///< c, [batch * query_heads, head_dim]
  float* radius = nullptr;   ///< not below ||M (o - c)|| as it is computed, [cells]
  float* stretch = nullptr;  ///< the most that M stretches a vector by, likewise, [batch * query_heads]
  float widen = 1;           ///< what a score may gain by sums that are contracted in another way
};

/// The tokens of each row that are to be scored.
struct listed_tokens {
  position_t* tokens = nullptr;  ///< [batch * rows, stride]; null: all of them
  index_t* counts = nullptr;     ///< [batch * rows]
  index_t stride = 0;
};

/// What the score kernels read and write.
template <class Request, cached T>
struct score_inputs {
  using needs = needs_of<Request>;

  attention_problem<T> problem;
  typename needs::score score;
  typename needs::temporal temporal;
  group_reduce reduction;
  index_t heads_of_row;  ///< query heads whose scores become one row
  index_t row_tiles;     ///< tiles of the longest past
  metric_source metric;
  metric_pieces<number_of<T>> factor{};  ///< of `metric`, where kernels multiply it on tensor cores
  projection_source<number_of<T>> projection;
  const float* mean_image = nullptr;      ///< [batch * query_heads, head_dim]
  const lane_softmax* softmax = nullptr;  ///< [batch * kv_heads * lanes]
  const float* weights = nullptr;         ///< [window]
  bool linear = false;
  output_states outputs;
  distance_bounds bounds;
  listed_tokens list;
  score_rows out;

  /// Rows of scores of a sequence.
  [[nodiscard]] RESTKV_HD index_t rows() const noexcept { return problem.query_heads / heads_of_row; }
  [[nodiscard]] index_t blocks() const noexcept { return problem.batch * rows() * row_tiles; }
  /// The image of the mean value for a query head, where it is needed. [head_dim]
  [[nodiscard]] RESTKV_HD const float* mean_of(index_t b, index_t head) const noexcept {
    return mean_image == nullptr ? nullptr : mean_image + (b * problem.query_heads + head) * problem.head_dim;
  }
};

/// A block's tile of tokens of one row, or of its list.
struct score_place {
  index_t batch;
  index_t row;         ///< of the sequence's rows of scores
  index_t first_head;  ///< query head
  index_t kv_head;
  index_t count;       ///< tokens that get a score; at most token_tile, maybe none
  tile_tokens tokens;  ///< the first `count` of them
  head_span span;

  template <class Request, cached T>
  RESTKV_HD score_place(const score_inputs<Request, T>& in, index_t block) noexcept
      : tokens(block % in.row_tiles * token_tile) {
    const index_t rows = in.rows();
    batch = block / in.row_tiles / rows;
    row = block / in.row_tiles % rows;
    first_head = row * in.heads_of_row;
    kv_head = first_head / in.problem.group();
    span = in.problem.span(batch, kv_head);
    const index_t first = tokens.first;
    count = of_tile(in.problem.past_of(span) - first);
    if constexpr (bounded_by_distance<Request>()) {  // nobody else has lists
      if (in.list.tokens == nullptr) return;
      const index_t cell = batch * rows + row;
      count = of_tile(in.list.counts[cell] - first);
      if (count > 0) tokens = {in.list.tokens + cell * in.list.stride + first, count};
    }
  }

 private:
  [[nodiscard]] RESTKV_HD static constexpr index_t of_tile(index_t left) noexcept {
    return left < token_tile ? left : token_tile;
  }
};

/// Features of a tile's tokens that no query takes part in, as sums that grow chunk by chunk. All members are called
/// within a phase of their own by `for_each(token_tile)`, token by token.
struct token_facts {
  float value_squares[token_tile];
  float mean_squares[token_tile];
  float value_l1[token_tile];
  float projected_l1[token_tile];
  float key_squares[token_tile];
  float folded[token_tile];
};

/// Facts of a row's KV head: the same for all its query heads. Uses `image` [token_tile, value_images::stride].
template <class Group, class Request, cached T>
RESTKV_HD void gather_head_facts(Group& group, token_facts& facts, float* image, const score_inputs<Request, T>& in,
                                 const score_place& at) {
  using needs = needs_of<Request>;
  using images = value_images<T, Group::threads>;
  const attention_problem<T>& problem = in.problem;
  group.for_each(token_tile, [&](index_t t) {
    group.write(facts.value_l1[t], 0.0f);
    group.write(facts.key_squares[t], 0.0f);
  });
  if constexpr (needs::l1) {
    for (index_t first = 0; first < problem.head_dim; first += images::columns) {
      images::copy(group, image, problem.value, at.batch, at.kv_head, at.span, at.tokens, first, problem.head_dim);
      group.sync();
      group.for_each(token_tile, [&](index_t t) {
        float sum = group.read(facts.value_l1[t]);
        for (int i = 0; i < images::columns; ++i) sum += std::fabs(group.read(image[t * images::stride + i]));
        group.write(facts.value_l1[t], sum);
      });
      group.sync();
    }
  }
  if constexpr (needs::keys) {
    for (index_t first = 0; first < problem.head_dim; first += images::columns) {
      images::copy(group, image, problem.key, at.batch, at.kv_head, at.span, at.tokens, first, problem.head_dim);
      group.sync();
      group.for_each(token_tile, [&](index_t t) {
        float sum = group.read(facts.key_squares[t]);
        for (int i = 0; i < images::columns; ++i) {
          const float x = group.read(image[t * images::stride + i]);
          sum += x * x;
        }
        group.write(facts.key_squares[t], sum);
      });
      group.sync();
    }
  }
}

/// ||W[h] v||_1 of the tile's tokens, hidden channels in ascending order.
template <class Group, class Request, cached T, class Operands>
RESTKV_HD void gather_projected_norms(Group& group, token_facts& facts, Operands& memory, float* image,
                                      const score_inputs<Request, T>& in, const score_place& at, index_t head) {
  using images = value_images<T, Group::threads>;
  const index_t head_dim = in.problem.head_dim;
  group.for_each(token_tile, [&](index_t t) { group.write(facts.projected_l1[t], 0.0f); });
  for (index_t first = 0; first < in.projection.hidden; first += images::columns) {
    images::multiply(
        group, memory, image, in.problem, at.batch, at.kv_head, at.span, at.tokens, first, 0,
        [&](index_t c, index_t r) {
          if (r >= in.projection.hidden) return 0.0f;
          return widen<float>(
              in.projection.data[r * in.projection.strides[0] + (head * head_dim + c) * in.projection.strides[1]]);
        });
    group.for_each(token_tile, [&](index_t t) {
      float sum = group.read(facts.projected_l1[t]);
      for (int i = 0; i < images::columns; ++i) sum += std::fabs(group.read(image[t * images::stride + i]));
      group.write(facts.projected_l1[t], sum);
    });
    group.sync();
  }
}

/// Adds a chunk of the tile's images to the facts that come from them: channels [first, first + value_images::columns).
template <class Request, class Group, cached T>
RESTKV_HD void add_image_facts(Group& group, token_facts& facts, const float* image, const score_inputs<Request, T>& in,
                               index_t first, const float* mean) {
  using needs = needs_of<Request>;
  using images = value_images<T, Group::threads>;
  group.for_each(token_tile, [&](index_t t) {
    float squares = group.read(facts.value_squares[t]);
    float mean_squares = group.read(facts.mean_squares[t]);
    for (int i = 0; i < images::columns; ++i) {
      const float x = group.read(image[t * images::stride + i]);
      if constexpr (has(needs::set, feature::value_norm)) squares += x * x;
      if constexpr (has(needs::set, feature::mean_distance)) {
        const float difference = first + i < in.problem.head_dim ? x - mean[first + i] : 0.0f;
        mean_squares += difference * difference;
      }
    }
    group.write(facts.value_squares[t], squares);
    group.write(facts.mean_squares[t], mean_squares);
  });
}

/// A token's features without those of the window's queries.
template <class Group, class Request, cached T>
[[nodiscard]] RESTKV_HD token_features<float> features_of_token(Group& group, const token_facts& facts,
                                                                const score_inputs<Request, T>& in,
                                                                const score_place& at, index_t head, index_t t) {
  using needs = needs_of<Request>;
  token_features<float> f;
  f.position = at.tokens[t];
  f.length = at.span.length;
  f.batch = at.batch;
  f.head = head;
  f.layer = in.problem.layer;
  if constexpr (has(needs::set, feature::value_norm)) f.value_norm = std::sqrt(group.read(facts.value_squares[t]));
  if constexpr (has(needs::set, feature::mean_distance)) f.mean_distance = root(group.read(facts.mean_squares[t]));
  if constexpr (needs::l1) f.value_norm_l1 = group.read(facts.value_l1[t]);
  if constexpr (needs::projected) f.projected_norm_l1 = group.read(facts.projected_l1[t]);
  if constexpr (needs::keys) f.key_norm = std::sqrt(group.read(facts.key_squares[t]));
  return f;
}

/// Folds one head's score of token t, or the bound on it, into its row, and writes the row's after the last head.
template <bool Bounds = false, class Group, class Request, cached T>
RESTKV_HD void deliver_score(Group& group, token_facts& facts, const score_inputs<Request, T>& in,
                             const score_place& at, index_t j, index_t t, float score) {
  const float running = j == 0 ? 0.0f : group.read(facts.folded[t]);
  const float folded = group_fold(in.reduction, running, score, j == 0);
  group.write(facts.folded[t], folded);
  if (j + 1 < in.heads_of_row || t >= at.count) return;
  float result = finite_score(group_finish(in.reduction, folded, in.heads_of_row));
  // A bound that is none: the token will be scored.
  if (Bounds && result != result) result = std::numeric_limits<float>::max();
  group.write(in.out.data[at.batch * in.out.strides[0] + at.row * in.out.strides[1] + at.tokens[t] * in.out.strides[2]],
              result);
}

}  // namespace restkv::kernel
