// SPDX-License-Identifier: Apache-2.0
// The verifier on the GPU for tests that are compiled without nvcc: layer and kept set are copied to the device, and
// the tables back.
#pragma once

#include <restkv/selection/kept_tokens.hpp>
#include <restkv/verify/output_errors.hpp>

namespace restkv_test {

/// What `output_error` finds on the device; `in_graph`: captured in a CUDA graph and replayed twice. The kept set's
/// tensors are dense. A status of `errc::device_failure` where there is no device.
[[nodiscard]] restkv::status errors_on_device(const restkv::layer_view<restkv::bfloat16>& layer,
                                              const restkv::const_kept_tokens& kept, restkv::index_t queries,
                                              bool in_graph, restkv::output_errors& errors);

}  // namespace restkv_test
