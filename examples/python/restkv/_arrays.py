# SPDX-License-Identifier: Apache-2.0
"""What the module's functions take as arrays."""

from typing import Any, Protocol, TypeVar


class Array(Protocol):
    """An array of any library that speaks DLPack: NumPy, PyTorch, JAX, ..."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __dlpack_device__(self) -> Any: ...


ArrayT = TypeVar("ArrayT", bound=Array)
