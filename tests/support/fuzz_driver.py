#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs a libFuzzer program for a short while on a copy of its seeds, so that the source tree stays as it is.

An input that fails is kept next to the program as <program>-crash-<hash>; running the program with that file repeats it.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--corpus", help="folder of seeds; may be missing")
    parser.add_argument("program")
    args = parser.parse_args()

    program = os.path.realpath(args.program)
    with tempfile.TemporaryDirectory() as folder:
        if args.corpus and os.path.isdir(args.corpus):
            for seed in pathlib.Path(args.corpus).iterdir():
                shutil.copy(seed, folder)
        # A fixed seed: two runs on one machine try the same inputs, as far as the time allows. libFuzzer's own exit
        # status for a failure is 77, which Meson would take for a skipped test.
        command = [program, f"-max_total_time={args.seconds}", "-timeout=10", "-seed=1", "-print_final_stats=1",
                   "-error_exitcode=1", f"-artifact_prefix={program}-", folder]
        return 0 if subprocess.run(command, stdin=subprocess.DEVNULL).returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
