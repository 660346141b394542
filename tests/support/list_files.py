#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Lists files for the build, and checks that a build still knows all of them.

list_files.py print ROOT PATTERN
    one path a line, relative to ROOT, sorted
list_files.py check ROOT PATTERN LISTED...
    fails when the files on disk are not exactly those LISTED: a new file needs a line in tests/meson.build, or,
    where the build collects the files itself, a reconfiguration
"""

import pathlib
import sys


def find(root, pattern):
    base = pathlib.Path(root)
    return sorted(path.relative_to(base).as_posix() for path in base.glob(pattern) if path.is_file())


def main():
    command, root, pattern, *listed = sys.argv[1:]
    found = find(root, pattern)
    if command == "print":
        print("\n".join(found))
        return 0
    new = sorted(set(found) - set(listed))
    gone = sorted(set(listed) - set(found))
    for path in new:
        print(f"{root}/{path} is not part of this build: list it, or run meson setup --reconfigure")
    for path in gone:
        print(f"{root}/{path} is listed and does not exist")
    return 1 if new or gone else 0


if __name__ == "__main__":
    sys.exit(main())
