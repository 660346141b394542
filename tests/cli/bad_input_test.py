#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What `restkv select` says to files and options that it cannot use, and that it leaves nothing behind:
bad_input_test.py PROGRAM TEST_DATA_FOLDER EXAMPLE_DATA_FOLDER"""
import json
import math
import os
import pathlib
import random
import struct
import subprocess
import sys
import unittest

from case_files import ProgramTest, Tensor, converted, read

PROGRAM, TEST_DATA, EXAMPLE_DATA = sys.argv[1:]
ProgramTest.program = PROGRAM
GOLDEN = pathlib.Path(TEST_DATA) / 'golden'
CASE = GOLDEN / 'restkv-04-after-wo-mean-adaptive.safetensors'  # q [4, 16, 8], k and v [4, 97, 8], wo [16, 32]
GROUPED = GOLDEN / 'snapkv-kvhead-0.safetensors'  # q [4, 160, 16], k and v [2, 160, 16]


class BadInputTest(ProgramTest):
    def check_rejected(self, path, *words, options=()):
        """Selecting fails, says these words, and writes nothing: neither where nothing was nor where a file is."""
        for before in (None, b'what was there'):
            if before:
                self.output.write_bytes(before)
            names = sorted(os.listdir(self.folder))
            done = self.run_program('select', path, '-o', self.output, *options)
            self.check_failure(done, *words)
            self.assertEqual(sorted(os.listdir(self.folder)), names)
            if before:
                self.assertEqual(self.output.read_bytes(), before)
                self.output.unlink()

    def check_changed(self, change, *words, source=CASE, options=()):
        case = read(source)
        change(case)
        path = self.write(case)
        self.check_rejected(path, path, *words, options=options)


class Files(BadInputTest):
    def test_no_file(self):
        self.check_rejected(self.folder / 'missing.safetensors', 'missing.safetensors', 'No such file')
        self.check_rejected(self.folder, 'not a plain file')
        self.check_rejected('/dev/zero', 'not a plain file')

    def test_truncated_anywhere(self):
        content = CASE.read_bytes()
        (header,) = struct.unpack('<Q', content[:8])
        source = random.Random(3)
        lengths = {0, 1, 7, 8, 9, 8 + header - 1, 8 + header, 8 + header + 1, len(content) - 1}
        lengths |= {source.randrange(len(content)) for _ in range(12)} | {source.randrange(header) for _ in range(6)}
        path = self.folder / 'short.safetensors'
        for length in sorted(lengths):
            path.write_bytes(content[:length])
            done = self.run_program('select', path, '-o', self.output)
            self.check_failure(done, path)
            self.assertFalse(self.output.exists())
        path.write_bytes(content[:8 + header // 2])
        self.check_rejected(path, 'truncated', header)
        path.write_bytes(content + b'x')
        self.check_rejected(path, f'the file has {len(content) - 8 - header + 1}')

    def test_other_content(self):
        path = self.folder / 'other.safetensors'
        for content, word in ((b'GGUF' + bytes(100), 'header'), (struct.pack('<Q', 2**63) + b'{}', 'header'),
                              (struct.pack('<Q', 12) + b'{"a": [1, 2]', 'a'), (struct.pack('<Q', 4) + b'null', "'{'")):
            path.write_bytes(content)
            self.check_rejected(path, path, word)

    def test_control_characters_do_not_reach_the_terminal(self):
        case = read(CASE)
        case.metadata['case'] = json.dumps({'method': '\x1b[31mred\n'})
        done = self.run_program('select', self.write(case), '-o', self.output)
        self.check_failure(done)
        self.assertNotIn('\x1b', done.stderr)


class Tensors(BadInputTest):
    def test_missing(self):
        for name in ('q', 'k', 'v', 'wo'):
            self.check_changed(lambda case, name=name: case.tensors.pop(name), f'tensor {name}')

    def test_wo_is_not_missed_where_it_is_not_used(self):
        case = read(CASE)
        del case.tensors['wo']
        self.select(self.write(case), '--no-wo')

    def test_dtype(self):
        for name in ('q', 'k', 'v', 'wo'):
            for dtype in ('I32', 'U8'):
                def change(case, name=name, dtype=dtype):
                    case[name] = Tensor(dtype, case[name].shape, (1 for _ in case[name].elements))
                self.check_changed(change, f'tensor {name}', dtype, 'floating-point')

    def test_number_of_axes(self):
        for name in ('q', 'k', 'v', 'wo'):
            def change(case, name=name):
                case[name].shape = [1, 1, *case[name].shape]
            self.check_changed(change, f'tensor {name}', 'axes')

    def test_shapes_that_do_not_fit(self):
        def shaped(name, *shape):
            def change(case):
                count = math.prod(shape)
                case[name] = Tensor('F16', shape, (case[name].elements * 2)[:count])
            return change

        self.check_changed(shaped('v', 4, 96, 8), 'tensor v has 96 tokens, k has 97')
        self.check_changed(shaped('v', 2, 97, 8), 'tensor v has 2 heads, k has 4')
        self.check_changed(shaped('v', 4, 97, 4), 'tensor v has 4 channels, k has 8')
        self.check_changed(shaped('q', 4, 16, 4), 'tensor q has 4 channels, k has 8')
        self.check_changed(shaped('q', 3, 16, 8), 'tensor q has 3 heads, k has 4')
        self.check_changed(shaped('q', 0, 16, 8), 'tensor q has 0 heads, k has 4')
        self.check_changed(shaped('q', 4, 15, 8), 'tensor q has 15 queries, the observation window needs 16')
        self.check_changed(shaped('wo', 16, 31), 'tensor wo has 31 columns', '4 query heads of 8 channels need 32')
        self.check_changed(shaped('wo', 0, 32), 'tensor wo has no rows')
        self.check_changed(shaped('q', 4, 161, 16), 'tensor q has 161 queries, k has 160 tokens', source=GROUPED)
        self.check_changed(shaped('k', 0, 97, 8), 'k has 0')
        self.check_changed(shaped('k', 4, 97, 0), 'tensor v has 8 channels, k has 0')
        self.check_changed(shaped('k', 4, 0, 8), 'tensor v has 97 tokens, k has 0')

    def test_empty_tensors_of_enormous_extents(self):
        def empty(case, heads, tokens, channels):
            for name in ('k', 'v'):
                case[name] = Tensor('F16', [heads, tokens, channels], [])
            case['q'] = Tensor('F16', [heads, 0, channels], [])
        self.check_changed(lambda case: empty(case, 10**12, 0, 8), '1000000000000 heads', '65536')
        self.check_changed(lambda case: empty(case, 4, 0, 10**12), '1000000000000 channels', '4096')
        self.check_changed(lambda case: empty(case, 4, 10**12, 0), '0 channels', '4096')

    def test_elements_that_are_not_finite(self):
        for name, place, text in (('q', 200, '[1, 9, 0]'), ('k', 780, '[1, 0, 4]'), ('v', 3103, '[3, 96, 7]'),
                                  ('wo', 33, '[1, 1]')):
            for value, word in ((math.nan, 'nan'), (math.inf, 'inf'), (-math.inf, '-inf')):
                def change(case, name=name, place=place, value=value):
                    case[name].elements[place] = value
                self.check_changed(change, f'tensor {name} holds {word} at {text}', '1 of its', '--allow-non-finite')

    def test_numbers_too_large_for_float(self):
        def change(case):
            case['v'] = converted(case['v'], 'F64')
            case['v'].elements[5] = 1e200
        self.check_changed(change, 'tensor v holds inf at [0, 0, 5]')

    def test_going_on_with_keys_that_are_not_finite(self):
        case = read(CASE)
        for name in ('k', 'v'):
            for channel in range(8):
                case[name].elements[40 * 8 + channel] = math.nan
        out = self.select(self.write(case), '--allow-non-finite')
        self.assertNotIn(40, out['indices'].rows()[0])
        clean = self.select(CASE)
        self.assertEqual(out['score'].rows()[1:], clean['score'].rows()[1:], 'the other heads')
        for row in out['indices'].rows():
            self.assertEqual((len(row), row), (16, sorted(set(row))))

    def test_a_layer_that_is_not_there(self):
        trace = os.path.join(EXAMPLE_DATA, 'trace-2k.safetensors')
        self.check_rejected(trace, 'layers.2.k', options=('--layer', 2))
        self.check_rejected(trace, 'tensor k')

    def test_a_given_set(self):
        source = GOLDEN / 'set-error-0.safetensors'
        self.check_changed(lambda case: case.tensors.pop('expected.keep'), 'expected.keep', source=source)

        def fewer(case):
            case['expected.keep'] = Tensor('I32', [3, 160], case['expected.keep'].elements[:480])
        self.check_changed(fewer, 'expected.keep is [3, 160]', '[4, 160]', source=source)


class Configurations(BadInputTest):
    def check_case(self, text, *words):
        case = read(CASE)
        case.metadata['case'] = text
        path = self.write(case)
        self.check_rejected(path, path, *words)

    def test_form(self):
        self.check_case('{"method": "restkv"', 'JSON')
        self.check_case('[1, 2]', 'JSON object')
        self.check_case('', 'JSON')
        self.check_case('{"window": 8, "window": 8}', '"window" twice')
        self.check_case('{"window": {"tokens": 8}}', 'one JSON object of numbers')
        self.check_case('{"window": ' + 200000 * '[' + 200000 * ']' + '}', 'one JSON object of numbers')
        self.check_case('{"method": "restkv", "widow": 8}', 'unknown key "widow"', 'window', 'budget', 'spatial')

    def test_values(self):
        for key, value, words in (
                ('method', 'belady', ('"belady"', 'not supported', 'restkv', 'snapkv')), ('method', 3, ('3', 'restkv')),
                ('order', 'later', ('"later"', 'before, after')),
                ('temporal', 'median', ('"median"', 'mean, sum, ema')),
                ('spatial', 'gauss', ('"gauss"', 'none, avgpool, maxpool, adaptive')),
                ('group', 'min', ('"min"', 'none, mean, max, sum, l2')),
                ('allocation', 'x', ('uniform, pyramid, adakv, global, lava, cake',)),
                ('shift_rule', 'x', ('released, centred',)), ('use_wo', 1, ('true or false',)),
                ('use_norm', 'yes', ('true or false',)), ('window', '8', ('whole number',)),
                ('window', 8.5, ('whole number',)), ('budget', 2**70, ('whole number',)),
                ('kernel', 2**40, ('whole number',)),
                ('alpha', 'x', ('must be a number',)), ('scale', None, ('must be a number',)),
                ('seed', -1, ('whole number',)), ('base', 'h2o', ('must be snapkv',)),
                ('accumulate', 'product', ('"product"', 'sum or mean_over_observers')),
                ('temporal', 'sum_of_squares', ('dropkv', 'root_sum_square')),
                ('use_random_leverage', True, ('must be false',)), ('note', 3, ('must be a text',))):
            self.check_case(json.dumps({**read(CASE).case(), key: value}), key, *words)

    def test_ranges(self):
        ema = {'temporal': 'ema'}
        pools = [{'spatial': name} for name in ('avgpool', 'maxpool', 'adaptive')]
        for keys, words in (
                ({**ema, 'alpha': 0}, ('alpha is 0',)), ({**ema, 'alpha': 1.5}, ('alpha is 1.5',)),
                *(({**pool, 'kernel': 4}, ('is 4', 'odd')) for pool in pools),
                *(({**pool, 'kernel': -1}, ('is -1', 'odd')) for pool in pools),
                ({'scale': 0}, ('scale is 0',)), ({'scale': -3}, ('scale is -3',)),
                ({'scale': 1e300}, ('scale is 1e+300', 'finite')),
                ({'tau': 0}, ('tau is 0',)), ({'window': 0}, ('window is 0',)),
                ({'window': 2000}, ('window needs 97',)),
                ({'budget': 0}, ('0 tokens',)), ({'budget': -5}, ('-5 tokens',)),
                ({'budget': 15}, ('budget is 15', '16 are protected')),
                ({'n_sink': -1}, ('sink -1',)), ({'n_sink': 40}, ('40 sinks',)), ({'recent': -2}, ('recent -2',)),
                ({'compression_ratio': 0.5}, ('budget', 'exclude')),
                ({'allocation': 'adakv', 'floor': 2}, ('floor is 2',)),
                ({'allocation': 'pyramid', 'beta': 0}, ('beta is 0',)),
                ({'layer_index': 3, 'layer_count': 2}, ('layer 3 of 2',)),
                ({'unit': 0}, ('tokens is 0',)), ({'shared': True, 'group': 'none'}, ('group may not be none',)),
                ({'temporal': 'sum', 'order': 'after'}, ('order after',)),
                ({'rescoring': 'criticalkv'}, ('the rescoring criticalkv does not go with the method restkv',)),
                ({'n_sink': 1, 'num_sinks': 2}, ('num_sinks and n_sink mean the same',)),
                ({'method': 'h2o', 'temporal': 'median'}, ('median',)),
                ({'method': 'tova', 'rescoring': 'criticalkv'}, ('with the method tova',)),
                ({'method': 'lava', 'rescoring': 'none'}, ('with the method lava',)),
                ({'allocation': 'global'}, ('over the layers of a model',)),
                ({'method': 'lagkv', 'lag_size': 0}, ('lag of lag_kv is 0',)),
                ({'method': 'leverage', 'ridge': 0}, ('ridge',)),
                ({'method': 'lacache'}, ('span of la_cache is 16', '1 layers')),
                ({'method': 'expectedattention', 'rope_theta': 0.5}, ('theta',))):
            with self.subTest(keys=keys):
                self.check_case(json.dumps({**read(CASE).case(), **keys}), *words)
        keys = read(CASE).case()
        del keys['budget']
        for ratio in (1, -0.5):
            self.check_case(json.dumps({**keys, 'compression_ratio': ratio}), 'compression_ratio', ratio)

    def test_options(self):
        for options, words in (
                (('--order', 'later'), ('--order', 'later')), (('--budget', 'many'), ('--budget', 'many')),
                (('--kernel', 'x'), ('--kernel',)), (('--widow', 8), ('--widow',)),
                (('--preset', 'best'), ('best', 'standard')),
                (('--threads', 0), ('--threads',)), (('--backend', 'gpu'), ('--backend',)),
                (('--layer', -1), ('--layer',)),
                (('--preset', 'random', '--method', 'snapkv'), ('--preset', '--method')),
                (('--budget', 3), ('budget is 3',)),
                (('--alpha', 'nan', '--temporal', 'ema'), ('alpha',)), (('--scale', 'nan'), ('scale',)),
                (('--compression-ratio', 'nan'), ('compression_ratio',)),
                (('--budget', 40, '--compression-ratio', 0.5), ('exclude',))):
            with self.subTest(options=options):
                self.check_rejected(CASE, *words, options=options)

    def test_command_line(self):
        for arguments, words in (((), ('subcommand',)), (('pick',), ('pick',)), (('select',), ('FILE',)),
                                 (('select', CASE), ('--output',)), (('verify',), ('FILES',)),
                                 (('verify', CASE, '--tolerance', '-1'), ('--tolerance',))):
            self.check_failure(self.run_program(*arguments), *words)


class Outputs(BadInputTest):
    def check_unwritable(self, output, *words):
        names = sorted(os.listdir(self.folder))
        self.check_failure(self.run_program('select', CASE, '-o', output), *words)
        self.assertEqual(sorted(os.listdir(self.folder)), names)

    def test_places_that_cannot_be_written(self):
        self.check_unwritable(self.folder / 'no' / 'folder.safetensors', 'folder.safetensors', 'No such file')
        self.check_unwritable(self.folder, 'not a plain file')
        self.check_unwritable('/dev/full', 'not a plain file')

    @unittest.skipIf(os.geteuid() == 0, 'root may write everywhere')
    def test_folder_without_the_right(self):
        self.folder.chmod(0o500)
        self.check_unwritable(self.output, 'Permission denied')
        self.folder.chmod(0o700)

    def test_standard_output_that_is_full(self):
        with open('/dev/full', 'w', encoding='utf-8') as full:
            done = subprocess.run([PROGRAM, 'select', CASE, '-o', self.output], stdout=full, stderr=subprocess.PIPE,
                                  text=True, check=False)
        self.assertEqual(done.returncode, 2)
        self.assertIn('standard output', done.stderr)

    def test_json_reports_the_error_too(self):
        for arguments in (('select', 'missing.safetensors', '-o', self.output, '--json'), ('select', '--json'),
                          ('--json', 'pick')):
            done = self.run_program(*arguments)
            self.assertEqual(done.returncode, 2)
            self.assertIn(json.loads(done.stdout)['error'], done.stderr)


if __name__ == '__main__':
    unittest.main(argv=sys.argv[:1])
