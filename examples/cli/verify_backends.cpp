// SPDX-License-Identifier: Apache-2.0
#include "verify_backends.hpp"

#include "command.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>

namespace restkv::cli {

namespace {

selection select_on_eigen(const backend_request& r) { return run_eigen(r.c, r.layer, r.threads, r.where, r.what); }
selection select_on_reference(const backend_request& r) { return run_reference(r.c, r.layer, r.memory, r.where); }

template <backend_kind Backend>
window_errors errors_of_kind(const selection& given, const backend_request& r) {
  return errors_of(given, r.layer, r.c, Backend, r.threads, r.where);
}

// A backend without `select` takes part in generated problems only: its parts are instantiated for a few policies, not
// for everything that a file may ask for.
constexpr std::array backends{
    verified_backend{"eigen", select_on_eigen, errors_of_kind<backend_kind::eigen>, random_on_eigen, true},
    verified_backend{"reference", select_on_reference, errors_of_kind<backend_kind::reference>, nullptr, false},
#if defined(RESTKV_CLI_THRUST)
    verified_backend{"thrust-cpp", select_on_thrust_cpp, errors_on_thrust_cpp, random_on_thrust_cpp, false},
#endif
#if defined(RESTKV_CLI_THRUST) && !defined(RESTKV_CLI_THRUST_OMP_FILES)
    verified_backend{"thrust-omp", nullptr, nullptr, random_on_thrust_omp, false},
#endif
#if defined(RESTKV_CLI_THRUST_OMP_FILES)
    verified_backend{"thrust-omp", select_on_thrust_omp, errors_on_thrust_omp, random_on_thrust_omp, false},
#endif
#if defined(RESTKV_CLI_HOST_KERNELS)
    verified_backend{"host-kernels", nullptr, nullptr, random_on_host_kernels, false},
#endif
#if defined(RESTKV_CLI_CUDA)
    verified_backend{"cuda", nullptr, nullptr, random_on_cuda, false},
    verified_backend{"thrust-cuda", nullptr, nullptr, random_on_thrust_cuda, false},
#endif
};

}  // namespace

std::span<const verified_backend> verified_backends() { return backends; }

std::vector<const verified_backend*> find_backends(const std::string& name) {
  std::vector<const verified_backend*> found;
  std::string all;
  for (const verified_backend& backend : backends) {
    const bool usual = backend.name == "eigen" || backend.name == "reference";
    if (name == backend.name || name == "all" || (name.empty() && usual)) found.push_back(&backend);
    all += fmt::format("{}, ", backend.name);
  }
  if (!found.empty()) return found;
  constexpr std::array others{"thrust-cpp", "thrust-omp", "host-kernels", "cuda", "thrust-cuda"};
  const bool is_known = std::find(others.begin(), others.end(), name) != others.end();
  throw input_error(fmt::format("--backend {}: {}; there are {}all", name,
                                is_known ? "this program was built without it" : "there is no such backend", all));
}

}  // namespace restkv::cli
