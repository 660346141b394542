#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of `restkv select`: select_test.py PROGRAM TEST_DATA_FOLDER EXAMPLE_DATA_FOLDER"""
import json
import os
import pathlib
import random
import sys
import unittest

import case_files
from case_files import ProgramTest, Tensor, converted, read

PROGRAM, TEST_DATA, EXAMPLE_DATA = sys.argv[1:]
ProgramTest.program = PROGRAM
GOLDEN = pathlib.Path(TEST_DATA) / 'golden'
AFTER = GOLDEN / 'restkv-03-after-wo-ema-none.safetensors'
ADAPTIVE = GOLDEN / 'restkv-16-before-wo-ema-adaptive.safetensors'
KV_HEADS = GOLDEN / 'snapkv-kvhead-0.safetensors'
ADAKV = GOLDEN / 'adakv-floor20-norm-0.safetensors'


def golden(pattern):
    paths = sorted(GOLDEN.glob(pattern))
    assert paths, pattern
    return paths


class GoldenCases(ProgramTest):
    def check_rows(self, got, expected, name):
        self.assertEqual((got.dtype, got.shape), (expected.dtype, expected.shape), name)
        for row, (ours, known) in enumerate(zip(got.rows(), expected.rows())):
            limit = 1e-4 * max(map(abs, known))
            worst = max(abs(a - b) for a, b in zip(ours, known))
            self.assertLessEqual(worst, limit, f'{name}, row {row}')

    def check_indices(self, got, expected, smoothed, strict, name):
        self.assertEqual((got.dtype, got.shape), ('I32', expected.shape), name)
        for ours, known, score in zip(got.rows(), expected.rows(), smoothed.rows()):
            self.assertEqual(ours, sorted(set(ours)), name)
            if strict:
                self.assertEqual(ours, known, name)
                continue
            # Exact ties, made by pooling: the kept values are what must be equal.
            values = [sorted(score[n] for n in kept) for kept in (ours, known)]
            for a, b in zip(*values):
                self.assertAlmostEqual(a, b, delta=1e-4 * max(score), msg=name)

    def test_scores_kept_sets_and_windows_are_those_of_the_file(self):
        seen = set()
        for path in golden('restkv-*') + golden('caote-*') + golden('snapkv-*'):
            case = read(path)
            out = self.select(path)
            for name, expected in case.tensors.items():
                if not name.startswith('expected.'):
                    continue
                what = name.removeprefix('expected.')
                seen.add(what)
                label = f'{path.name} {what}'
                if what in ('score', 'smoothed'):
                    self.check_rows(out[what], expected, label)
                elif what == 'indices':
                    strict = float(case.metadata['margin']) > 1e-4
                    self.check_indices(out[what], expected, case['expected.smoothed'], strict, label)
                else:
                    self.assertEqual((out[what].dtype, out[what].shape, out[what].elements),
                                     (expected.dtype, expected.shape, expected.elements), label)
            if 'budget' in case.case():
                kept = min(case.case()['budget'], case['k'].shape[1])
                self.assertEqual(out['head_lengths'].elements, [kept] * out['score'].shape[0], path.name)
            self.assertEqual('drift' in out.names(), case.case().get('spatial') == 'adaptive', path.name)
        self.assertEqual(seen, {'score', 'smoothed', 'indices', 'kernel', 'shift', 'drift'})

    def test_adakv_divides_what_the_release_divides(self):
        # The release rounds each head on its own: computed here from the counts that a floor of 0 shows.
        for path in golden('adakv-*'):
            case = read(path)
            keys = case.case()
            window, base = keys['window'], keys['budget'] - keys['window']
            counts = [n - window for n in self.select(path, '--floor', 0)['head_lengths'].elements]
            self.assertEqual(sum(counts), base * len(counts), path.name)
            released = [round(n * (1 - keys['floor']) + int(base * keys['floor'])) + window for n in counts]
            self.assertEqual(released, case['expected.head_lengths'].elements, path.name)
            out = self.select(path)
            lengths = out['head_lengths'].elements
            self.assertEqual(sum(lengths), keys['budget'] * len(counts), path.name)
            for ours, theirs in zip(lengths, released):
                self.assertLessEqual(abs(ours - theirs), 1, path.name)
            for length, row in zip(lengths, out['indices'].rows()):
                kept = [n for n in row if n >= 0]
                self.assertEqual(len(kept) + window, length)
                self.assertEqual(row, kept + [-1] * (max(lengths) - length), 'padded at the end')

    def test_the_error_of_a_given_set(self):
        for path in golden('set-error-*'):
            case = read(path)
            out = self.select(path)
            for what in ('value_error', 'output_error_per_head', 'output_error_layer'):
                self.check_rows(out[what], case['expected.' + what], f'{path.name} {what}')
            kept = [sum(1 for mark in row if mark) for row in case['expected.keep'].rows()]
            self.assertEqual(out['head_lengths'].elements, kept)


class Configuration(ProgramTest):
    OVERRIDES = [('budget', 20, '--budget'), ('window', 5, '--window'), ('order', 'before', '--order'),
                 ('temporal', 'last', '--temporal'), ('temporal', 'max', '--temporal'),
                 ('unit', 2, '--unit'),
                 ('alpha', 0.9, '--alpha'), ('spatial', 'avgpool', '--spatial'), ('spatial', 'maxpool', '--spatial'),
                 ('kernel', 3, '--kernel'), ('tau', 0.5, '--tau'), ('group', 'l2', '--group'),
                 ('group', 'max', '--group'),
                 ('n_sink', 3, '--sink'), ('recent', 10, '--recent'), ('allocation', 'adakv', '--allocation'),
                 ('method', 'snapkv', '--method'), ('method', 'streamingllm', '--method'), ('use_norm', True, '--norm'),
                 ('use_wo', False, '--no-wo'), ('compression_ratio', 0.9, '--compression-ratio')]

    def test_an_option_does_what_the_key_in_the_file_does(self):
        plain = self.select(AFTER)
        for key, value, option in self.OVERRIDES:
            with self.subTest(key=key, value=value):
                by_option = self.select(AFTER, option, *([] if isinstance(value, bool) else [value]))
                case = read(AFTER)
                if key == 'compression_ratio':
                    keys = case.case()
                    del keys['budget']
                    case.metadata['case'] = json.dumps(keys)
                case.set_case(**{key: value})
                by_file = self.select(self.write(case))
                for name in ('score', 'smoothed', 'indices', 'head_lengths'):
                    self.assertEqual(by_option[name].elements, by_file[name].elements, name)
                self.assertEqual(by_option.metadata, by_file.metadata)
                self.assertEqual(by_option.case()[key], value)
                acts = key not in ('kernel', 'allocation')  # without a pool; equal to uniform here or not
                if acts:
                    tensors = [(file['smoothed'].elements, file['indices'].elements) for file in (plain, by_option)]
                    self.assertNotEqual(*tensors)

    def test_every_method_and_its_own_options(self):
        plain = {}
        for method, options in (('caote', ()), ('fastcaote', ()), ('h2o', ('--window', 3)),
                                ('h2o', ('--temporal', 'ema')), ('tova', ('--no-shared',)), ('vatp', ('--unit', 3)),
                                ('dropkv', ('--epsilon', 0.1)), ('obcache', ('--part', 'joint')),
                                ('laprox', ('--no-wo',)), ('andpro', ('--wo',)),
                                ('criticalkv', ('--first-stage-ratio', 0)), ('snapkv', ('--rescoring', 'caote')),
                                ('h2o', ('--rescoring', 'fastcaote')), ('knorm', ('--sink', 4)), ('keydiff', ('--sink', 4)),
                                ('lagkv', ('--lag-size', 16)), ('lagkv', ('--lag-size', 16, '--cross-scoring')),
                                ('curdkv', ('--leverage-type', 'value')), ('curdkv', ('--no-local-approximation',)),
                                ('curdkv', ('--local-window-size', 5)), ('leverage', ('--sketch', 0)),
                                ('leverage', ('--seed', 5)), ('leverage', ('--ridge', 10)),
                                ('expectedattention', ('--no-covariance',)), ('expectedattention', ('--no-vnorm',)),
                                ('expectedattention', ('--rope-theta', 10000)), ('qfilter', ('--group', 'none')),
                                ('capkv', ('--tau', 50)), ('capkv', ('--no-cosine',)),
                                ('keyredundancy', ('--similar', 0, '--threshold', -1)),
                                ('keyredundancy', ('--threshold', -1)), ('valuerange', ('--sink', 0)),
                                ('lacache', ('--overlap', 1, '--span', 3))):
            with self.subTest(method=method, options=options):
                base = ('--method', method, '--budget', 48, '--layer-count', 20, '--layer-index', 3)
                eigen, reference = (self.select(KV_HEADS, *base, *options, '--backend', backend)
                                    for backend in ('eigen', 'reference'))
                self.assertEqual(eigen.case()['method'], method)
                self.assertEqual(eigen['head_lengths'].elements, reference['head_lengths'].elements)
                for ours, exact in zip(eigen['smoothed'].rows(), reference['smoothed'].rows()):
                    limit = 1e-4 * max(abs(x) for x in exact if abs(x) < 3e38)
                    for a, b in zip(ours, exact):
                        self.assertTrue(abs(a - b) <= limit or min(a, b) > 3e38, (a, b))
                if method not in plain:
                    plain[method] = self.select(KV_HEADS, *base)
                if options:
                    kept = [(out['smoothed'].elements, out['indices'].elements) for out in (plain[method], eigen)]
                    self.assertNotEqual(*kept, 'the option does nothing')

    def test_the_written_configuration_gives_the_same_result_again(self):
        for path in (AFTER, ADAPTIVE, KV_HEADS, ADAKV):
            out = self.select(path, '--compact')
            first = self.output.read_bytes()
            case = read(path)
            case.metadata['case'] = out.metadata['case']
            self.select(self.write(case), '--compact')
            self.assertEqual(self.output.read_bytes(), first, path.name)

    def test_adaptive_window_keys(self):
        plain = self.select(ADAPTIVE)
        wide = self.select(ADAPTIVE, '--scale', 1)
        self.assertGreater(max(wide['kernel'].elements), max(plain['kernel'].elements))
        centred = self.select(ADAPTIVE, '--shift-rule', 'centred', '--scale', 1e9)
        self.assertEqual(set(centred['shift'].elements), {0})
        self.assertEqual(set(self.select(ADAPTIVE, '--scale', 1e9)['shift'].elements) - {0, 1}, set())

    def test_group_and_protection(self):
        out = self.select(KV_HEADS, '--sink', 3)
        self.assertEqual(out['score'].shape[0], 2)
        for row in out['indices'].rows():
            self.assertEqual(row[:3], [0, 1, 2])
        self.assertEqual(self.select(KV_HEADS, '--group', 'none')['score'].shape[0], 4)

    def test_pyramid_gives_lower_layers_more(self):
        options = ('--allocation', 'pyramid', '--layer-count', 4)
        outputs = [self.select(KV_HEADS, *options, '--layer-index', layer) for layer in range(4)]
        kept = [out['head_lengths'].elements[0] for out in outputs]
        self.assertEqual(kept, sorted(kept, reverse=True))
        self.assertGreater(kept[0], kept[-1])
        self.assertEqual(sum(kept), 4 * 32)

    def test_presets(self):
        standard = self.select(AFTER, '--preset', 'standard').case()
        wanted = {'method': 'restkv', 'order': 'before', 'use_wo': True, 'temporal': 'mean', 'spatial': 'avgpool',
                  'kernel': 5, 'group': 'l2', 'allocation': 'adakv'}
        self.assertEqual({key: standard[key] for key in wanted}, wanted)
        self.assertEqual((standard['budget'], standard['window']), (13, 8), "the file's")
        for name in ('lowest_error', 'rest_kv_released', 'rest_kv_paper', 'snap_kv', 'streaming_llm', 'random'):
            self.assertEqual(self.select(AFTER, '--preset', name, '--budget', 60).case()['budget'], 60)
        case = read(AFTER)
        case.metadata = {}
        self.assertEqual(self.select(self.write(case), '--window', 8, '--budget', 13).case(), standard)

    def test_streaming_llm_needs_no_queries(self):
        case = read(AFTER)
        tokens = case['k'].shape[1]
        for name in ('q', 'wo'):
            del case.tensors[name]
        out = self.select(self.write(case), '--preset', 'streaming_llm', '--budget', 10)
        self.assertEqual(out['indices'].elements, [0, 1, 2, 3, *range(tokens - 6, tokens)])

    def test_a_layer_of_a_trace(self):
        trace = os.path.join(EXAMPLE_DATA, 'trace-2k.safetensors')
        out = self.select(trace, '--layer', 10, '--preset', 'rest_kv_released', '--budget', 128)
        expected = read(os.path.join(TEST_DATA, 'traces', 'trace-2k.expected.safetensors'))
        known = expected['layers.10.after.scale2000.budget128.indices']
        self.assertEqual(out['indices'].shape, known.shape)
        margin = json.loads(expected.metadata['figures'])['layers.10.after.scale2000.budget128.margin']
        self.assertGreater(margin, 1e-4)
        self.assertEqual(out['indices'].elements, known.elements)


class Tensors(ProgramTest):
    def test_compact_keeps_the_bits(self):
        for dtype in ('F16', 'BF16', 'F32', 'F64'):
            case = read(KV_HEADS)
            for name in ('k', 'v'):
                case[name] = converted(case[name], dtype)
            out = self.select(self.write(case), '--compact')
            tokens = case['k'].shape[1]
            past = tokens - case.case()['window']
            for name in ('k', 'v'):
                channels = case[name].shape[2]
                rows = case[name].rows()
                self.assertEqual((out[name].dtype, out[name].shape), (dtype, [2, 32, channels]))
                wanted = []
                for head, kept in enumerate(out['indices'].rows()):
                    wanted += [rows[head * tokens + n] for n in [*kept, *range(past, tokens)]]
                self.assertEqual(out[name].rows(), wanted)
            self.assertNotIn('offsets', out.names())

    def test_compact_of_heads_that_keep_different_numbers(self):
        case = read(ADAKV)
        out = self.select(ADAKV, '--compact')
        tokens = case['k'].shape[1]
        past = tokens - case.case()['window']
        lengths = out['head_lengths'].elements
        self.assertGreater(len(set(lengths)), 1)
        offsets = out['offsets']
        begins = [sum(lengths[:h]) for h in range(len(lengths) + 1)]
        self.assertEqual((offsets.dtype, offsets.elements), ('I64', begins))
        for name in ('k', 'v'):
            rows = case[name].rows()
            self.assertEqual(out[name].shape, [sum(lengths), case[name].shape[2]])
            wanted = []
            for head, kept in enumerate(out['indices'].rows()):  # 4 query heads on 2 KV heads
                wanted += [rows[head // 2 * tokens + n] for n in [*(n for n in kept if n >= 0), *range(past, tokens)]]
            self.assertEqual(out[name].rows(), wanted)

    def test_the_dtype_of_the_input_does_not_matter(self):
        plain = self.select(ADAPTIVE)
        for dtype in ('F32', 'F64'):  # both hold every F16 exactly
            case = read(ADAPTIVE)
            for name in ('q', 'k', 'v', 'wo'):
                case[name] = converted(case[name], dtype)
            out = self.select(self.write(case))
            for name in plain.names():
                self.assertEqual(out[name].elements, plain[name].elements, name)
        coarse, exact = read(ADAPTIVE), read(ADAPTIVE)
        for name in ('q', 'k', 'v', 'wo'):
            coarse[name] = converted(coarse[name], 'BF16')
            exact[name] = converted(coarse[name], 'F32')
        outputs = [self.select(self.write(case)) for case in (coarse, exact)]
        self.assertEqual(outputs[0]['score'].elements, outputs[1]['score'].elements)
        self.assertNotEqual(outputs[0]['score'].elements, plain['score'].elements)

    def test_tensors_need_not_be_aligned(self):
        plain = self.select(ADAPTIVE, '--compact')
        case = read(ADAPTIVE)
        case.tensors = {'odd': Tensor('U8', [1], [7]), **case.tensors}
        out = self.select(self.write(case), '--compact')
        for name in plain.names():
            self.assertEqual(out[name].elements, plain[name].elements, name)

    def test_backends_agree_and_threads_do_not_matter(self):
        for path in (AFTER, ADAPTIVE, KV_HEADS):
            eigen = self.select(path, '--threads', 1)
            written = self.output.read_bytes()
            self.select(path, '--threads', 5)
            self.assertEqual(self.output.read_bytes(), written)
            reference = self.select(path, '--backend', 'reference')
            self.assertEqual(eigen['indices'].elements, reference['indices'].elements)
            for ours, exact in zip(eigen['score'].rows(), reference['score'].rows()):
                for a, b in zip(ours, exact):
                    self.assertAlmostEqual(a, b, delta=1e-5 * max(exact))

    def test_few_tokens(self):
        for tokens in (0, 1, 3, 8, 9):
            case = read(AFTER)
            for name in ('q', 'k', 'v'):
                heads, length, channels = case[name].shape
                rows = case[name].rows()
                count = min(tokens, length)
                chosen = [row for h in range(heads) for row in rows[(h + 1) * length - count:(h + 1) * length]]
                case[name] = Tensor('F16', [heads, count, channels], (x for row in chosen for x in row))
            out = self.select(self.write(case), '--compact')
            past = max(0, tokens - 8)
            self.assertEqual(out['score'].shape, [8, past])
            self.assertEqual(out['indices'].elements, list(range(past)) * 8)
            self.assertEqual(out['head_lengths'].elements, [tokens] * 8)
            self.assertEqual(out['k'].shape, [8, tokens, 16])

    def test_random_shapes_against_the_reference(self):
        source = random.Random(5)
        for _ in range(6):
            kv_heads, group = source.choice([1, 2, 3]), source.choice([1, 2, 4])
            window, channels = source.choice([1, 3, 6]), source.choice([1, 5, 17])
            tokens = window + source.choice([1, 20, 133])
            heads = kv_heads * group

            def tensor(*shape):
                count = 1
                for extent in shape:
                    count *= extent
                return Tensor('F32', shape, (source.gauss(0, 1) for _ in range(count)))

            case = case_files.File(
                {'q': tensor(heads, window, channels), 'k': tensor(kv_heads, tokens, channels),
                 'v': tensor(kv_heads, tokens, channels), 'wo': tensor(7, heads * channels)},
                {'case': json.dumps({'method': 'restkv', 'order': source.choice(['before', 'after']), 'window': window,
                                     'budget': window + 5, 'kernel': 3, 'scale': 2,
                                     'group': source.choice(['none', 'l2']),
                                     'spatial': 'adaptive', 'temporal': 'ema'})})
            path = self.write(case)
            eigen, reference = self.select(path), self.select(path, '--backend', 'reference')
            for name in ('kernel', 'shift', 'head_lengths'):
                self.assertEqual(eigen[name].elements, reference[name].elements)
            for ours, exact in zip(eigen['score'].rows(), reference['score'].rows()):
                for a, b in zip(ours, exact):
                    self.assertAlmostEqual(a, b, delta=1e-4 * max(exact))


    def test_importance_goes_forward(self):
        plain = self.select(KV_HEADS, '--spatial', 'none')
        for alike in (('following', '--kernel', 1), ('segments', '--share', 1)):
            self.assertEqual(self.select(KV_HEADS, '--spatial', *alike)['indices'].elements, plain['indices'].elements)
        for other in (('following', '--kernel', 4), ('segments', '--share', 0.2)):
            eigen = self.select(KV_HEADS, '--spatial', *other)
            reference = self.select(KV_HEADS, '--spatial', *other, '--backend', 'reference')
            self.assertEqual(eigen['indices'].elements, reference['indices'].elements)
            self.assertNotEqual(eigen['indices'].elements, plain['indices'].elements)
        done = self.run_program('select', KV_HEADS, '-o', self.output, '--spatial', 'segments', '--share', 1.5)
        self.assertEqual(done.returncode, 2)
        self.assertIn('1.5', done.stderr)


class Output(ProgramTest):
    def test_json(self):
        done = self.run_program('select', KV_HEADS, '-o', self.output, '--json')
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        result = json.loads(done.stdout)
        out = read(self.output)
        self.assertEqual(result['configuration'], out.case())
        self.assertEqual(result['head_lengths'], out['head_lengths'].elements)
        self.assertEqual((result['heads'], result['tokens'], result['window']), (2, 160, 8))
        self.assertEqual(result['granularity'], 'kv head')
        self.assertEqual(result['cache_bytes'], 2 * 2 * 160 * 16 * 2)
        self.assertEqual(result['kept_bytes'], 2 * 2 * 32 * 16 * 2)
        self.assertGreater(result['window_error']['mean'], 0)
        self.assertGreaterEqual(result['window_error']['worst'], result['window_error']['mean'])

    def test_nothing_evicted_is_no_error(self):
        done = self.run_program('select', KV_HEADS, '-o', self.output, '--json', '--budget', 160)
        self.assertEqual(json.loads(done.stdout)['window_error'], {'mean': 0, 'worst': 0})

    def test_text(self):
        done = self.run_program('select', KV_HEADS, '-o', self.output)
        for word in ('snapkv', '2 kv heads', '160 tokens', '64 of 320', '20.0 %', '4.0 KiB of 20.0 KiB', self.output):
            self.assertIn(str(word), done.stdout)

    def test_the_output_may_be_the_input(self):
        path = self.folder / 'same.safetensors'
        path.write_bytes(AFTER.read_bytes())
        done = self.run_program('select', path, '-o', path)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn('score', read(path).names())

    def test_version_and_help(self):
        self.assertIn('.', self.run_program('--version').stdout)
        for arguments in (['--help'], ['select', '--help'], ['verify', '--help'], ['compare', '--help']):
            done = self.run_program(*arguments)
            self.assertEqual((done.returncode, done.stderr), (0, ''))
            self.assertIn('Usage', done.stdout)


if __name__ == '__main__':
    unittest.main(argv=sys.argv[:1])
