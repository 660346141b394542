// SPDX-License-Identifier: Apache-2.0
// Checks a kernel of one's own against the reference: verify_my_kernel [CASES [SEED]].
//
// What is not said below comes from the library: the problems, the right answers, how far rounding may move them, and
// the smallest problem that shows a difference. The kernel is SnapKV's score; any other score works the same way.
#include "my_kernel.h"
#include "on_device.hpp"

#include <restkv/smoothing/spatial.hpp>
#include <restkv/verify/parity/token_scores.hpp>

#include <cstdio>
#include <cstdlib>

namespace {

/// From the library's call to the kernel's. `call.layer` is on the host.
restkv::status run_kernel(const auto& call) {
  const auto& shape = call.request.shape;
  const auto key = call.layer.key.chunk(0);
  const on_device query_copy(call.layer.query);
  const on_device key_copy(key);
  const on_device scores_copy(call.scores);
  my_attention problem{};
  problem.query = query_copy.data();
  problem.rows = call.layer.query.extent(2);
  problem.key = key_copy.data();
  for (std::size_t axis = 0; axis < 3; ++axis) {
    problem.query_strides[axis] = call.layer.query.stride(axis);
    problem.key_strides[axis] = key.stride(axis);
  }
  problem.batch = shape.batch;
  problem.query_heads = shape.query_heads;
  problem.kv_heads = shape.kv_heads;
  problem.head_dim = shape.head_dim;
  problem.tokens = shape.tokens;
  problem.window = call.request.window_of(shape.tokens);
  problem.scores = scores_copy.data();
  const bool failed = query_copy.failed() || key_copy.failed() || scores_copy.failed();
  if (const int error = failed ? -1 : my_attention_scores(&problem); error != 0) {
    return restkv::status::error(restkv::errc::unsupported, "the kernel failed with error %d", error);
  }
  scores_copy.copy_to(call.scores);
  return {};
}

}  // namespace

int main(int count, char** arguments) {
  if (!has_device()) {
    std::puts("there is no CUDA device: the kernel was compiled, and is not run");
    return 77;
  }
  restkv::parity::options options;
  if (count > 1) options.cases = std::strtoll(arguments[1], nullptr, 10);
  if (count > 2) options.seed = std::strtoull(arguments[2], nullptr, 10);
  // What the kernel does not claim to do: padding, and numbers that are not finite.
  options.accepts = [](const restkv::parity::problem& p) {
    return p.lengths == restkv::parity::sequence_lengths::whole && p.values != restkv::parity::distribution::non_finite;
  };
  const restkv::eviction_policy<restkv::snap_kv, restkv::mean, restkv::no_pool> policy{
      .window = 16, .group = restkv::group_reduce::none};

  restkv::reference_backend reference;
  const auto report = restkv::parity::compare_token_scores<float>(
      reference, [](const auto& call) { return run_kernel(call); }, policy, options);
  std::puts(report.text());
  return report ? 0 : 1;
}
