// SPDX-License-Identifier: Apache-2.0
/// @file
/// The attention layer of a problem, with its memory.
#pragma once

#include <restkv/core/cholesky.hpp>
#include <restkv/core/layer.hpp>
#include <restkv/verify/parity/arranged.hpp>
#include <restkv/verify/parity/numbers.hpp>

#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

namespace restkv::parity {

/// A layer as a policy sees it. What does not belong to it is NaN: gaps of strided tensors, the padding of sequences.
/// There are up to two more queries than the window has. Not copyable: the view points into it.
///
/// The output projection of head h is W[h] = diag(sqrt(lambda)) (I - 2 u u^T), u a unit vector of the head's own and
/// lambda falling from 4 to 0.04, so that its metric is known without an eigendecomposition.
template <element T>
class layer_data {
 public:
  /// Draws the numbers of a problem and lays them out as it says.
  explicit layer_data(const problem& p)
      : query_(p.order, {p.batch, p.query_heads(), p.window + static_cast<index_t>(p.seed % 3), p.head_dim}, poison()),
        key_(p.order, {p.batch, p.kv_heads, p.tokens, p.head_dim}, poison()),
        value_(p.order, {p.batch, p.kv_heads, p.tokens, p.head_dim}, poison()) {
    for (index_t b = 0; b < p.batch; ++b) lengths_.push_back(static_cast<std::int32_t>(p.length_of(b)));
    view_.query = query_.read();
    view_.key = key_.read();
    view_.value = value_.read();
    if (p.lengths != sequence_lengths::whole) {
      if (lengths_.empty()) lengths_.resize(1);  // a pointer that is not null
      view_.lengths = {lengths_.data(), {p.batch}};
      view_.pad = p.lengths == sequence_lengths::left_padded ? padding::left : padding::right;
    }
    fill(p, tensor_name::query, query_);
    fill(p, tensor_name::key, key_);
    fill(p, tensor_name::value, value_);
    make_metric(p);
  }
  layer_data(const layer_data&) = delete;
  layer_data& operator=(const layer_data&) = delete;

  /// Valid as long as this object lives.
  [[nodiscard]] const layer_view<T>& view() const noexcept { return view_; }

 private:
  [[nodiscard]] static T poison() noexcept { return narrow<T>(std::numeric_limits<float>::quiet_NaN()); }

  void fill(const problem& p, tensor_name name, const arranged_tensor<T>& tensor) {
    tensor.for_each([&](index_t b, index_t h, index_t n, index_t c, T& element) {
      // Tokens are counted from the beginning of their sequence, so that padding does not change a sequence.
      index_t token = n;
      if (name != tensor_name::query) {
        const sequence_span span = sequence(view_, b, 0);
        if (n < span.begin || n >= span.begin + span.length) return;
        token -= span.begin;
      }
      element = narrow<T>(static_cast<float>(element_of_layer(p, name, b, h, token, c)));
    });
  }

  void make_metric(const problem& p) {
    const index_t d = p.head_dim;
    const index_t heads = p.query_heads();
    projection_.assign(static_cast<std::size_t>(d * heads * d), T{});
    gram_.resize(static_cast<std::size_t>(heads * d * d));
    factor_.assign(gram_.size(), 0.0f);
    spectrum_.resize(static_cast<std::size_t>(heads * d));
    std::vector<double> axis(static_cast<std::size_t>(d));
    std::vector<double> image(static_cast<std::size_t>(d * d));  // W[h]
    std::vector<double> factor(static_cast<std::size_t>(d * d));
    for (index_t h = 0; h < heads; ++h) {
      double squares = 0;
      for (index_t c = 0; c < d; ++c) {
        axis[static_cast<std::size_t>(c)] = 0.1 + std::fabs(detail::normal_of(counter_bits(p.seed, 0xa715, h, c)));
        squares += axis[static_cast<std::size_t>(c)] * axis[static_cast<std::size_t>(c)];
      }
      for (index_t r = 0; r < d; ++r) {
        const double lambda =
            4.0 * std::pow(0.01, static_cast<double>(r) / static_cast<double>(std::max<index_t>(1, d - 1)));
        spectrum_[static_cast<std::size_t>(h * d + r)] = static_cast<float>(lambda);
        for (index_t c = 0; c < d; ++c) {
          const double mirrored = (r == c ? 1.0 : 0.0) -
                                  2 * axis[static_cast<std::size_t>(r)] * axis[static_cast<std::size_t>(c)] / squares;
          image[static_cast<std::size_t>(r * d + c)] = std::sqrt(lambda) * mirrored;
          projection_[static_cast<std::size_t>((r * heads + h) * d + c)] =
              narrow<T>(static_cast<float>(std::sqrt(lambda) * mirrored));
        }
      }
      for (index_t i = 0; i < d; ++i) {
        for (index_t j = 0; j <= i; ++j) {
          double sum = 0;
          for (index_t r = 0; r < d; ++r) {
            sum += image[static_cast<std::size_t>(r * d + i)] * image[static_cast<std::size_t>(r * d + j)];
          }
          gram_[static_cast<std::size_t>((h * d + i) * d + j)] = sum;
          gram_[static_cast<std::size_t>((h * d + j) * d + i)] = sum;
          factor[static_cast<std::size_t>(i * d + j)] = sum;
        }
      }
      cholesky_factor(factor.data(), d, 1e-12);
      for (index_t i = 0; i < d; ++i) {
        for (index_t j = 0; j <= i; ++j) {
          factor_[static_cast<std::size_t>((h * d + i) * d + j)] =
              static_cast<float>(factor[static_cast<std::size_t>(i * d + j)]);
        }
      }
    }
    view_.projection = {projection_.data(), {d, heads * d}};
    view_.metric = {{gram_.data(), {heads, d, d}}, {factor_.data(), {heads, d, d}}, {spectrum_.data(), {heads, d}}};
  }

  arranged_tensor<T> query_;
  arranged_tensor<T> key_;
  arranged_tensor<T> value_;
  std::vector<std::int32_t> lengths_;
  std::vector<T> projection_;    // [head_dim, query_heads * head_dim]
  std::vector<double> gram_;     // [query_heads, head_dim, head_dim]
  std::vector<float> factor_;    // [query_heads, head_dim, head_dim]
  std::vector<float> spectrum_;  // [query_heads, head_dim]
  layer_view<T> view_{};
};

/// Calls use(std::type_identity<T>) with the element type of a problem, if `Accepts<T>` holds, and returns what it
/// returns.
template <template <class> class Accepts, class Use>
[[nodiscard]] std::string with_element(element_type type, const Use& use) {
  if constexpr (Accepts<half>::value) {
    if (type == element_type::float16) return use(std::type_identity<half>{});
  }
  if constexpr (Accepts<bfloat16>::value) {
    if (type == element_type::bfloat16) return use(std::type_identity<bfloat16>{});
  }
  if constexpr (Accepts<float>::value) {
    if (type == element_type::float32) return use(std::type_identity<float>{});
  }
  return {};
}

}  // namespace restkv::parity
