#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of `restkv compare`: compare_test.py PROGRAM DATA_FOLDER TEST_DATA_FOLDER yes|no (built with Chart.js)"""
import csv
import json
import os
import pathlib
import pty
import re
import subprocess
import sys
import tempfile
import unittest

import compare_traces
from compare_traces import Tensor

PROGRAM, DATA, TEST_DATA, WITH_PLOTS = sys.argv[1:]
TRACE_2K = os.path.join(DATA, 'trace-2k.safetensors')
PER_QUERY_HEAD = {'rest_kv_released', 'rest_kv_paper', 'rest_kv_paper_no_pool', 'snap_kv_query_heads',
                  'streaming_llm_query_heads', 'random_query_heads'}
ANTICIPATED = {'anticipated', 'set_error', 'anticipated_fitted', 'set_error_fitted'}
PER_KV_HEAD = {'full_cache', 'standard', 'lowest_error', *ANTICIPATED, 'rest_kv_released_kv_heads', 'caote', 'fast_caote', 'drop_kv',
               'snap_kv_kv_heads', 'ada_kv', 'pyramid_kv', 'chunk_kv', 'h2o', 'h2o_mean', 'keyformer', 'tova', 'r_kv', 'vatp',
               'critical_kv', 'critical_ada_kv', 'h2o_caote', 'defensive_kv', 'lava', 'cake', 'lava_layers',
               'layer_defensive_kv', 'la_prox_global', 'lowest_error_global',
               'snap_kv_caote', 'ob_cache_value', 'ob_cache_key', 'ob_cache_joint', 'la_prox', 'an_d_pro', 'knorm',
               'key_diff', 'lag_kv', 'cur_dkv', 'leverage_score', 'key_redundancy', 'value_range', 'expected_attention',
               'q_filter', 'cap_kv', 'la_cache', 'streaming_llm_kv_heads', 'random_kv_heads'}


def run(*arguments, **options):
    return subprocess.run([PROGRAM, 'compare', *map(str, arguments)], capture_output=True, text=True, check=False,
                          **options)


def compare(*arguments):
    """The JSON of a run that must succeed."""
    done = run(*arguments, '--json')
    assert done.returncode == 0, done.stderr
    assert done.stderr == '', done.stderr
    return json.loads(done.stdout)


def without_times(output):
    """The same but for what differs from run to run."""
    for result in output['results']:
        result.pop('milliseconds', None)
    output['notes'] = [note for note in output['notes'] if not note.startswith('Time')]
    return output


def results_of(output):
    return {(result['policy'], result['budget']): result for result in output['results']}


def error_tables(text):
    """What does not differ from run to run."""
    return text.split('time of a layer')[0]


def report_data(html):
    match = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', html, re.DOTALL)
    return json.loads(match.group(1))


class TestOfCompare(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def small_trace(self, change=None, metadata=None, **sizes):
        tensors = compare_traces.small_trace(**sizes)
        if change:
            change(tensors)
        path = self.folder / 'small.safetensors'
        compare_traces.write(path, tensors, metadata)
        return path


class Figures(TestOfCompare):
    def check_figures(self, expected_path, output, policies_by_order):
        figures = json.loads(compare_traces.read_header(expected_path)['__metadata__']['figures'])
        results = results_of(output)
        checked = 0
        for key, wanted in figures.items():
            match = re.fullmatch(r'layers\.(\d+)\.(after|before)\.scale2000\.budget(\d+)\.future_error', key)
            if not match:
                continue
            layer, order, budget = int(match[1]), match[2], int(match[3])
            result = results[policies_by_order[order], budget]
            (found,) = [entry['mean'] for entry in result['layers'] if entry['layer'] == layer]
            self.assertLess(abs(found / wanted - 1), 1e-3, f'{key}: {found}, expected {wanted}')
            checked += 1
        return checked

    def test_trace_2k(self):
        policies = ['full_cache', 'standard', 'lowest_error', 'rest_kv_released', 'rest_kv_paper']
        output = compare(TRACE_2K, '--budgets', '128,256,512', '--policies', ','.join(policies))
        results = results_of(output)
        expected = os.path.join(TEST_DATA, 'traces', 'trace-2k.expected.safetensors')
        self.assertEqual(self.check_figures(expected, output, {'after': 'rest_kv_released', 'before': 'rest_kv_paper'}), 16)
        for budget, wanted in [(128, 0.0853), (256, 0.0566), (512, 0.0326)]:
            released = results['rest_kv_released', budget]
            self.assertAlmostEqual(released['mean'], wanted, delta=1e-4)
            self.assertEqual(released['ratio'], 1)
            self.assertGreater(released['worst'], released['mean'])
            self.assertAlmostEqual(released['mean'], sum(layer['mean'] for layer in released['layers']) / 4, delta=1e-12)
            self.assertEqual(released['worst'], max(layer['worst'] for layer in released['layers']))
            self.assertLessEqual(results['lowest_error', budget]['mean'], 0.5 * released['mean'])
            self.assertLessEqual(results['standard', budget]['mean'], 0.6 * released['mean'])
            self.assertGreater(results['lowest_error', budget]['mean'], 0)
            self.assertEqual(results['full_cache', budget]['mean'], 0)
            self.assertEqual(results['full_cache', budget]['worst'], 0)
            self.assertEqual(results['full_cache', budget]['bytes'], output['full_bytes'])
        self.assertEqual(output['full_bytes'], 4 * 3 * 2048 * 64 * 2 * 2)

    def test_layer_of_trace_8k(self):
        output = compare(os.path.join(TEST_DATA, 'traces', 'trace-8k-layer4.safetensors'), '--budgets', '128,1024',
                         '--policies', 'standard,lowest_error,rest_kv_released,rest_kv_paper')
        expected = os.path.join(TEST_DATA, 'traces', 'trace-8k-layer4.expected.safetensors')
        self.assertEqual(self.check_figures(expected, output, {'after': 'rest_kv_released', 'before': 'rest_kv_paper'}), 4)
        results = results_of(output)
        self.assertAlmostEqual(results['rest_kv_released', 128]['mean'], 0.292539, delta=3e-4)
        self.assertAlmostEqual(results['rest_kv_released', 1024]['mean'], 0.034509, delta=3e-5)
        self.assertLessEqual(results['lowest_error', 128]['ratio'], 0.5)
        self.assertLessEqual(results['standard', 128]['ratio'], 0.6)


class Policies(TestOfCompare):
    def test_all_of_them_at_the_same_bytes(self):
        output = compare(TRACE_2K, '--layers', '28', '--budgets', '100')
        self.assertEqual({policy['name'] for policy in output['policies']}, PER_QUERY_HEAD | PER_KV_HEAD)
        for policy in output['policies']:
            self.assertEqual(policy['heads'], 'query' if policy['name'] in PER_QUERY_HEAD else 'kv')
        results = results_of(output)
        for (policy, budget), result in results.items():
            if policy == 'la_cache':  # needs more layers than its ladder spans
                self.assertIn('span of la_cache is 2, must be below the 1 layers', result['error'])
            elif policy != 'full_cache':
                # Whole chunks, and the last one where it is not whole, may leave a rest of less than a chunk.
                tokens = [budget * 3 - 2] if policy == 'chunk_kv' else [budget * 3]
                self.assertIn(result['bytes'], [count * 3 * 64 * 2 * 2 for count in tokens], policy)
                self.assertGreater(result['milliseconds'], 0, policy)
                self.assertGreater(result['mean'], 0, policy)
        # The null policies are the worst but for the one that does not look either.
        self.assertGreater(results['random_query_heads', 100]['mean'], results['rest_kv_released', 100]['mean'])
        self.assertGreater(results['random_kv_heads', 100]['mean'], results['standard', 100]['mean'])

    def test_list(self):
        done = run('--list-policies', '--json')
        self.assertEqual(done.returncode, 0)
        listed = [policy['name'] for policy in json.loads(done.stdout)['policies']]
        self.assertEqual(set(listed), PER_QUERY_HEAD | PER_KV_HEAD)
        text = run('--list-policies').stdout
        self.assertEqual([line.split()[0] for line in text.splitlines() if line.startswith(' ')], listed)
        headings = [line for line in text.splitlines() if not line.startswith(' ')]
        self.assertEqual([re.search(r'\((\w+)\)', line)[1] for line in headings],
                         ['full', 'deletion', 'coming', 'attention', 'values', 'cache', 'queries', 'model',
                          'position'])

    def test_choice_keeps_the_order_of_the_table(self):
        output = compare(self.small_trace(), '--policies', 'random_kv_heads,standard', '--budgets', '46,40,46')
        self.assertEqual([policy['name'] for policy in output['policies']], ['standard', 'random_kv_heads'])
        self.assertEqual(output['budgets'], [40, 46])
        self.assertIsNone(output['results'][0]['ratio'])  # nothing to be a multiple of

    def test_random_follows_the_seed(self):
        trace = self.small_trace()
        arguments = [trace, '--policies', 'random_kv_heads,random_query_heads', '--budgets', '44']
        first = compare(*arguments, '--seed', 7)
        self.assertEqual(without_times(first), without_times(compare(*arguments, '--seed', 7)))
        other = compare(*arguments, '--seed', 8)
        for a, b in zip(first['results'], other['results']):
            self.assertNotEqual(a['mean'], b['mean'])
        # The mean of two seeds is the mean of their runs.
        one, two = (compare(*arguments, '--seeds', 1, '--seed', seed)['results'] for seed in (7, 8))
        both = compare(*arguments, '--seeds', 2, '--seed', 7)['results']
        for a, b, mean in zip(one, two, both):
            self.assertAlmostEqual((a['mean'] + b['mean']) / 2, mean['mean'], delta=1e-12)

    def test_backends_and_threads_agree(self):
        trace = self.small_trace(head_dim=16)
        eigen = compare(trace, '--budgets', '40,56', '--threads', 1)
        self.assertEqual(without_times(eigen), without_times(compare(trace, '--budgets', '40,56', '--threads', 3)))
        reference = compare(trace, '--budgets', '40,56', '--backend', 'reference')
        self.assertEqual(len(eigen['results']), len(reference['results']))
        for a, b in zip(eigen['results'], reference['results']):
            self.assertEqual((a['policy'], a['budget']), (b['policy'], b['budget']))
            self.assertEqual(a.get('error'), b.get('error'))
            if 'error' in a:
                continue
            self.assertEqual(a['bytes'], b['bytes'])
            self.assertIsNone(b['milliseconds'])
            self.assertAlmostEqual(a['mean'], b['mean'], delta=1e-6, msg=a['policy'])


class Crossed(TestOfCompare):
    def test_policies_under_allocations(self):
        trace = self.small_trace()
        output = compare(trace, '--policies', 'full_cache,standard,vatp', '--budgets', '40,pyramid,uniform')
        self.assertEqual(output['budgets'], [40])
        rows = {policy['name']: policy['allocation'] for policy in output['policies']}
        self.assertEqual(rows, {'full_cache': 'uniform', 'standard+uniform': 'uniform', 'standard+pyramid': 'pyramid',
                                'vatp+uniform': 'uniform', 'vatp+pyramid': 'pyramid'})
        results = results_of(output)
        plain = results_of(compare(trace, '--policies', 'vatp', '--budgets', '40'))
        self.assertEqual(results['vatp+uniform', 40]['mean'], plain['vatp', 40]['mean'])
        self.assertEqual(results['vatp+pyramid', 40]['bytes'], plain['vatp', 40]['bytes'])
        self.assertNotEqual(results['vatp+pyramid', 40]['mean'], plain['vatp', 40]['mean'])

    def test_budgets_over_layers(self):
        trace = self.small_trace()
        output = compare(trace, '--policies', 'snap_kv_kv_heads,snap_kv_query_heads,standard,critical_kv', '--budgets',
                         '40,global,lava,cake')
        results = results_of(output)
        plain = results_of(compare(trace, '--policies', 'snap_kv_kv_heads', '--budgets', '40'))['snap_kv_kv_heads', 40]
        for name in ('snap_kv_kv_heads+global', 'snap_kv_kv_heads+lava', 'snap_kv_kv_heads+cake', 'standard+global'):
            self.assertEqual(results[name, 40]['bytes'], plain['bytes'], name)
            self.assertNotEqual(results[name, 40]['mean'], plain['mean'], name)
        for name, words in (('snap_kv_query_heads+global', 'one kept set per KV head'), ('standard+cake', 'snapkv'),
                            ('critical_kv+lava', 'layers do not compete by its scores')):
            self.assertIn(words, results[name, 40]['error'], name)
        # A budget of everything keeps everything.
        for result in compare(trace, '--policies', 'standard', '--budgets', '96,global,lava')['results']:
            self.assertEqual(result['mean'], 0, result)

    def test_groups(self):
        output = compare(self.small_trace(), '--group', 'cache,full', '--budgets', '40')
        self.assertEqual({policy['group'] for policy in output['policies']}, {'full', 'cache'})
        self.assertEqual(output['policies'][0]['name'], 'full_cache')
        done = run(self.small_trace(), '--group', 'cache', '--policies', 'standard')
        self.assertEqual((done.returncode, done.stdout), (2, ''))
        done = run(self.small_trace(), '--group', 'attention,colours')
        self.assertEqual(done.returncode, 2)
        self.assertIn('there is no group colours; known: full, deletion', done.stderr)

    def test_table(self):
        path = self.folder / 'table.csv'
        output = compare(self.small_trace(), '--policies', 'standard,la_cache', '--budgets', '40,56', '--out', path)
        self.assertEqual(output['table'], str(path))
        with open(path, newline='', encoding='utf-8') as file:
            rows = list(csv.DictReader(file))
        self.assertEqual(len(rows), 2 * (1 + 2) + 2)
        for result in output['results']:
            mine = [row for row in rows if (row['policy'], row['budget']) == (result['policy'], str(result['budget']))]
            if 'error' in result:
                self.assertEqual([row['problem'] for row in mine], [result['error']])
                continue
            self.assertEqual([row['layer'] for row in mine], ['all', '0', '3'])
            self.assertAlmostEqual(float(mine[0]['error']), result['mean'], delta=1e-7)
            self.assertEqual(int(mine[0]['bytes']), result['bytes'])
            self.assertEqual(sum(int(row['bytes']) for row in mine[1:]), result['bytes'])
            self.assertAlmostEqual(float(mine[2]['worst']), result['layers'][1]['worst'], delta=1e-7)
            self.assertGreater(float(mine[0]['milliseconds']), 0)
        trace = self.small_trace()
        done = run(trace, '--policies', 'standard', '--budgets', '40', '--out', trace)
        self.assertEqual(done.returncode, 2)
        self.assertIn('the table would replace the trace', done.stderr)

    def test_kept_sets(self):
        output = compare(self.small_trace(), '--policies', 'tova', '--budgets', '40', '--kept')
        self.assertEqual(len(output['kept']), 2)
        for entry in output['kept']:
            self.assertEqual(entry['heads'][0], entry['heads'][1], 'one kept set a layer')
            self.assertEqual(sum(entry['heads'][0][1::2]), 80)


class Budgets(TestOfCompare):
    def test_above_the_prompt_everything_is_kept(self):
        output = compare(self.small_trace(metadata={'rope_theta': '10000'}), '--budgets', '96,2147483647')
        for result in output['results']:
            if result['policy'] == 'la_cache':
                continue  # needs more layers than these
            # Changed caches are measured in double, kept ones by what is missing.
            largest = 1e-12 if result['policy'] in ANTICIPATED else 0
            self.assertLessEqual(result['mean'], largest, result)
            self.assertLessEqual(result['worst'], largest, result)

    def test_queries_to_come_need_the_base_of_rope(self):
        results = results_of(compare(self.small_trace(), '--budgets', '40', '--policies', 'standard,set_error'))
        self.assertIn('does not say rope_theta', results['set_error', 40]['error'])
        self.assertGreater(results['standard', 40]['mean'], 0)

    def test_below_what_is_protected(self):
        trace = self.small_trace()
        results = results_of(compare(trace, '--budgets', '10,40'))
        # 10 tokens a query head are 20 a KV head; the windows of 32 do not fit, the 4 sinks of StreamingLLM do.
        self.assertIn('the budget is 20 tokens per head, 32 are protected', results['standard', 10]['error'])
        self.assertIn('the budget is 10 tokens per head, 32 are protected', results['rest_kv_released', 10]['error'])
        self.assertNotIn('mean', results['standard', 10])
        self.assertGreater(results['streaming_llm_query_heads', 10]['mean'], 0)
        self.assertIsNone(results['streaming_llm_query_heads', 10]['ratio'])
        self.assertGreater(results['standard', 40]['mean'], 0)
        text = run(trace, '--budgets', '10,40')
        self.assertEqual(text.returncode, 0)
        self.assertIn('standard at 10: the budget is 20 tokens per head', text.stdout)

    def test_nothing_can_run(self):
        done = run(self.small_trace(), '--budgets', '10', '--policies', 'standard,rest_kv_released')
        self.assertEqual(done.returncode, 2)
        self.assertIn('no policy could run: the budget is 20 tokens per head, 32 are protected', done.stderr)

    def test_options_that_cannot_be(self):
        trace = self.small_trace()
        for arguments, message in [(['--budgets', '0'], '0 is neither a number of tokens'), (['--budgets', '8x'], '8x is neither'), (['--seeds', '0'], '0'),
                                   (['--policies', 'nonsense'], 'there is no policy nonsense; known: full_cache'),
                                   (['--backend', 'gpu'], 'gpu'),
                                   (['--layers', '1'], 'layer 1 is not stored; there are 0, 3')]:
            done = run(trace, *arguments)
            self.assertEqual(done.returncode, 2, arguments)
            self.assertIn(message, done.stderr)
            self.assertEqual(done.stdout, '')
        self.assertEqual(run().returncode, 2)


class Report(TestOfCompare):
    def test_one_file_with_everything(self):
        path = self.folder / 'report.html'
        output = compare(TRACE_2K, '--layers', '1,28', '--budgets', '64,128', '--seeds', '1', '--report', path,
                         '--policies', 'standard,rest_kv_released,random_kv_heads')
        self.assertEqual(output['report'], str(path))
        self.assertEqual([entry.name for entry in self.folder.iterdir()], ['report.html'])
        html = path.read_text(encoding='utf-8')
        self.assertNotRegex(html, r'(src|href)\s*=')
        self.assertNotRegex(html, r'@import|url\(')
        self.assertIn("default-src 'none'", html)
        self.assertNotIn('@@', html)
        self.assertIn('Permission is hereby granted', html)
        if WITH_PLOTS == 'yes':
            self.assertRegex(html, r'Chart\.js v\d')
        data = report_data(html)
        for key in output:
            if key not in ('report', 'table'):
                self.assertEqual(data[key], output[key])
        self.assertEqual(data['trace']['metadata']['prompt_tokens'], '2048')
        # The kept positions: as many tokens as were paid for, the window among them.
        self.assertEqual(len(data['kept']), 3 * 2 * 2)
        for entry in data['kept']:
            query_heads = entry['policy'] == 'rest_kv_released'
            self.assertEqual(len(entry['heads']), 9 if query_heads else 3)
            kept = 0
            for runs in entry['heads']:
                self.assertEqual(sum(runs), 2048)
                self.assertGreaterEqual(runs[-1], 32)
                kept += sum(runs[1::2])
            self.assertEqual(kept, 9 * entry['budget'])

    def test_texts_of_the_trace_stay_texts(self):
        hostile = '</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> "\'&\u2028\x00\x1b[31m @@data@@'
        folder = self.folder / '<b onclick=x>\x1b[31m'
        folder.mkdir()
        trace = folder / 't.safetensors'
        compare_traces.write(trace, compare_traces.small_trace(), {'answer': hostile, hostile: 'model', '__proto__': 'p'})
        path = self.folder / 'report.html'
        compare(trace, '--budgets', '40', '--policies', 'standard', '--report', path)
        html = path.read_text(encoding='utf-8')
        for markup in ['<script>alert', '<img', '<!-- <', '<b onclick']:
            self.assertNotIn(markup, html)
        self.assertEqual(html.count('</script>'), 3)
        self.assertEqual(report_data(html)['trace']['metadata'], {'answer': hostile, hostile: 'model', '__proto__': 'p'})
        self.assertEqual(report_data(html)['trace']['file'], str(trace))
        # Neither does a terminal get them raw.
        self.assertNotIn('\x1b', run(trace, '--budgets', '40').stdout)

    def test_where_it_cannot_be_written(self):
        trace = self.small_trace()
        before = trace.read_bytes()
        for path, message in [(self.folder / 'missing' / 'r.html', 'cannot create'), (self.folder, 'not a plain file'),
                              (trace, 'would replace the trace')]:
            done = run(trace, '--budgets', '40', '--policies', 'standard', '--report', path)
            self.assertEqual(done.returncode, 2)
            self.assertIn(message, done.stderr)
            self.assertIn(str(path), done.stderr)
        self.assertEqual(trace.read_bytes(), before)


class BadFiles(TestOfCompare):
    def check(self, path, *messages):
        done = run(path, '--budgets', '40')
        self.assertEqual(done.returncode, 2, done.stdout)
        self.assertEqual(done.stdout, '')
        for message in (str(path), *messages):
            self.assertIn(message, done.stderr)
        self.assertEqual(len(done.stderr.splitlines()), 1)
        with_json = run(path, '--budgets', '40', '--json')
        self.assertEqual(with_json.returncode, 2)
        self.assertIn(messages[0], json.loads(with_json.stdout)['error'])

    def test_truncated(self):
        path = self.small_trace()
        whole = path.read_bytes()
        path.write_bytes(whole[:-6])
        self.check(path, f'{len(whole) - 6 - 8 - int.from_bytes(whole[:8], "little")}')
        path.write_bytes(whole[:4])
        self.check(path, 'the file has 4 bytes, the length of the header alone takes 8')
        path.write_bytes(b'')
        self.check(path, 'the file has 0 bytes')

    def test_no_file(self):
        self.check(self.folder / 'nothing.safetensors', 'No such file')
        self.check(self.folder, 'not a plain file')

    def test_not_a_trace(self):
        path = self.folder / 'other.safetensors'
        compare_traces.write(path, {'q': Tensor([1], [1.0]), 'layers.x.q': Tensor([1], [1.0])})
        self.check(path, 'none of its 2 tensors is named layers.<number>.q')

    def test_missing_tensor(self):
        for name in ['k', 'v', 'wo', 'q_future', 'k_future', 'v_future']:
            path = self.small_trace(lambda tensors, name=name: tensors.pop(f'layers.3.{name}'))
            self.check(path, f'the file has no tensor layers.3.{name} among its 13')

    def test_dtype(self):
        def change(tensors):
            tensors['layers.0.v'] = Tensor(tensors['layers.0.v'].shape, [1] * 2 * 96 * 8, 'I32')
        self.check(self.small_trace(change), 'tensor layers.0.v is I32, a floating-point type is needed')

    def test_float32_is_as_good(self):
        half = compare(self.small_trace(), '--budgets', '40')

        def change(tensors):
            for tensor in tensors.values():
                tensor.elements = [compare_traces.struct.unpack('<e', compare_traces.struct.pack('<e', x))[0]
                                   for x in tensor.elements]
                tensor.dtype = 'F32'
        single = compare(self.small_trace(change), '--budgets', '40')
        self.assertEqual(without_times(half)['results'], without_times(single)['results'])

    def test_not_finite(self):
        for value, text in [(float('nan'), 'nan'), (float('-inf'), '-inf')]:
            def change(tensors, value=value):
                tensors['layers.3.k_future'].elements[1 * 5 * 8 + 2 * 8 + 7] = value
            self.check(self.small_trace(change), f'tensor layers.3.k_future holds {text} at [1, 2, 7]')

    def test_shapes(self):
        def reshaped(name, *shape):
            count = 1
            for extent in shape:
                count *= extent
            return lambda tensors: tensors.update({name: Tensor(shape, [0.5] * count)})
        for change, message in [
                (reshaped('layers.0.q', 3, 40, 8), 'tensor layers.0.q has 3 heads, layers.0.k has 2: a multiple'),
                (reshaped('layers.0.q', 4, 40), 'tensor layers.0.q has 2 axes, 3 are needed'),
                (reshaped('layers.0.q', 4, 97, 8), 'tensor layers.0.q has 97 tokens, layers.0.k has 96'),
                (reshaped('layers.0.q', 4, 0, 8), 'tensor layers.0.q has 0 tokens, at least 1'),
                (reshaped('layers.0.k', 2, 96, 4), 'tensor layers.0.k has 4 channels, layers.0.q has 8'),
                (reshaped('layers.0.k', 0, 96, 8), 'tensor layers.0.k has 0 heads, at least 1'),
                (reshaped('layers.0.v', 2, 95, 8), 'tensor layers.0.v has 95 tokens, layers.0.k has 96'),
                (reshaped('layers.0.wo', 12, 33), 'layers.0.wo has 33 columns, 4 query heads of 8 channels need 32'),
                (reshaped('layers.0.q_future', 2, 5, 8), 'tensor layers.0.q_future has 2 heads, layers.0.q has 4'),
                (reshaped('layers.0.k_future', 2, 6, 8), 'layers.0.k_future has 6 tokens, layers.0.q_future has 5'),
                (reshaped('layers.0.v_future', 1, 5, 8), 'tensor layers.0.v_future has 1 heads, layers.0.k has 2'),
                (reshaped('layers.3.q_future', 4, 5, 9), 'tensor layers.3.q_future has 9 channels, layers.3.q has 8')]:
            self.check(self.small_trace(change), message)

    def test_layers_that_differ(self):
        def change(tensors):
            tensors.update(compare_traces.small_trace(layers=(3,), tokens=95))
        self.check(self.small_trace(change), 'tensor layers.3.k has 95 tokens, layers.0.k has 96')

    def test_window_that_is_not_stored(self):
        results = results_of(compare(self.small_trace(window=16), '--budgets', '40'))
        self.assertEqual(results['standard', 40]['error'], 'query has 16 rows, the observation window needs 32')
        self.assertGreater(results['streaming_llm_kv_heads', 40]['mean'], 0)


class Progress(TestOfCompare):
    def on_a_terminal(self, *arguments):
        """What a terminal sees on the standard error."""
        ours, theirs = pty.openpty()
        done = subprocess.run([PROGRAM, 'compare', *map(str, arguments)], stdout=subprocess.PIPE, stderr=theirs, text=True,
                              check=True)
        os.close(theirs)
        seen = b''
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other side is closed
                piece = b''
            if not piece:
                break
            seen += piece
        os.close(ours)
        return seen.decode(), done.stdout

    def test_only_on_a_terminal(self):
        trace = self.small_trace()
        seen, output = self.on_a_terminal(trace, '--budgets', '40')
        self.assertIn('comparing [', seen)
        self.assertTrue(seen.endswith('\r\x1b[K'))
        self.assertEqual(error_tables(output), error_tables(run(trace, '--budgets', '40').stdout))
        self.assertEqual(run(trace, '--budgets', '40').stderr, '')
        self.assertEqual(self.on_a_terminal(trace, '--budgets', '40', '--quiet')[0], '')


if __name__ == '__main__':
    unittest.main(argv=sys.argv[:1], verbosity=1)
