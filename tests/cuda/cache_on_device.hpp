// SPDX-License-Identifier: Apache-2.0
// Compaction on the GPU for tests that are compiled without nvcc.
#pragma once

#include <restkv/selection/kept_tokens.hpp>

#include <cstdint>
#include <vector>

namespace restkv_test {

/// What came back from the device.
struct compacted {
  restkv::status result;
  std::vector<std::uint16_t> key;     ///< dense [batch, heads, capacity, head_dim], ragged [total, head_dim], or the cache
  std::vector<std::uint16_t> value;   ///< likewise
  std::vector<std::int64_t> offsets;  ///< ragged only
};

enum class compaction { dense, ragged, in_place };

/// Compacts caches of 16-bit elements [batch, kv_heads, tokens, head_dim].
[[nodiscard]] compacted compact_on_device(compaction how, const restkv::const_kept_tokens& kept,
                                          const restkv::tensor_view<const std::uint16_t, 4>& key,
                                          const restkv::tensor_view<const std::uint16_t, 4>& value);

/// True where a GPU can be used.
[[nodiscard]] bool has_device();

}  // namespace restkv_test
