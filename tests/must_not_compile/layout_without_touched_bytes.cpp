// SPDX-License-Identifier: Apache-2.0
// expect: satisf.*has_touched_bytes[\s\S]*layout.touched\(\)
// A cache layout must say which memory it writes, or aliasing could not be checked.
#include <restkv/compact.hpp>

struct one_head {
  using value_type = float;
  restkv::tensor_view<float, 2> tokens;

  restkv::index_t batch() const { return 1; }
  restkv::index_t heads() const { return 1; }
  restkv::index_t head_dim() const { return tokens.extent(1); }
  restkv::index_t capacity(restkv::index_t, restkv::index_t) const { return tokens.extent(0); }
  restkv::tensor_view<float, 1> row(restkv::index_t, restkv::index_t, restkv::index_t slot) const {
    return tokens[slot];
  }
#ifdef RESTKV_CONTROL
  restkv::byte_range touched() const { return restkv::touched_bytes(tokens); }
#endif
  restkv::status check() const { return {}; }
};

restkv::status gather(const restkv::const_kept_tokens& kept, restkv::tensor_view<const float, 4> cache,
                      const one_head& out) {
  return restkv::gather_tokens(kept, restkv::chunked_tensor_view<const float>(cache), out);
}
