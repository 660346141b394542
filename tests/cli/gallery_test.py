#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of `restkv gallery`, of the page that it writes and of its figure: gallery_test.py PROGRAM GALLERY FIGURE
TEST_DATA_FOLDER"""
import json
import pathlib
import re
import subprocess
import sys
import unittest

PROGRAM, GALLERY, FIGURE, TEST_DATA = sys.argv[1:]
GOLDEN = sorted(map(str, (pathlib.Path(TEST_DATA) / 'golden').glob('*.safetensors')))


def run(*arguments):
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, check=False)


class Gallery(unittest.TestCase):
    def test_the_page_is_what_the_program_writes(self):
        done = run('gallery', *GOLDEN)
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        page = pathlib.Path(GALLERY).read_text(encoding='utf-8')
        self.assertEqual(page.splitlines(), done.stdout.splitlines(),
                         'write it again: restkv gallery tests/data/golden/*.safetensors > docs/gallery.md')

    def test_every_policy_has_everything(self):
        listed = json.loads(run('compare', '--list-policies', '--json').stdout)['policies']
        policies = json.loads(run('gallery', *GOLDEN, '--json').stdout)['policies']
        self.assertEqual([policy['name'] for policy in policies], [policy['name'] for policy in listed])
        for policy in policies:
            for key in ('description', 'group', 'formula', 'source', 'cost', 'needs', 'goes_with'):
                self.assertTrue(policy[key], (policy['name'], key))
        known = {policy['configuration']['method']: policy['known_results'] for policy in policies}
        self.assertEqual(known['restkv'], 32)
        self.assertEqual(known['h2o'], 6)
        self.assertEqual(known['random'], 0)

    def test_the_figure_shows_the_policies_of_the_table(self):
        listed = json.loads(run('compare', '--list-policies', '--json').stdout)['policies']
        svg = pathlib.Path(FIGURE).read_text(encoding='utf-8')
        shown = re.findall(r'>([a-z0-9_]+_?[a-z0-9_]*)</text>', svg)
        names = [policy['name'] for policy in listed if policy['group'] != 'full']
        self.assertEqual([text for text in shown if text in names], names, 'draw it again: see docs/figures/kept.py')

    def test_files_that_are_no_cases(self):
        done = run('gallery', GALLERY)
        self.assertEqual((done.returncode, done.stdout), (2, ''))


if __name__ == '__main__':
    unittest.main(argv=sys.argv[:1])
