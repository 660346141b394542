// SPDX-License-Identifier: Apache-2.0
/// @file
/// `compare_token_scores`: a backend's scores, or a kernel's, before they are smoothed over tokens.
#pragma once

#include <restkv/backend/backend.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/verify/parity/layer_data.hpp>
#include <restkv/verify/parity/run_cases.hpp>
#include <restkv/verify/parity/score_bounds.hpp>
#include <restkv/verify/parity/suspects.hpp>
#include <restkv/verify/parity/takes_elements.hpp>

#include <concepts>
#include <string>
#include <vector>

namespace restkv::parity {

/// What a kernel that scores tokens is given. See `tensor_backend::token_scores` for what it is to compute.
template <element T, class Request>
struct score_call {
  const Request& request;          ///< score, temporal reduction, window, group reduction, shape
  const layer_view<T>& layer;      ///< on the host; any strides
  tensor_view<float, 3> scores{};  ///< [batch, heads, tokens], to be filled below `request.past_of(length)`
};

/// A policy whose window and budget are those of a problem, as far as they can be.
template <class Policy>
[[nodiscard]] Policy fit_policy(Policy policy, const problem& p) {
  if constexpr (needs_window<decltype(policy.score)>()) {
    policy.window = std::max<index_t>(1, p.window);
    if (policy.window > most_window && !needs_attention_alone<decltype(policy.score)>()) policy.window = most_window;
  }
  if constexpr (requires { policy.budget.budget = budget_size(1); }) {
    if (policy.budget.budget.ratio == 0)
      policy.budget.budget = budget_size(p.k + policy.recent() + policy.protect.sink);
  }
  return policy;
}

namespace detail {

template <class Request>
struct score_calls {
  template <element T>
  using call = score_call<T, Request>;
};

/// Multiply-adds of scoring and of its bounds, about.
[[nodiscard]] inline problem_space layer_space(index_t window, bool needs_values, bool needs_metric) {
  problem_space space;
  space.has_heads = true;
  space.has_queries = true;
  space.usual_window = std::min<index_t>(window, 64);
  space.work = [=](const problem& p) {
    const auto d = static_cast<double>(p.head_dim);
    const double of_token = needs_metric ? d * d * 2 + 8 * d : needs_values ? 12 * d : 2 * d;
    return static_cast<double>(p.batch * p.query_heads() * p.window * p.tokens) * (of_token + 64);
  };
  return space;
}

/// The scores of one backend in double, NaN where they are not defined. [batch, heads, tokens]
template <class Backend, class Request, element T>
[[nodiscard]] status run_token_scores(Backend& backend, const Request& request, const layer_view<T>& layer,
                                      std::vector<double>& out) {
  using real = typename Backend::score_type;
  using scratch_t = typename Backend::template scratch<Request>;
  workspace counting;
  { const scratch_t unused(backend, request, counting); }
  RESTKV_RETURN_IF_FAILED(counting.check());
  std::vector<std::byte> memory(counting.required_bytes(), std::byte{0xff});
  workspace space(memory.data(), memory.size());
  scratch_t scratch(backend, request, space);
  const std::array<index_t, 3> extents{request.shape.batch, request.heads(), request.shape.tokens};
  std::vector<real> scores(static_cast<std::size_t>(extents[0] * extents[1] * extents[2]),
                           std::numeric_limits<real>::quiet_NaN());
  RESTKV_RETURN_IF_FAILED(backend.token_scores(request, layer, scratch, tensor_view<real, 3>(scores.data(), extents)));
  out.assign(scores.begin(), scores.end());
  return {};
}

template <class Mine, class Request, element T>
[[nodiscard]] status run_scores_of(Mine& mine, const Request& request, const layer_view<T>& layer,
                                   std::vector<double>& out) {
  if constexpr (tensor_backend<std::remove_cvref_t<Mine>>) {
    return run_token_scores(mine, request, layer, out);
  } else {
    const std::array<index_t, 3> extents{request.shape.batch, request.heads(), request.shape.tokens};
    std::vector<float> scores(static_cast<std::size_t>(extents[0] * extents[1] * extents[2]),
                              std::numeric_limits<float>::quiet_NaN());
    const score_call<T, Request> call{request, layer, {scores.data(), extents}};
    status outcome;
    if constexpr (std::convertible_to<decltype(mine(call)), status>) {
      outcome = mine(call);
    } else {
      mine(call);
    }
    out.assign(scores.begin(), scores.end());
    return outcome;
  }
}

/// The bounds of a request's scores by the arithmetic of both sides.
template <class Request, element T>
[[nodiscard]] bounded_scores bounds_of(const Request& request, const layer_view<T>& layer, const arithmetic& unit,
                                       const std::vector<double>& scores) {
  if constexpr (head_score<std::remove_cvref_t<decltype(request.score)>>) {
    return bound_scores(
        request, layer, unit,
        tensor_view<const double, 3>(scores.data(), {request.shape.batch, request.heads(), request.shape.tokens}));
  } else {
    (void)scores;
    return bound_scores(request, layer, unit);
  }
}

/// What a side computes in: what the options say, else its scores' type. A callable's scores are float.
template <class Side>
[[nodiscard]] arithmetic arithmetic_of(const options& how) {
  arithmetic unit;
  if constexpr (tensor_backend<std::remove_cvref_t<Side>>) {
    unit = arithmetic::of<typename std::remove_cvref_t<Side>::score_type>();
  } else {
    unit.keeps_least_rest = false;
  }
  if (how.unit_roundoff > 0) unit.unit = how.unit_roundoff;
  return unit;
}

/// Compares numbers with their bounds; what differs first, or nothing. `name` is what they are.
template <class Request, element T>
[[nodiscard]] std::string compare_scores(const char* name, const Request& request, const layer_view<T>& layer,
                                         const std::vector<double>& expected, const std::vector<double>& errors,
                                         const std::vector<double>& given, tally& counts) {
  const index_t heads = request.heads();
  for (index_t b = 0; b < request.shape.batch; ++b) {
    for (index_t row = 0; row < heads; ++row) {
      const index_t past = request.past_of(sequence(layer, b, row * request.shape.kv_heads / heads).length);
      for (index_t n = 0; n < past; ++n) {
        const auto at = static_cast<std::size_t>((b * heads + row) * request.shape.tokens + n);
        if (!std::isfinite(expected[at]) || !(errors[at] <= std::numeric_limits<float>::max())) {
          ++counts.values_unbounded;
          continue;
        }
        ++counts.values_compared;
        const double difference = std::fabs(given[at] - expected[at]);
        if (difference <= errors[at]) {
          if (errors[at] > 0) counts.largest_part = std::max(counts.largest_part, difference / errors[at]);
          continue;
        }
        char text[320];
        std::snprintf(
            text, sizeof text,
            "%s of token %lld of %lld, row %lld of %lld, sequence %lld is %.9g instead of %.9g: the difference is "
            "%.3g, rounding allows %.3g",
            name, static_cast<long long>(n), static_cast<long long>(past), static_cast<long long>(row),
            static_cast<long long>(heads), static_cast<long long>(b), given[at], expected[at], difference, errors[at]);
        return text;
      }
    }
  }
  return {};
}

}  // namespace detail

/// Compares scores before spatial smoothing: of two backends, or of a backend and a kernel `mine(const score_call<T,
/// Request>&)`, for T = float, half, bfloat16 as far as it can be called; it may return a status. Element types that
/// are named, `compare_token_scores<restkv::half>(...)`, are the only ones then, which also saves compile time.
///
/// Layers are generated (`layer_data`); the policy's window and budget become the problem's. Scores must agree within
/// what rounding in the arithmetic of both sides may do (`bound_scores`, `options.unit_roundoff`); where that is not
/// finite, nothing is said. A kernel need not know of `least_rest`; a backend must. Where they do not agree, a few
/// usual mistakes are tried on the reference, and one that explains what `mine` gives is named.
template <element... Elements, class Reference, class Mine, class Policy>
requires tensor_backend<std::remove_cvref_t<Reference>>
[[nodiscard]] report compare_token_scores(Reference&& reference, Mine&& mine, const Policy& policy,
                                          const options& how = {}) {
  using request_t = score_request_of<Policy>;
  using score_t = std::remove_cvref_t<decltype(policy.score)>;
  using kernel = detail::takes_elements<std::remove_reference_t<Mine>, detail::score_calls<request_t>, Elements...>;
  problem_space space = detail::layer_space(needs_window<score_t>() ? policy.window : 1, needs_values<score_t>(),
                                            needs_metric(policy.score));
  space.types = kernel::types;
  static_assert(
      kernel::any,
      "a kernel of token scores is a backend, or is called with a score_call<T, Request>");
  const arithmetic of_reference = detail::arithmetic_of<Reference>(options{});
  const arithmetic of_mine = detail::arithmetic_of<Mine>(how);
  return run_cases("token scores", space, how, [&](const problem& p, tally& counts, bool explain) -> std::string {
    return with_element<kernel::template of>(p.type, [&]<class T>(std::type_identity<T>) -> std::string {
      const layer_data<T> data(p);
      const layer_view<T>& layer = data.view();
      const Policy fitted = fit_policy(policy, p);
      const request_t request = make_score_request(fitted, shape_of(layer));
      std::vector<double> expected, given;
      const status left = detail::run_token_scores(reference, request, layer, expected);
      const status right = detail::run_scores_of(mine, request, layer, given);
      if (!left.ok() && !right.ok()) {
        ++counts.refused;
        return {};
      }
      if (left.ok() != right.ok()) {
        return std::string(left.ok() ? "refused: " : "not refused, but by the reference: ") +
               (left.ok() ? right : left).message();
      }
      bounded_scores bounds = detail::bounds_of(request, layer, of_mine, expected);
      if (of_reference.unit > 0x1p-40) {
        const bounded_scores more = detail::bounds_of(request, layer, of_reference, expected);
        for (std::size_t i = 0; i < bounds.error.size(); ++i) bounds.error[i] += more.error[i];
      }
      std::string wrong = detail::compare_scores("score", request, layer, expected, bounds.error, given, counts);
      if (!wrong.empty() && explain) wrong += detail::explain_scores(request, layer, expected, given, bounds.error);
      return wrong;
    });
  });
}

}  // namespace restkv::parity
