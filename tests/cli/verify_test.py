#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of `restkv verify`: verify_test.py PROGRAM TEST_DATA_FOLDER EXAMPLE_DATA_FOLDER quick|thorough"""
import json
import math
import os
import pathlib
import random
import sys
import unittest

from case_files import File, ProgramTest, Tensor, read

PROGRAM, TEST_DATA, EXAMPLE_DATA, EXTENT = sys.argv[1:]
ProgramTest.program = PROGRAM
GOLDEN = pathlib.Path(TEST_DATA) / 'golden'
TRACES = pathlib.Path(TEST_DATA) / 'traces'
ADAPTIVE = GOLDEN / 'restkv-16-before-wo-ema-adaptive.safetensors'
MAX_POOL = GOLDEN / 'restkv-06-after-wo-mean-maxpool.safetensors'


class VerifyTest(ProgramTest):
    def verify(self, *arguments):
        """The JSON of a run, and its exit status."""
        done = self.run_program('verify', *arguments, '--json')
        self.assertIn(done.returncode, (0, 1, 2), done.stderr)
        self.assertEqual(done.stderr, '')
        return json.loads(done.stdout), done.returncode

    def check_outcome(self, file, outcome, *words, name='case.safetensors', options=()):
        path = self.write(file, name)
        result, status = self.verify(path, *options)
        text = json.dumps(result, indent=1)
        self.assertEqual(result['files'][0]['outcome'], outcome, text)
        self.assertEqual(status, {'ok': 0, 'mismatch': 1, 'unusable': 2}[outcome])
        for word in words:
            self.assertIn(str(word), text)
        return result['files'][0]


class Cases(VerifyTest):
    def test_all_known_results(self):
        paths = sorted(GOLDEN.glob('*.safetensors'))
        self.assertGreaterEqual(len(paths), 98)
        done = self.run_program('verify', *paths)
        lines = done.stdout.splitlines()
        self.assertEqual((done.returncode, done.stderr), (0, ''), done.stdout)
        self.assertEqual(len(lines), len(paths) + 1)
        for path, line in zip(paths, lines):
            self.assertTrue(line.startswith('ok ') and str(path) in line, line)
        self.assertEqual(lines[-1], f'{len(paths)} ok, 0 with a mismatch, 0 unusable')
        result, status = self.verify(*paths)
        self.assertEqual((status, result['ok'], result['mismatched'], result['unusable']), (0, len(paths), 0, 0))
        for file in result['files']:
            known = {name for name in read(file['file']).names() if name.startswith('expected.')} - {'expected.keep'}
            self.assertEqual({'expected.' + name for name in file['compared']}, known, file['file'])
            has_floats = known & {'expected.score', 'expected.smoothed', 'expected.value_error'}
            if has_floats and file['method'] != 'streamingllm':  # whose scores are marks
                for backend in ('eigen', 'reference'):
                    if file['method'] != 'lagkv':  # ranks in chunks of 32 are exact
                        self.assertLess(0, file['largest_error'][backend], file['file'])
                    self.assertLessEqual(file['largest_error'][backend], 1e-4, file['file'])

    def test_every_known_tensor_is_really_compared(self):
        changes = {  # element, and what is added to it
            ADAPTIVE: {'score': (300, 0.01), 'smoothed': (500, 0.01), 'kernel': (1, 2), 'shift': (2, -1),
                       'drift': (3, 0.25), 'indices': (2, 1)},
            GOLDEN / 'adakv-floor20-norm-1.safetensors': {'head_lengths': (3, 1)},
            GOLDEN / 'caote-0.safetensors': {'score': (17, 0.1)},
            GOLDEN / 'snapkv-kvhead-0.safetensors': {'smoothed': (17, 0.01)},
            GOLDEN / 'h2o-sum-1.safetensors': {'score': (200, 0.1)},
            GOLDEN / 'tova-1.safetensors': {'score': (30, 0.01)},
            GOLDEN / 'criticalkv-50-0.safetensors': {'score': (0, 0.1)},
            GOLDEN / 'lagkv-0.safetensors': {'score': (17, 1 / 32)},
            GOLDEN / 'curdkv-2.safetensors': {'score': (17, 0.01)},
            GOLDEN / 'set-error-0.safetensors': {'value_error': (3, 0.01), 'output_error_per_head': (9, 0.01),
                                                 'output_error_layer': (7, 0.01)}}
        for path, tensors in changes.items():
            for name, (element, change) in tensors.items():
                with self.subTest(path=path.name, name=name):
                    case = read(path)
                    case['expected.' + name].elements[element] += change
                    file = self.check_outcome(case, 'mismatch', f'expected.{name}')
                    self.assertEqual({text.split(':')[0] for text in file['mismatches']}, {'eigen', 'reference'})
                    done = self.run_program('verify', self.folder / 'case.safetensors')
                    self.assertEqual(done.returncode, 1)
                    self.assertTrue(done.stdout.startswith('MISMATCH') and done.stdout.count('\n') == 1, done.stdout)

    def test_changed_inputs_and_configurations_are_noticed(self):
        for name in ('q', 'k', 'v', 'wo'):
            case = read(ADAPTIVE)
            for element in range(50):
                case[name].elements[element] += 1
            self.check_outcome(case, 'mismatch')
        for keys in ({'alpha': 0.4}, {'order': 'after'}, {'use_wo': False}, {'scale': 7}, {'kernel': 7},
                     {'window': 14}):
            case = read(ADAPTIVE)
            case.set_case(**keys)
            self.assertNotEqual(self.verify(self.write(case))[1], 0, keys)
        case = read(GOLDEN / 'set-error-0.safetensors')
        keep = case['expected.keep'].elements
        keep[keep.index(1)] = 0
        self.check_outcome(case, 'mismatch')

    def test_keys_that_do_not_act_may_hold_anything(self):
        case = read(GOLDEN / 'restkv-23-before-wo-mean-none.safetensors')
        case.set_case(scale=0, kernel=-4, alpha=7, floor=-1, beta=0)
        self.check_outcome(case, 'ok')
        case['expected.kernel'] = Tensor('I32', [4], [5, 5, 5, 5])
        self.check_outcome(case, 'mismatch', 'expected.kernel')

    def test_a_number_that_is_not_one_never_passes(self):
        for name in ('score', 'smoothed', 'drift'):
            for value in (math.nan, math.inf):
                case = read(ADAPTIVE)
                case['expected.' + name].elements[2] = value
                self.check_outcome(case, 'mismatch', f'expected.{name}')

    def test_markers_in_the_place_of_scores(self):
        most = max(read(GOLDEN / 'criticalkv-80-0.safetensors')['expected.score'].elements)
        for name, element, value in (('criticalkv-80-0', 0, most), ('curdkv-0', 2, 0.9)):
            case = read(GOLDEN / f'{name}.safetensors')
            self.assertNotEqual(case['expected.score'].elements[element], value)
            case['expected.score'].elements[element] = value
            self.check_outcome(case, 'mismatch', 'expected.score: token', 'whatever the others are')
        case = read(GOLDEN / 'criticalkv-80-0.safetensors')
        scores = case['expected.score'].elements
        scores[scores.index(most)] = 0.5
        self.check_outcome(case, 'mismatch', 'the file says that it is ranked')
        # The source's first stage is a part of a budget before rounding, here one token more.
        file = self.check_outcome(read(GOLDEN / 'criticalkv-80-1.safetensors'), 'ok', 'first stage of 93 tokens')
        self.assertEqual(len(file['notes']), 1)

    def test_the_newest_token_of_tova_may_be_missing_and_no_other(self):
        case = read(GOLDEN / 'tova-0.safetensors')
        rows = [row[:-1] for row in case['expected.score'].rows()]
        case['expected.score'] = Tensor('F32', [2, 158], [x for row in rows for x in row])
        self.check_outcome(case, 'mismatch', 'has 158 columns, 159 were computed')

    def test_tolerance(self):
        case = read(ADAPTIVE)
        case['expected.score'].elements[5] += 5e-4 * max(case['expected.score'].rows()[0])
        self.check_outcome(case, 'mismatch')
        self.check_outcome(case, 'ok', options=('--tolerance', 1e-3))

    def exchange(self, case, wanted):
        """Exchanges a kept token of a row for a dropped one with wanted(kept score, dropped score); False if none."""
        smoothed, indices = case['expected.smoothed'].rows(), case['expected.indices']
        width = indices.shape[1]
        for head, kept in enumerate(indices.rows()):
            for slot, token in enumerate(kept):
                for other, score in enumerate(smoothed[head]):
                    if other not in kept and wanted(smoothed[head][token], score):
                        indices.elements[head * width + slot] = other
                        return True
        return False

    def test_tokens_that_tie_may_be_exchanged_and_no_others(self):
        case = read(MAX_POOL)
        self.assertTrue(self.exchange(case, lambda kept, dropped: kept == dropped))
        self.check_outcome(case, 'ok')
        case = read(MAX_POOL)
        self.assertTrue(self.exchange(case, lambda kept, dropped: dropped < 0.999 * kept))
        self.check_outcome(case, 'mismatch', 'expected.indices', 'differs in')
        case = read(MAX_POOL)
        self.assertTrue(self.exchange(case, lambda kept, dropped: kept == dropped))
        case.metadata['margin'] = '0.01'  # the file says that nothing ties
        self.check_outcome(case, 'mismatch', 'expected.indices')

    def test_repeated_and_impossible_positions(self):
        for position in (-1, 10**6, 303):
            case = read(MAX_POOL)
            case['expected.indices'].elements[3] = position
            self.check_outcome(case, 'mismatch', 'expected.indices', 'leaves')
        case = read(MAX_POOL)
        case['expected.indices'].elements[3] = case['expected.indices'].elements[4]
        self.check_outcome(case, 'mismatch', 'expected.indices', 'repeats')

    def test_known_tensors_of_another_shape(self):
        def reshaped(name, shape):
            case = read(ADAPTIVE)
            tensor = case['expected.' + name]
            count = math.prod(shape)
            case['expected.' + name] = Tensor(tensor.dtype, shape, (tensor.elements * count)[:count])
            return case

        for name, shape in (('score', [3, 241]), ('score', [964]), ('smoothed', [1, 4, 241]), ('kernel', [3]),
                            ('kernel', [4, 5]), ('drift', [4, 5]), ('shift', [0]), ('indices', [4])):
            self.check_outcome(reshaped(name, shape), 'unusable', f'expected.{name}')
        for name, shape in (('score', [4, 240]), ('score', [4, 0]), ('indices', [4, 2]), ('indices', [4, 0])):
            self.check_outcome(reshaped(name, shape), 'mismatch', f'expected.{name}')
        case = read(ADAPTIVE)
        case['expected.kernel'].dtype = 'F32'
        self.check_outcome(case, 'unusable', 'expected.kernel is F32', 'whole-number')

    def test_files_that_cannot_be_compared(self):
        case = read(ADAPTIVE)
        case.tensors = {name: tensor for name, tensor in case.tensors.items() if not name.startswith('expected.')}
        self.check_outcome(case, 'unusable', 'expected.*')
        case = read(ADAPTIVE)
        case.metadata = {}
        self.check_outcome(case, 'unusable', 'no case file')
        case = read(ADAPTIVE)
        case.set_case(method='belady')
        self.check_outcome(case, 'unusable', 'belady', 'not supported')
        case = read(GOLDEN / 'set-error-0.safetensors')
        del case.tensors['wo']
        self.check_outcome(case, 'unusable', 'tensor wo')
        case = read(ADAPTIVE)
        case['k'].elements[0] = math.nan
        self.check_outcome(case, 'unusable', 'tensor k holds nan')

    def test_one_bad_file_does_not_hide_the_others(self):
        bad = self.folder / 'bad.safetensors'
        bad.write_bytes(ADAPTIVE.read_bytes()[:1000])
        wrong = read(ADAPTIVE)
        wrong['expected.kernel'].elements[0] += 2
        wrong = self.write(wrong, 'wrong.safetensors')
        done = self.run_program('verify', bad, ADAPTIVE)
        self.assertEqual(done.returncode, 2)
        self.assertEqual([line.split()[0] for line in done.stdout.splitlines()], ['UNUSABLE', 'ok', '1'])
        done = self.run_program('verify', bad, wrong, ADAPTIVE)
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stdout.splitlines()[-1], '1 ok, 1 with a mismatch, 1 unusable')

    def test_rounding_of_a_sink_is_told_from_a_wrong_score(self):
        # Token 0 draws nearly all attention. A release that computes a / (1 - a) in float cannot know its score better
        # than that; one that is off where attention is spread is wrong.
        source = random.Random(11)
        tokens, window, channels = 150, 8, 16

        def sink_case(logit):
            query = [1.0 + 0.1 * source.gauss(0, 1) for _ in range(window * channels)]
            key = [0.3 * source.gauss(0, 1) for _ in range(tokens * channels)]
            key[:channels] = [logit / math.sqrt(channels)] * channels
            value = [source.gauss(0, 1) for _ in range(tokens * channels)]
            case = File({'q': Tensor('F32', [1, window, channels], query),
                         'k': Tensor('F32', [1, tokens, channels], key),
                         'v': Tensor('F32', [1, tokens, channels], value)},
                        {'case': json.dumps({'method': 'caote', 'window': window})})
            score = self.select(self.write(case))['score']
            self.assertEqual(score.elements.index(max(score.elements)), 0)
            score.elements[0] *= 1 + 3e-4
            case['expected.score'] = score
            return case

        file = self.check_outcome(sink_case(12.5), 'ok', 'rounding')
        self.assertGreater(file['largest_error']['reference'], 1e-4)
        self.assertEqual(len(file['notes']), 2)
        self.check_outcome(sink_case(7.0), 'mismatch', 'expected.score')


def cut(trace, expected, layer, kv_heads, queried=3, budgets=None):
    """One layer of a trace and its known results, cut to some KV heads and the first query heads of each."""
    prefix = f'layers.{layer}.'
    group = trace[prefix + 'q'].shape[0] // trace[prefix + 'k'].shape[0]
    query_heads = [head * group + j for head in kv_heads for j in range(queried)]

    def rows_of(tensor, heads):
        width = len(tensor.elements) // tensor.shape[0]
        return Tensor(tensor.dtype, [len(heads), *tensor.shape[1:]],
                      (x for head in heads for x in tensor.elements[head * width:(head + 1) * width]))

    small = File({prefix + 'q': rows_of(trace[prefix + 'q'], query_heads)}, trace.metadata)
    for name in ('k', 'v'):
        small[prefix + name] = rows_of(trace[prefix + name], kv_heads)
    channels = trace[prefix + 'k'].shape[2]
    projection = trace[prefix + 'wo']
    small[prefix + 'wo'] = Tensor(projection.dtype, [projection.shape[0], len(query_heads) * channels],
                                  (x for row in projection.rows() for head in query_heads
                                   for x in row[head * channels:(head + 1) * channels]))
    known = File({}, expected.metadata)
    for name, tensor in expected.tensors.items():
        if name.startswith(prefix) and (budgets is None or '.budget' not in name or
                                        any(f'.budget{budget}.' in name for budget in budgets)):
            known[name] = rows_of(tensor, query_heads)
    return small, known


class Traces(VerifyTest):
    def small(self):
        trace = read(os.path.join(EXAMPLE_DATA, 'trace-2k.safetensors'))
        small, known = cut(trace, read(TRACES / 'trace-2k.expected.safetensors'), 10, [1], queried=1, budgets=[128])
        for name in list(known.names()):  # the order of the paper takes the reference long
            if '.before.' in name or '.scale2000.' in name:
                del known.tensors[name]
        self.write(small, 'small.safetensors')
        return small, known

    def check_trace(self, path, options=()):
        result, status = self.verify(path, *options)
        self.assertEqual(status, 0, json.dumps(result, indent=1))
        self.assertEqual(set(result['files'][0]['compared']), {'score', 'indices', 'kernel', 'shift', 'drift'})

    @unittest.skipIf(EXTENT == 'quick', 'takes the reference long')
    def test_layers_of_both_traces(self):
        trace = read(os.path.join(EXAMPLE_DATA, 'trace-2k.safetensors'))
        expected = read(TRACES / 'trace-2k.expected.safetensors')
        for layer, kv_head, queried in ((1, 0, 1), (10, 1, 1), (19, 2, 1), (28, 0, 3)):
            small, known = cut(trace, expected, layer, [kv_head], queried)
            self.write(small, f'{layer}.safetensors')
            self.check_trace(self.write(known, f'{layer}.expected.safetensors'))
        trace = read(TRACES / 'trace-8k-layer4.safetensors')
        small, known = cut(trace, read(TRACES / 'trace-8k-layer4.expected.safetensors'), 4, [2], queried=1)
        self.write(small, '8k.safetensors')
        self.check_trace(self.write(known, '8k.expected.safetensors'))

    def test_one_head_of_a_trace(self):
        _, known = self.small()
        self.check_trace(self.write(known, 'small.expected.safetensors'))
        apart = self.write(known, 'apart.safetensors')
        self.check_trace(apart, ('--trace', self.folder / 'small.safetensors'))
        self.assertIn('--trace', self.check_outcome(known, 'unusable', name='apart.safetensors')['error'])
        self.check_outcome(known, 'unusable', 'lost.safetensors', 'No such file', name='lost.expected.safetensors')

    def test_changed_results(self):
        _, known = self.small()
        run = 'layers.10.after.scale100'
        for tensor, element, change in ((run + '.score', 1000, 0.01), (run + '.budget128.kernel', 0, 2),
                                        (run + '.budget128.shift', 0, 1), (run + '.budget128.drift', 0, 0.5),
                                        (run + '.budget128.indices', 50, 2000)):
            changed = read(self.write(known, 'small.expected.safetensors'))
            changed[tensor].elements[element] += change
            self.check_outcome(changed, 'mismatch', tensor, name='small.expected.safetensors')

    def test_bad_results(self):
        _, known = self.small()
        name = 'small.expected.safetensors'

        def changed():
            return read(self.write(known, name))

        file = changed()
        file['layers.10.later.scale100.score'] = file['layers.10.after.scale100.score']
        self.check_outcome(file, 'unusable', 'layers.10.later.scale100.score', name=name)
        file = changed()
        file['layers.11.after.scale100.budget128.drift'] = file['layers.10.after.scale100.budget128.drift']
        self.check_outcome(file, 'unusable', 'layers.11.k', name=name)
        file = changed()
        file.metadata = {**file.metadata, 'config': '{"window": 32, "colour": 1}'}
        self.check_outcome(file, 'unusable', 'unknown key', 'colour', name=name)
        file = changed()
        file.metadata = {**file.metadata, 'figures': '[1'}
        self.check_outcome(file, 'unusable', 'figures', name=name)
        file = changed()
        file.tensors = {tensor: content for tensor, content in file.tensors.items() if tensor.endswith('.score')}
        self.check_outcome(file, 'unusable', 'nothing', name=name)


if __name__ == '__main__':
    unittest.main(argv=sys.argv[:1])
