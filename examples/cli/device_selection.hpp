// SPDX-License-Identifier: Apache-2.0
/// @file
/// A device's selections for code that is compiled without nvcc and has its layers on the host.
#pragma once

#include <restkv/select.hpp>

namespace restkv::cli {

/// Whose kernels.
enum class device_library {
  own,     ///< cuda_backend
  thrust,  ///< thrust_backend<thrust_cuda>
};

/// Fails with CUDA's error where there is no device.
[[nodiscard]] status find_device();

///@{
/// `make_plan` and `select` on the device: what is selected is copied there and back, the kept set to `space`, which is
/// as large as planned. Defined for the policies of random_policies.hpp (device_selection.cuh).
template <device_library Library, class Policy>
[[nodiscard]] status plan_on_device(const Policy& policy, const problem_shape& shape, plan<Policy>& made);
template <device_library Library, class Policy, element T>
[[nodiscard]] status select_on_device(const plan<Policy>& plan, const layer_view<T>& layer, workspace space,
                                      kept_tokens& kept, const selection_details<float>* details);
///@}

/// A backend of the host whose `make_plan` and `select` are the two above. Scores alone are refused, so that nobody
/// takes the host's selection for the device's.
template <device_library Library>
class device_selector {
 public:
  using score_type = float;

  template <class Body>
  void parallel_for(index_t n, const Body& body) const {
    for (index_t i = 0; i < n; ++i) body(i);
  }
  template <class Request>
  struct scratch {
    scratch(const device_selector&, const Request&, workspace&) noexcept {}
    [[nodiscard]] tensor_view<double, 2> drift() const noexcept { return {}; }
  };
  template <class Request, element T>
  [[nodiscard]] status token_scores(const Request&, const layer_view<T>&, scratch<Request>&,
                                    tensor_view<float, 3>) const {
    return status::error(errc::unsupported, "a device_selector has scores by `select` only");
  }
  template <class Request, element T>
  [[nodiscard]] status window_drift(const Request&, const layer_view<T>&, std::span<const index_t>, scratch<Request>&,
                                    tensor_view<double, 2>) const {
    return status::error(errc::unsupported, "a device_selector has the drift by `select` only");
  }
};

template <device_library Library, class Policy>
[[nodiscard]] status make_plan(const device_selector<Library>&, const Policy& policy, const problem_shape& shape,
                               plan<Policy>& made) {
  return plan_on_device<Library>(policy, shape, made);
}

template <device_library Library, class Policy, element T>
[[nodiscard]] status select(device_selector<Library>&, const plan<Policy>& plan, const layer_view<T>& layer,
                            workspace space, kept_tokens& kept, const selection_details<float>* details) {
  return select_on_device<Library>(plan, layer, space, kept, details);
}

}  // namespace restkv::cli
