#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A disk that fills up, and a program that is killed: the file of before stands, or the new one, whole:
interrupted_test.py PROGRAM TEST_DATA_FOLDER EXAMPLE_DATA_FOLDER"""
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time
import unittest

from case_files import ProgramTest, read

PROGRAM, TEST_DATA, EXAMPLE_DATA = sys.argv[1:]
ProgramTest.program = PROGRAM
CASE = pathlib.Path(TEST_DATA) / 'golden' / 'restkv-04-after-wo-mean-adaptive.safetensors'
TRACE = pathlib.Path(EXAMPLE_DATA) / 'trace-2k.safetensors'
BEFORE = b'what was there'


class InterruptedTest(ProgramTest):
    def names(self):
        return sorted(path.name for path in self.folder.iterdir())

    def run_limited(self, size, disposition, *arguments):
        """Runs the program with files of at most `size` bytes; a write that passes them fails, or ends the program."""

        def limit():
            signal.signal(signal.SIGXFSZ, disposition)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        return subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False,
                              preexec_fn=limit)

    def check_limited(self, output, sizes, *arguments):
        """With room for less than the file the program fails, and leaves what was there and nothing else."""
        for size in sizes:
            output.write_bytes(BEFORE)
            names = self.names()
            done = self.run_limited(size, signal.SIG_IGN, *arguments)
            self.check_failure(done, output, 'cannot write')
            self.assertEqual(output.read_bytes(), BEFORE)
            self.assertEqual(self.names(), names)
            done = self.run_limited(size, signal.SIG_DFL, *arguments)  # it may be ended in the middle of a write
            self.assertNotEqual(done.returncode, 0)
            self.assertEqual(output.read_bytes(), BEFORE)


class FullDisk(InterruptedTest):
    def test_a_result(self):
        whole = self.select(CASE)
        size = self.output.stat().st_size
        self.check_limited(self.output, (0, 1, 8, size // 2, size - 1), 'select', CASE, '-o', self.output)
        done = self.run_limited(size, signal.SIG_IGN, 'select', CASE, '-o', self.output)
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        self.assertEqual(read(self.output).names(), whole.names())

    def test_a_report_and_a_table(self):
        arguments = ('compare', TRACE, '-q', '--layers', '1', '--budgets', '64', '--policies', 'streaming_llm_kv_heads')
        for option in ('--report', '--out'):
            output = self.folder / 'result'
            self.check_limited(output, (100,), *arguments, option, output)


class Killed(InterruptedTest):
    def test_at_any_moment(self):
        took = float('inf')
        for _ in range(3):
            start = time.monotonic()
            self.select(CASE)
            took = min(took, time.monotonic() - start)
        after = self.output.read_bytes()
        source = random.Random(1)
        seen = {'nothing': 0, 'before': 0, 'after': 0, 'half a file beside it': 0}
        for trial in range(50):
            self.output.unlink(missing_ok=True)
            if trial % 2:
                self.output.write_bytes(BEFORE)
            with subprocess.Popen([PROGRAM, 'select', CASE, '-o', self.output], stdout=subprocess.DEVNULL) as running:
                if trial % 4 < 2:
                    time.sleep(source.uniform(0, 1.5 * took))
                else:  # while it writes
                    while running.poll() is None and len(self.names()) <= trial % 2:
                        pass
                    time.sleep(source.uniform(0, 0.0005))
                running.kill()
            content = self.output.read_bytes() if self.output.exists() else None
            self.assertIn(content, (after, BEFORE if trial % 2 else None))
            seen['nothing' if content is None else 'after' if content == after else 'before'] += 1
            seen['half a file beside it'] += any(path != self.output for path in self.folder.iterdir())
            for path in self.folder.iterdir():  # a temporary file may be left: its name is not that of the output
                if path != self.output:
                    path.unlink()
        print('killed 50 times; then there was:', seen)
        self.select(CASE)
        self.assertEqual(self.output.read_bytes(), after)


if __name__ == '__main__':
    unittest.main(argv=sys.argv[:1])
