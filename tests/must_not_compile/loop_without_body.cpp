// SPDX-License-Identifier: Apache-2.0
// expect: satisf.*takes_count_and_body[\s\S]*loop\(count, body\)
// A parallel loop is called with a count and what to do for each index.
#include <restkv/cache/gather.hpp>

struct counting_loop {
#ifdef RESTKV_CONTROL
  template <class Body>
  void operator()(restkv::index_t n, const Body& body) const {
    for (restkv::index_t i = 0; i < n; ++i) body(i);
  }
#else
  void operator()(restkv::index_t n) const { static_cast<void>(n); }
#endif
};

restkv::status gather(const restkv::const_kept_tokens& kept, restkv::tensor_view<const float, 4> cache,
                      restkv::tensor_view<float, 4> out) {
  return restkv::gather_tokens(kept, restkv::chunked_tensor_view<const float>(cache), restkv::dense_layout{out},
                               counting_loop{});
}
