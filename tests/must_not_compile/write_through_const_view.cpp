// SPDX-License-Identifier: Apache-2.0
// expect-gcc: assignment of read-only location
// expect-clang: cannot assign to return value because function .* returns a const value
// A view of const elements cannot be written through.
#include <restkv/core/tensor_view.hpp>

#ifdef RESTKV_CONTROL
using element = float;
#else
using element = const float;
#endif

void write(restkv::tensor_view<element, 2> view) { view(0, 0) = 1.0f; }
