// SPDX-License-Identifier: Apache-2.0
// Compaction and running scores on the GPU for tests that are compiled without nvcc.
#pragma once

#include "cuda/decode_loop.hpp"

#include <restkv/cache/paged_layout.hpp>
#include <restkv/selection/kept_tokens.hpp>

#include <cstdint>
#include <span>
#include <vector>

namespace restkv_test {

/// What came back from the device.
struct compacted {
  restkv::status result;
  /// dense [batch, heads, capacity, head_dim], ragged [batch * heads * capacity, head_dim], the pages, or the cache
  std::vector<std::uint16_t> key;
  std::vector<std::uint16_t> value;         ///< likewise
  std::vector<std::int64_t> offsets;        ///< ragged only
  std::vector<restkv::position_t> lengths;  ///< of tables, where there are any
};

enum class compaction { dense, ragged, paged, in_place, in_pages };

struct compaction_options {
  restkv::const_page_tables tables{};  ///< of the output, or in_pages of the cache
  restkv::index_t pages = 0;           ///< of the output's pools
  restkv::index_t page_size = 1;
  std::span<const double> frequencies{};  ///< keys are bfloat16 and turned to their slots; none: they are not turned
};

/// Compacts caches of 16-bit elements [batch, kv_heads, tokens, head_dim]; in_pages, pools [pages, 1, page_size,
/// head_dim]. What is not written holds 0xabcd.
[[nodiscard]] compacted compact_on_device(compaction how, const restkv::const_kept_tokens& kept,
                                          const restkv::tensor_view<const std::uint16_t, 4>& key,
                                          const restkv::tensor_view<const std::uint16_t, 4>& value,
                                          const compaction_options& options = {});

/// `decode_loop` in device memory.
[[nodiscard]] decoded decode_on_device(const decode_policy& policy, const restkv::problem_shape& shape,
                                       const decode_input& input);

/// True where a GPU can be used.
[[nodiscard]] bool has_device();

}  // namespace restkv_test
