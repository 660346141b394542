// SPDX-License-Identifier: Apache-2.0
/// @file
/// Upper bounds on computed distances that cost no product with the metric: what certified pruning starts from.
///
/// For the computed images i(v) of a value and i(o) of an output, any vector c, s the largest singular value of M and F
/// its Frobenius norm,
///
///     ||i(v) - i(o)|| <= ||i(v) - M v|| + ||M (v - c)|| + ||M c - i(c)|| + ||i(c) - i(o)||
///                     <= e F ||v|| + s ||v - c|| + e F ||c|| + ||i(c) - i(o)||
///                     <= (s + e F) ||v - c|| + (||i(c) - i(o)|| + 2 e F ||c||)
///                      = stretch ||v - c|| + radius
///
/// since a sum of d products, each rounded and added up with 20 bits or more, misses (M v)[r] by at most
/// e ||M[r]|| ||v||, e = (d + 16) 2^-20; float's own bound is a sixteenth of that, tensor cores and a factor in pieces
/// take most of the rest. The sums of squares that norms are the roots of are off by less than a factor of 1 + e. What
/// lies below float's normal numbers is made up for by `d 2^-126` under each root.
#pragma once

#include <restkv/kernel/score_token_facts.hpp>

namespace restkv::kernel {

/// e of d channels.
[[nodiscard]] RESTKV_HD constexpr float bound_slack(index_t head_dim) noexcept {
  return static_cast<float>(head_dim + 16) * 0x1p-20f;
}

/// The largest squares that d squares may lose below the normal numbers.
[[nodiscard]] RESTKV_HD constexpr float lost_squares(index_t head_dim) noexcept {
  return static_cast<float>(head_dim) * std::numeric_limits<float>::min();
}

/// What scores may gain by sums of as many terms that are contracted in another way: see `distance_bounds::widen`.
[[nodiscard]] constexpr float score_slack(index_t terms) noexcept {
  return 1.0f + static_cast<float>(terms + 16) * 0x1p-22f;
}

/// A bound from the score of a bounded distance; infinite where that is not a number.
[[nodiscard]] RESTKV_HD constexpr float bound_of(float score, float widen) noexcept {
  const float bound = score * widen;
  return bound == bound ? bound : std::numeric_limits<float>::infinity();
}

/// How far the images of a tile's values may lie from that of the centre.
struct tile_reach {
  float squares[2 * token_tile];  ///< sums over the first and the second halves of chunks of channels
  float reach[token_tile];        ///< stretch ||v - c||
};

/// Sets the reach of the tile's tokens. Uses `image` [token_tile, value_images::stride]. Ends phases; memory and image
/// must be free when it begins.
template <class Group, class Request, cached T>
RESTKV_HD void measure_reach(Group& group, tile_reach& memory, float* image, const score_inputs<Request, T>& in,
                             const score_place& at, index_t head) {
  using images = value_images<T, Group::threads>;
  constexpr int half = images::columns / 2;
  const index_t head_dim = in.problem.head_dim;
  const index_t cell = at.batch * in.problem.query_heads + head;
  const float* const centre = in.bounds.centre + cell * head_dim;
  group.for_each(2 * token_tile, [&](index_t item) { group.write(memory.squares[item], 0.0f); });
  for (index_t first = 0; first < head_dim; first += images::columns) {
    images::copy(group, image, in.problem.value, at.batch, at.kv_head, at.span, at.tokens, first, head_dim);
    group.sync();
    group.for_each(2 * token_tile, [&](index_t item) {
      const index_t t = item % token_tile;
      const index_t begin = item / token_tile * half;
      float sum = group.read(memory.squares[item]);
      for (index_t i = begin; i < begin + half && first + i < head_dim; ++i) {
        const float difference = group.read(image[t * images::stride + i]) - centre[first + i];
        sum += difference * difference;
      }
      group.write(memory.squares[item], sum);
    });
    group.sync();
  }
  group.for_each(token_tile, [&](index_t t) {
    const float squares = group.read(memory.squares[t]) + group.read(memory.squares[token_tile + t]);
    group.write(memory.reach[t], in.bounds.stretch[cell] * std::sqrt(squares + lost_squares(head_dim)));
  });
  group.sync();
}

/// The largest eigenvalues of the heads' Gram matrices in the executor's memory; null: the metric is the identity.
struct metric_spectrum {
  const float* largest = nullptr;
  index_t stride = 0;  ///< from one head to the next
};

/// Per query head: the mean c of its outputs, how far their images lie from that of c, and the stretch of its metric.
/// Blocks: [batch, query_heads].
template <cached T>
struct bound_distances {
  static constexpr int threads = 128;
  struct shared {
    float centre[most_channels];
    float image[most_channels];
    collective_memory<double, threads> collective;
  };

  attention_problem<T> problem;
  metric_source metric;
  metric_spectrum spectrum;
  output_states outputs;
  index_t cells_of_head;
  distance_bounds bounds;

  [[nodiscard]] index_t blocks() const noexcept { return problem.batch * problem.query_heads; }

  template <class Group>
  RESTKV_HD void operator()(Group& group, shared& memory, index_t block) const {
    const index_t head_dim = problem.head_dim;
    const index_t head = block % problem.query_heads;
    if (problem.past_of(problem.span(block / problem.query_heads, head / problem.group())) <= 0) return;
    const index_t first = block * cells_of_head;
    group.for_each(head_dim, [&](index_t c) {
      float sum = 0;
      for (index_t i = 0; i < cells_of_head; ++i) sum += outputs.whole[(first + i) * head_dim + c];
      const float mean = sum / static_cast<float>(cells_of_head);
      group.write(memory.centre[c], mean);
      group.write(bounds.centre[block * head_dim + c], mean);
    });
    group.sync();
    map_vector(group, metric, head, memory.centre, head_dim,
               [&](int, index_t r, float x) { group.write(memory.image[r], x); });
    const double size =
        root_of_squares(group, memory, head_dim, [&](index_t c) { return group.read(memory.centre[c]); });
    double norm = 1;
    if (metric.factor != nullptr) {
      norm = root_of_squares(group, memory, head_dim * head_dim,
                             [&](index_t i) { return metric.at(head, i / head_dim, i % head_dim); });
    }
    const auto slack = static_cast<double>(bound_slack(head_dim));
    const auto lost = static_cast<double>(lost_squares(head_dim));
    group.for_each(cells_of_head, [&](index_t i) {
      const float* const image = outputs.image + (first + i) * head_dim;
      float squares = 0;
      for (index_t r = 0; r < head_dim; ++r) {
        const float difference = image[r] - group.read(memory.image[r]);
        squares += difference * difference;
      }
      const double radius = std::sqrt(static_cast<double>(squares) + lost) + std::sqrt(lost) + 2 * slack * norm * size;
      group.write(bounds.radius[first + i], static_cast<float>(radius * (1 + 2 * slack)));
    });
    group.for_each(1, [&](index_t) {
      group.write(bounds.stretch[block], static_cast<float>((largest(head, norm) + slack * norm) * (1 + 2 * slack)));
    });
  }

 private:
  /// The largest singular value: from the eigenvalue, where that is a normal number.
  [[nodiscard]] RESTKV_HD double largest(index_t head, double norm) const noexcept {
    if (spectrum.largest == nullptr) return norm;
    const float eigenvalue = spectrum.largest[head * spectrum.stride];
    return eigenvalue >= 1e-30f ? std::sqrt(static_cast<double>(eigenvalue)) : norm;
  }
  /// Ends phases; every thread gets it.
  template <class Group, class At>
  [[nodiscard]] RESTKV_HD static double root_of_squares(Group& group, shared& memory, index_t count, const At& at) {
    auto mine = group.template locals<double, 1>();
    group.for_each_thread([&](int t) {
      mine(t)[0] = 0;
      for (index_t i = t; i < count; i += threads) {
        const auto x = static_cast<double>(at(i));
        mine(t)[0] += x * x;
      }
    });
    return std::sqrt(group.reduce(
        mine, [](double x, double y) { return x + y; }, memory.collective));
  }
};

}  // namespace restkv::kernel
