# SPDX-License-Identifier: Apache-2.0
"""Leaves in a source package what the Python module is built from, and its tests."""

import os
import shutil
from pathlib import Path

ROOT = Path(os.environ["MESON_DIST_ROOT"])
FOLDERS = {"examples", "include", "kernels", "subprojects"}
EXAMPLES = {"cli", "python", "meson.build"}

for folder, kept in ((ROOT, FOLDERS), (ROOT / "examples", EXAMPLES)):
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name not in kept:
            shutil.rmtree(entry)
