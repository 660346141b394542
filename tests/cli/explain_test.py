#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of `restkv explain`: explain_test.py PROGRAM TEST_DATA_FOLDER EXAMPLE_DATA_FOLDER"""
import json
import math
import pathlib
import sys
import unittest

from case_files import ProgramTest, read

PROGRAM, TEST_DATA, EXAMPLE_DATA = sys.argv[1:]
ProgramTest.program = PROGRAM
GOLDEN = pathlib.Path(TEST_DATA) / 'golden'
KV_HEADS = GOLDEN / 'snapkv-kvhead-0.safetensors'  # 4 query heads on 2 KV heads, 160 tokens, window 8, budget 32
CAOTE = GOLDEN / 'caote-0.safetensors'


class Explain(ProgramTest):
    def explain(self, path, head, token, *options):
        done = self.run_program('explain', path, '--head', head, '--token', token, *options, '--json')
        self.assertEqual((done.returncode, done.stderr), (0, ''), done.stderr)
        return json.loads(done.stdout)

    def test_it_says_what_the_selection_did(self):
        for options in ((), ('--unit', 4), ('--sink', 3), ('--allocation', 'adakv'), ('--method', 'h2o'),
                        ('--method', 'tova'), ('--method', 'knorm'), ('--unit', 3, '--unit-reduce', 'max')):
            out = self.select(KV_HEADS, *options)
            indices = out['indices'].rows()
            past = out['score'].shape[1]
            ranks = {}
            for token in (0, 1, 2, 5, 17, 50, 51, 80, 100, 120, 151, 152, 159):
                with self.subTest(options=options, token=token):
                    said = self.explain(KV_HEADS, 1, token, *options)
                    self.assertEqual(said['kept'], token >= past or token in indices[1])
                    self.assertEqual(said['head_length'], out['head_lengths'].elements[1])
                    if token >= past:
                        self.assertEqual((said['protected_as'], said['score'], said['rank']), ('recent', None, None))
                        continue
                    self.assertAlmostEqual(said['score'], out['score'].rows()[1][token], delta=1e-6)
                    self.assertAlmostEqual(said['smoothed'], out['smoothed'].rows()[1][token], delta=1e-6)
                    if said['rank'] is None:
                        self.assertTrue(said['kept'])
                        continue
                    ranks[said['rank']] = said['unit_score']
                    self.assertEqual(said['kept'], said['rank'] <= said['chosen'])
                    self.assertGreaterEqual(said['last_kept']['score'], said['first_dropped']['score'])
                    if said['kept']:
                        self.assertGreaterEqual(said['unit_score'], said['last_kept']['score'])
                    else:
                        self.assertLessEqual(said['unit_score'], said['first_dropped']['score'])
            self.assertEqual([ranks[rank] for rank in sorted(ranks)], sorted(ranks.values(), reverse=True))

    def test_features_by_their_definitions(self):
        case = read(CAOTE)
        heads, tokens, channels = case['q'].shape[0], case['k'].shape[1], case['k'].shape[2]
        window = case.case()['window']
        q, k, v = (case[name].rows() for name in ('q', 'k', 'v'))
        for head, token in ((0, 3), (3, 150), (2, 155)):
            kv = head * case['k'].shape[0] // heads
            keys, values = (rows[kv * tokens:(kv + 1) * tokens] for rows in (k, v))
            sums = [0.0, 0.0, 0.0]
            observers = [t for t in range(tokens - window, tokens) if t >= token]
            for t in observers:
                logits = [sum(a * b for a, b in zip(q[head * tokens + t], keys[n])) / math.sqrt(channels)
                          for n in range(t + 1)]
                shares = [math.exp(z - max(logits)) for z in logits]
                total = sum(shares)
                shares = [share / total for share in shares]
                output = [sum(share * values[n][c] for n, share in enumerate(shares)) for c in range(channels)]
                for i, x in enumerate((shares[token], shares[token] / (1 - shares[token]),
                                       math.dist(output, values[token]))):
                    sums[i] += x / len(observers)
            (said,) = self.explain(CAOTE, head, token, '--budget', 40)['observed']
            self.assertEqual(said['query_head'], head)
            for key, wanted in zip(('attention', 'odds', 'distance'), sums):
                self.assertAlmostEqual(said[key], wanted, delta=1e-9 * max(1, wanted), msg=key)

    def test_text(self):
        done = self.run_program('explain', KV_HEADS, '--head', 0, '--token', 5)
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        said = self.explain(KV_HEADS, 0, 5)
        self.assertIn(f"rank {said['rank']} of 152 candidates, of which 24 are kept", done.stdout)
        for word in ('attention', 'query head 1', 'smoothed', 'last kept', 'first dropped'):
            self.assertIn(word, done.stdout)
        trace = pathlib.Path(EXAMPLE_DATA) / 'trace-2k.safetensors'
        done = self.run_program('explain', trace, '--layer', 10, '--head', 0, '--token', 0, '--preset', 'critical_kv',
                                '--budget', 384)
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        self.assertRegex(done.stdout, r'(kept|dropped): rank \d+ of 2016 candidates, of which 352 are kept')
        self.assertIn('criticalkv, token 0 of kv head 0', done.stdout)

    def test_what_does_not_exist(self):
        self.check_failure(self.run_program('explain', KV_HEADS, '--head', 2, '--token', 0), 'head 2', 'has 2')
        self.check_failure(self.run_program('explain', KV_HEADS, '--head', 0, '--token', 160), 'token 160', '160')
        self.check_failure(self.run_program('explain', KV_HEADS, '--head', 0), '--token')
        self.check_failure(self.run_program('explain', GOLDEN / 'set-error-0.safetensors', '--head', 0, '--token', 0),
                           'set_error')
        self.check_failure(self.run_program('explain', KV_HEADS, '--head', 0, '--token', 0, '--allocation', 'global'),
                           'over the layers of a model')


if __name__ == '__main__':
    unittest.main(argv=sys.argv[:1])
