// SPDX-License-Identifier: Apache-2.0
// The score kernels over 16-bit caches, whose products are made as tensor cores make them.
#include "kernel/attention_support.hpp"

using namespace restkv_test;
using namespace restkv;

TEST_CASE("kernels: scores of 16-bit caches are the reference's") {
  check_scores<restkv::half>(rest_kv{}, temporal_of, 1000, 40);
  check_scores<bfloat16>(rest_kv{}, temporal_of, 1100, 40);
}

TEST_CASE("kernels: a 16-bit token that holds nearly all of the attention keeps its exact score") {
  check_sinks<restkv::half>();
  check_sinks<bfloat16>();
}
