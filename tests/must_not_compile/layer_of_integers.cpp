// SPDX-License-Identifier: Apache-2.0
// expect: satisf.*element[\s\S]*is_float_double_half_or_bfloat16<.*evaluated to
// Quantised caches have scales; a layer of bare integers would be read as if it had none.
#include <restkv/core/layer.hpp>

#ifdef RESTKV_CONTROL
using number = restkv::bfloat16;
#else
using number = signed char;
#endif

restkv::layer_view<number> layer{};
