// SPDX-License-Identifier: Apache-2.0
// expect: satisf.*has_window_drift[\s\S]*backend.window_drift\(
// A backend provides every primitive, or policies would work on one backend and not on another.
#include <restkv/select.hpp>

struct zero_backend {
  using score_type = float;

  template <class Request>
  struct scratch {
    scratch(const zero_backend&, const Request&, restkv::workspace&) {}
    restkv::tensor_view<double, 2> drift() const { return {}; }
  };

  template <class Body>
  void parallel_for(restkv::index_t n, const Body& body) const {
    for (restkv::index_t i = 0; i < n; ++i) body(i);
  }
  template <class Request, class T>
  restkv::status token_scores(const Request&, const restkv::layer_view<T>&, scratch<Request>&,
                              restkv::tensor_view<float, 3>) const {
    return {};
  }
#ifdef RESTKV_CONTROL
  template <class Request, class T>
  restkv::status window_drift(const Request&, const restkv::layer_view<T>&, std::span<const restkv::index_t>,
                              scratch<Request>&, restkv::tensor_view<double, 2>) const {
    return {};
  }
#endif
};

restkv::status make(const zero_backend& backend, restkv::plan<restkv::eviction_policy<>>& plan) {
  return restkv::make_plan(backend, restkv::eviction_policy<>{}, restkv::problem_shape{}, plan);
}
