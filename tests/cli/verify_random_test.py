#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of `restkv verify --backend --random`: verify_random_test.py PROGRAM TEST_DATA_FOLDER"""
import json
import pathlib
import sys
import unittest

from case_files import ProgramTest

PROGRAM, TEST_DATA = sys.argv[1:]
ProgramTest.program = PROGRAM
CASE = pathlib.Path(TEST_DATA) / 'golden' / 'caote-0.safetensors'


class RandomTest(ProgramTest):
    def verify(self, *arguments):
        done = self.run_program('verify', *arguments, '--json')
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return json.loads(done.stdout)

    def test_generated_problems(self):
        first = self.verify('--random', 16, '--seed', 3)
        self.assertEqual(first['files'], [])
        self.assertEqual([entry['policy'] for entry in first['random']], ['standard', 'snapkv', 'released'])
        for entry in first['random']:
            self.assertEqual((entry['backend'], entry['outcome'], entry['cases']), ('eigen', 'ok', 16))
            self.assertGreater(entry['values_compared'], 1000)
            self.assertGreater(entry['sets_compared'], 16)
            self.assertLess(entry['largest_part_of_bound'], 1)
        self.assertEqual(first, self.verify('--random', 16, '--seed', 3, '--threads', 1))
        self.assertNotEqual(first, self.verify('--random', 16, '--seed', 4))

    def test_other_backends(self):
        for name in ('thrust-cpp', 'thrust-omp', 'host-kernels'):
            with self.subTest(name):
                done = self.run_program('verify', '--random', 24, '--seed', 5, '--backend', name, '--json')
                if 'built without it' in done.stderr:
                    self.skipTest(f'{name}: the program was built without it')
                self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
                for entry in json.loads(done.stdout)['random']:
                    self.assertEqual((entry['backend'], entry['outcome'], entry['cases']), (name, 'ok', 24))
                    self.assertGreater(entry['values_compared'], 1000)

    def test_devices(self):
        for name in ('cuda', 'thrust-cuda'):
            with self.subTest(name):
                done = self.run_program('verify', '--random', 24, '--seed', 5, '--backend', name)
                if done.returncode == 0:
                    self.assertEqual(done.stdout.count(f'24 random problems  {name}, '), 3)
                    self.assertNotIn('MISMATCH', done.stdout)
                elif 'built without it' in done.stderr:
                    self.check_failure(done, f'--backend {name}')
                else:
                    self.check_failure(done, f'--backend {name}', 'CUDA error', 'cudaError')
                self.check_failure(self.run_program('verify', CASE, '--backend', name), f'--backend {name}')

    def test_text(self):
        done = self.run_program('verify', CASE, '--backend', 'eigen', '--random', 3)
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        self.assertIn('3 random problems  eigen, released', done.stdout)
        self.assertTrue(done.stdout.startswith('ok ') and 'reference' not in done.stdout.splitlines()[0])

    def test_backends(self):
        self.assertEqual(set(self.verify(CASE, '--backend', 'reference')['files'][0]['largest_error']), {'reference'})
        self.assertEqual(set(self.verify(CASE)['files'][0]['largest_error']), {'eigen', 'reference'})
        self.assertLessEqual({'eigen', 'reference'}, set(self.verify(CASE, '--backend', 'all')['files'][0]['largest_error']))

    def test_what_is_not_there(self):
        self.check_failure(self.run_program('verify', '--backend', 'foo', CASE), 'foo', 'no such backend', 'eigen, reference')
        self.check_failure(self.run_program('verify'), 'nothing to verify', '--random')
        self.check_failure(self.run_program('verify', '--random', 0), '--random')
        self.check_failure(self.run_program('verify', '--random', 2, '--backend', 'reference'), 'with itself')


if __name__ == '__main__':
    unittest.main(argv=sys.argv[:1])
