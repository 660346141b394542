// SPDX-License-Identifier: Apache-2.0
// Selections from quantised caches on the GPU for tests that are compiled without nvcc: queries and codes are copied to
// the device, and what is kept is copied back.
#pragma once

#include <restkv/cache/quantised_view.hpp>
#include <restkv/core/layer.hpp>
#include <restkv/policy.hpp>
#include <restkv/score/vatp.hpp>

#include <vector>

namespace restkv_test {

/// Looks at keys and values.
using quantised_policy = restkv::eviction_policy<restkv::vatp, restkv::mean, restkv::no_pool, restkv::uniform>;

/// What each head of each sequence keeps.
using kept_rows = std::vector<std::vector<restkv::position_t>>;

/// Selects on the device by the layer's own keys and values, which are the numbers of the codes, and by the codes. A
/// status of `errc::device_failure` where there is no device. The caches' tensors are dense.
[[nodiscard]] restkv::status select_quantised_on_device(const quantised_policy& policy,
                                                        const restkv::layer_view<restkv::bfloat16>& layer,
                                                        const restkv::quantised_view<const float>& key,
                                                        const restkv::quantised_view<const float>& value,
                                                        kept_rows& by_numbers, kept_rows& by_codes);

}  // namespace restkv_test
