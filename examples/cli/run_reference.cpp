// SPDX-License-Identifier: Apache-2.0
#include "run_policy.hpp"

#include <restkv/reference/backend.hpp>

#include <nlohmann/json.hpp>

#include <cmath>

namespace restkv::cli {

namespace {

/// The reference, which does not compute the same scores twice.
class remembering_reference : public reference_backend {
 public:
  explicit remembering_reference(std::vector<double>& scores) : scores_(scores) {}

  template <class Request, element T>
  status token_scores(const Request& request, const layer_view<T>& layer, scratch<Request>& scratch,
                      tensor_view<double, 3> out) {
    if (scores_.empty()) {
      RESTKV_RETURN_IF_FAILED(reference_backend::token_scores(request, layer, scratch, out));
      scores_.assign(out.data, out.data + out.size());
    } else {
      std::copy(scores_.begin(), scores_.end(), out.data);
    }
    return {};
  }

 private:
  std::vector<double>& scores_;
};
static_assert(tensor_backend<remembering_reference>);

/// The keys that token scores depend on. Smoothing over tokens and budgets come later.
std::string scoring_part(const configuration& c) {
  nlohmann::json keys = to_json(c);
  for (const char* key : {"spatial", "kernel", "scale", "shift_rule", "budget", "compression_ratio", "allocation",
                          "floor", "normalize", "beta", "layer_count", "n_sink", "recent"}) {
    keys.erase(key);
  }
  return keys.dump();
}

/// rest_kv times what its rounding depends on.
struct rounding_score : rest_kv {
  double unit = 0;  ///< relative error of a

  template <std::floating_point Real>
  [[nodiscard]] Real operator()(const token_features<Real>& token) const noexcept {
    return rest_kv::operator()(token) * static_cast<Real>(unit) * (1 + token.odds);
  }
};

}  // namespace

selection run_reference(const configuration& c, const layer_view<float>& layer, score_memory& memory,
                        const std::string& where) {
  remembering_reference backend(memory[scoring_part(c)]);
  return run_policy(backend, c, layer, where);
}

selection rounding_of_release(const configuration& c, const layer_view<float>& layer, const std::string& where) {
  const double unit = 0x1p-24 * std::sqrt(static_cast<double>(layer.key.extent(2)));
  reference_backend backend;
  return run_score(backend, c, rounding_score{rest_kv_of(c), unit}, layer, where);
}

}  // namespace restkv::cli
