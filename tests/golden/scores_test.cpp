// SPDX-License-Identifier: Apache-2.0
// Both backends against published implementations' results: ReST-KV's release, SnapKV, Ada-KV, CAOTE.
#include "golden/golden_case.hpp"

#include <restkv/backend/eigen/backend.hpp>
#include <restkv/reference/backend.hpp>

using namespace restkv;
using namespace restkv_test;

TEST_CASE("ReST-KV's release: scores, smoothed scores, drifts, widths, shifts and kept sets") {
  check_release<reference_backend, eigen_backend>();
}

TEST_CASE("CAOTE is rest_kv in the identity metric") { check_caote<reference_backend, eigen_backend>(); }

TEST_CASE("SnapKV at query heads and at KV heads") { check_snap_kv<reference_backend, eigen_backend>(); }

TEST_CASE("Ada-KV's head lengths") { check_ada_kv<reference_backend, eigen_backend>(); }
