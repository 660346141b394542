# SPDX-License-Identifier: Apache-2.0
"""Pass@k over several programs for the same problem."""

from __future__ import annotations

from math import comb


def pass_at_k(programs: int, passed: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k programs passes, of which `passed` of `programs` did.

    Raises ValueError unless 0 <= passed <= programs and 1 <= k <= programs.
    """
    if not 0 <= passed <= programs or not 1 <= k <= programs:
        raise ValueError(f"of {programs} programs {passed} passed, and k is {k}")
    return 1.0 - comb(programs - passed, k) / comb(programs, k)
