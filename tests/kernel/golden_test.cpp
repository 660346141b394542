// SPDX-License-Identifier: Apache-2.0
// Selections by the kernels, run on the host, against published implementations' results: ReST-KV's release, SnapKV, Ada-KV,
// CAOTE.
#include "golden/golden_case.hpp"

#include <restkv/backend/host/backend.hpp>

using namespace restkv;
using namespace restkv_test;

static_assert(bulk_backend<host_kernel_backend>);

TEST_CASE("ReST-KV's release by kernels") { check_release<host_kernel_backend>(); }

TEST_CASE("CAOTE by kernels") { check_caote<host_kernel_backend>(); }

TEST_CASE("SnapKV by kernels") { check_snap_kv<host_kernel_backend>(); }

TEST_CASE("Ada-KV's head lengths by kernels") { check_ada_kv<host_kernel_backend>(); }
