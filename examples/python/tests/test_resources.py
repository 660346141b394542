# SPDX-License-Identifier: Apache-2.0
"""The interpreter's lock, threads, processes and memory."""

import gc
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import restkv
from case_layers import random_layer, random_w_o


def a_long_call():
    """A call of some tenths of a second, and what it takes."""
    query, key, value = random_layer(batch=1, query_heads=8, kv_heads=8, tokens=20000, head_dim=64, queries=32)
    policy = restkv.policy("lowest_error", 512, use_wo=False)
    begin = time.perf_counter()
    restkv.select(policy, query, key, value, threads=1)
    return lambda: restkv.select(policy, query, key, value, threads=1), time.perf_counter() - begin


def test_other_threads_of_python_go_on():
    """Were the lock held, the counter would stand still for the whole call."""
    call, _ = a_long_call()
    ticks = []
    done = threading.Event()

    def count():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    counter = threading.Thread(target=count)
    counter.start()
    begin = time.perf_counter()
    call()
    end = time.perf_counter()
    done.set()
    counter.join()
    during = [begin, *(tick for tick in ticks if begin < tick < end), end]
    longest_pause = max(b - a for a, b in itertools.pairwise(during))
    assert end - begin > 0.02
    assert len(during) > 6 and longest_pause < 0.7 * (end - begin), (len(during), longest_pause, end - begin)


def test_calls_from_several_threads_agree():
    query, key, value = random_layer()
    w_o = random_w_o()
    policy = restkv.policy("standard", 40)
    expected = restkv.select(policy, query, key, value, w_o=w_o)
    wrong = []

    def work(threads):
        for _ in range(20):
            if restkv.select(policy, query, key, value, w_o=w_o, threads=threads) != expected:
                wrong.append(threads)

    workers = [threading.Thread(target=work, args=(1 + i % 3,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own():
    query, key, value = random_layer()
    policy = restkv.policy("snap_kv", 40)
    expected = restkv.select(policy, query, key, value, threads=3)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(
        target=lambda: answers.put(restkv.select(policy, query, key, value, threads=3).positions.tolist())
    )
    child.start()
    child.join(30)
    alive = child.is_alive()
    child.kill()
    assert not alive, "the child waits for threads that it does not have"
    assert answers.get() == expected.positions.tolist()


def test_threads_that_are_not_said():
    code = "import restkv; print(restkv.default_threads())"

    def answer(**variables):
        environment = {**{k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}, **variables}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    assert answer(OMP_NUM_THREADS="3").stdout.strip() == "3"
    if hasattr(os, "sched_getaffinity"):
        assert int(answer().stdout) == len(os.sched_getaffinity(0))
    for wrong in (0, -1, 5000):
        with pytest.raises(restkv.Error, match=str(wrong)):
            restkv.select(restkv.policy("snap_kv", 40), *random_layer(), threads=wrong)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_float32_is_not_copied_and_nothing_is_kept():
    key = np.random.default_rng(0).standard_normal((1, 8, 40000, 64), dtype=np.float32)  # 82 MB
    query = key[:, :, -32:].copy()
    policy = restkv.policy("streaming_llm", 512)
    kept = restkv.select(policy, query, key, key)
    assert kept.total == 8 * 512
    code = """if True:
        import resource, numpy, restkv
        key = numpy.ones((1, 8, 40000, 64), numpy.float32)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        policy = restkv.policy("snap_kv", 512)
        kept = restkv.select(policy, key[:, :, -32:], key, key, threads=1)
        restkv.compact(kept, key, key)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / key.nbytes)
    """
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 0.5, f"{grown} of a cache more at the peak"

    for _ in range(3):
        restkv.compact(kept, key, key)
    gc.collect()
    before = resident()
    for _ in range(30):
        restkv.compact(restkv.select(policy, query, key, key), key, key)
    gc.collect()
    assert resident() - before < 0.2 * key.nbytes
