# SPDX-License-Identifier: Apache-2.0
"""KV-cache eviction: which tokens of a layer's cache to keep, and what that costs.

    policy = restkv.policy('standard', budget=256)
    kept = restkv.select(policy, query, key, value, metric=restkv.Metric(o_proj.weight, query_heads))
    key, value = restkv.compact(kept, key, value)

Arrays are PyTorch's, NumPy's or of any library that speaks DLPack; they are read where they lie.
"""

from . import _restkv
from ._layers import select_layers
from ._restkv import (
    Error,
    Kept,
    Metric,
    ModelSelection,
    OutputErrors,
    Policy,
    Session,
    __version__,
    compact,
    default_threads,
    output_error,
    policies,
    policy,
    select,
)

try:
    from . import _restkv_cuda  # type: ignore[attr-defined]
except ImportError:  # built without CUDA
    pass
else:
    _restkv._use_devices(_restkv_cuda.library)

__all__ = [
    "Error",
    "Kept",
    "Metric",
    "ModelSelection",
    "OutputErrors",
    "Policy",
    "Session",
    "__version__",
    "compact",
    "default_threads",
    "output_error",
    "policies",
    "policy",
    "select",
    "select_layers",
]
