// SPDX-License-Identifier: Apache-2.0
// A kernel backend whose scores a hash of the token's place makes: the same wherever its memory lies.
#pragma once

#include <restkv/backend/kernel_backend.hpp>

#include <cstdint>
#include <limits>
#include <span>

namespace restkv_test {

using namespace restkv;

/// Numbers that are no ordinary scores.
[[nodiscard]] RESTKV_HD inline float odd_number(std::uint64_t which) noexcept {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  switch (which) {
    case 0:
      return std::numeric_limits<float>::quiet_NaN();
    case 1:
      return -0.0f;
    case 2:
      return 1e-40f;
    case 3:
      return 1e30f;
    case 4:
      return infinity;
    case 5:
      return -infinity;
    default:
      return -1.0f;
  }
}

/// Scores of which few are different, so that they tie, and some that are none. For each of [batch, heads, tokens].
template <memory_space Space>
struct hash_scores {
  index_t layer;
  index_t kind;  ///< of the request
  int unusual;   ///< per cent of the scores that are no ordinary numbers
  tensor_view<float, 3, Space> out;

  RESTKV_HD void operator()(index_t item) const noexcept {
    const index_t n = item % out.extent(2);
    const index_t h = item / out.extent(2) % out.extent(1);
    const index_t b = item / out.extent(2) / out.extent(1);
    std::uint64_t x = 0x9e3779b97f4a7c15u;
    for (const index_t part : {layer, b, h, n, kind}) {
      x = (x ^ static_cast<std::uint64_t>(part)) * 0xbf58476d1ce4e5b9u;
      x ^= x >> 29;
    }
    const auto size = static_cast<float>(1 + layer % 3);
    out(b, h, n) =
        static_cast<int>(x % 100) < unusual ? odd_number(x / 128 % 7) : size * static_cast<float>(x / 128 % 7) / 8;
  }
};

template <class Executor>
class hashing_backend : public kernel_backend<Executor> {
 public:
  static constexpr memory_space space = Executor::space;

  hashing_backend(const Executor& executor, int unusual) : kernel_backend<Executor>(executor), unusual_(unusual) {}

  template <class Request>
  struct scratch {
    scratch(const hashing_backend&, const Request&, workspace&) noexcept {}
    [[nodiscard]] tensor_view<double, 2, space> drift() const noexcept { return {}; }
  };
  template <class Request, element T>
  [[nodiscard]] status token_scores(const Request& request, const layer_view<T, space>&, scratch<Request>&,
                                    tensor_view<float, 3, space> out) {
    const tensor_view<float, 3, space> rows(out.data, {out.extent(0), request.heads(), out.extent(2)}, out.strides);
    const auto kind = static_cast<index_t>(sizeof(Request));
    return this->for_each(rows.size(), hash_scores<space>{request.shape.layer, kind, unusual_, rows});
  }
  /// Never asked for: smoothers look at no drift.
  template <class Request, element T>
  [[nodiscard]] status window_drift(const Request&, const layer_view<T, space>&, std::span<const index_t>,
                                    scratch<Request>&, tensor_view<double, 2, space>) {
    return {};
  }

 private:
  int unusual_;
};

}  // namespace restkv_test
