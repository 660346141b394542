// SPDX-License-Identifier: Apache-2.0
// rest_kv on Thrust's sequential system against the reference: element types, orders, metrics, smoothers and layouts.
#include "thrust/score_support.hpp"

using namespace restkv;
using namespace restkv_test;

static_assert(bulk_backend<cpp_backend>);

TEST_CASE("rest_kv on Thrust scores as the reference") {
  CHECK(walk<float>(1, 120, rest_kv{}, arrange_order_and_metric) > 10000);
  CHECK(walk<restkv::half>(2, 40, rest_kv{}, arrange_order_and_metric) > 3000);
  CHECK(walk<bfloat16>(3, 40, rest_kv{}, arrange_order_and_metric) > 3000);
}
