# SPDX-License-Identifier: Apache-2.0
"""Efficiency benchmarks: memory, time to the first token, and decoding speed with full and with evicted caches."""

import sys
from pathlib import Path

# The quality benchmarks' loader of models, text and files of results serve here too.
_QUALITY = str(Path(__file__).resolve().parents[2] / "quality")
if _QUALITY not in sys.path:
    sys.path.append(_QUALITY)
