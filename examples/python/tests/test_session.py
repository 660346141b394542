# SPDX-License-Identifier: Apache-2.0
"""Sessions: eviction while a sequence grows."""

import threading

import numpy as np
import pytest
import restkv
from case_layers import random_layer, random_w_o


def stream(tokens=200, **sizes):
    return random_layer(batch=1, tokens=tokens, **sizes)


def make(name="snap_kv", budget=32, **options):
    policy = restkv.policy(name, budget, window=8)
    policy = policy.replace(recent=min(policy.keys()["recent"], 8))
    return restkv.Session(policy, layers=2, query_heads=4, kv_heads=2, head_dim=16, **options)


def append(session, layer, arrays, begin, end):
    query, key, value = (array[0, :, begin:end] for array in arrays)
    session.append(layer, query, key, value)


def content(session, layer):
    key, value = session.cache(layer)
    lengths = session.lengths(layer)
    return [
        (session.positions(layer, h).tolist(), key[h, : lengths[h]].tolist(), value[h, : lengths[h]].tolist())
        for h in range(2)
    ]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("standard", {}),
        ("snap_kv", {"evict_every": 5}),
        ("h2o", {}),
        ("tova", {}),
        ("key_diff", {}),
        ("lag_kv", {"high_water": 400}),
        ("streaming_llm", {}),
        ("random", {}),
        ("standard", {"running": True, "refresh": 2}),
        ("snap_kv", {"running": True}),
    ],
)
def test_pieces_do_not_matter(name, options):
    arrays = stream(500 if name == "lag_kv" else 200)
    budget = 300 if name == "lag_kv" else 32
    whole, pieces = make(name, budget, **options), make(name, budget, **options)
    for session in (whole, pieces):
        if session.policy.needs_w_o:
            session.set_metric(1, restkv.Metric(random_w_o(), 4))
    count = arrays[1].shape[2]
    append(whole, 1, arrays, 0, count)
    for begin in range(0, count, 7):
        append(pieces, 1, arrays, begin, min(begin + 7, count))
    assert whole.evictions(1) >= 1 and whole.tokens_seen(1) == count and whole.tokens_seen(0) == 0
    assert content(whole, 1) == content(pieces, 1)
    for positions, key, value in content(whole, 1):
        head = content(whole, 1).index((positions, key, value))
        assert positions == sorted(set(positions)) and positions[-1] == count - 1
        assert key == arrays[1][0, head, positions].tolist() and value == arrays[2][0, head, positions].tolist()
    assert sum(whole.lengths(1)) <= 2 * whole.high_water


def test_an_eviction_is_a_selection():
    query, key, value = arrays = stream(60)
    session = make("snap_kv", 32, high_water=100)
    append(session, 0, arrays, 0, 60)
    assert (session.evictions(0), session.room(0)) == (0, 40)
    session.evict_if_due(0)
    assert session.evictions(0) == 0
    session.evict(0)
    kept = restkv.select(session.policy, query, key, value)
    assert [session.positions(0, h).tolist() for h in range(2)] == [kept[0, h].tolist() for h in range(2)]
    assert session.lengths(0).tolist() == [32, 32]
    packed = restkv.compact(kept, key, value)
    made = session.cache(0)
    assert (made[0] == packed[0][0]).all() and (made[1] == packed[1][0]).all()


def test_h2o_sums_the_attention_of_all_queries():
    query, key, value = arrays = stream(60)
    session = make("h2o", 32, high_water=100)
    append(session, 0, arrays, 0, 60)
    session.evict(0)
    kept = restkv.select(session.policy, query, key, value)
    assert [session.positions(0, h).tolist() for h in range(2)] == [kept[0, h].tolist() for h in range(2)]


def test_speculation_can_be_taken_back():
    arrays = stream(200)
    session = make("snap_kv", speculation=8)
    append(session, 0, arrays, 0, 100)
    before = content(session, 0)
    session.begin_speculation()
    append(session, 0, arrays, 100, 106)
    assert session.speculating and content(session, 0) != before
    session.rollback()
    assert content(session, 0) == before and not session.speculating
    plain = make("snap_kv")
    append(plain, 0, arrays, 0, 103)
    one_layer = restkv.Session(session.policy, layers=1, query_heads=4, kv_heads=2, head_dim=16, speculation=8)
    append(one_layer, 0, arrays, 0, 100)
    one_layer.begin_speculation()
    append(one_layer, 0, arrays, 100, 106)
    one_layer.commit(3)
    assert content(one_layer, 0) == content(plain, 0)


def test_forks_go_their_own_ways():
    arrays = stream(200)
    session = make("standard")
    session.set_metric(0, restkv.Metric(random_w_o(), 4))
    append(session, 0, arrays, 0, 100)
    fork = session.fork()
    assert content(fork, 0) == content(session, 0)
    before = content(session, 0)
    append(fork, 0, arrays, 100, 150)
    assert content(session, 0) == before
    append(session, 0, arrays, 100, 150)
    assert content(session, 0) == content(fork, 0)
    session.clear()
    assert session.tokens_seen(0) == 0 and session.lengths(0).tolist() == [0, 0]
    assert fork.tokens_seen(0) == 150


def test_a_second_thread_is_told_to_wait():
    """Neither crashes, and what was told to wait has changed nothing."""
    arrays = stream(20000)
    session = make("caote", 256)
    refused = []

    def work():
        for begin in range(0, 20000, 500):
            try:
                append(session, 0, arrays, begin, begin + 500)
            except restkv.Error as error:
                assert "another thread" in str(error)
                refused.append(begin)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert session.tokens_seen(0) == 4 * 20000 - 500 * len(refused)


def test_memory_is_taken_once():
    session = make(budget=32)
    size = session.bytes
    append(session, 0, stream(3000), 0, 3000)
    assert session.bytes == size > 0 and session.evictions(0) > 100


def test_views_outlive_the_session():
    session = make()
    append(session, 0, stream(200), 0, 200)
    key, _ = session.cache(0)
    copy = key.copy()
    del session
    assert (key == copy).all()


def test_tensors_of_16_bits_with_a_batch_of_one():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    query, key, value = arrays = [torch.from_numpy(array).bfloat16() for array in stream(100)]
    session, plain = make(), make()
    session.append(0, query, key, value)
    append(plain, 0, [x.float().numpy() for x in arrays], 0, 100)
    assert isinstance(session.cache(0)[0], torch.Tensor)
    assert content(session, 0) == content(plain, 0)


@pytest.mark.parametrize(
    ("attempt", "text"),
    [
        (lambda s, q, k, v: s.append(2, q, k, v), "layer 2 of 2"),
        (lambda s, q, k, v: s.append(-1, q, k, v), "layer -1"),
        (lambda s, q, k, v: s.append(0, None, k, v), "query is None"),
        (lambda s, q, k, v: s.append(0, q[:, :3], k, v), "query"),
        (lambda s, q, k, v: s.append(0, q, k[:1], v), "key"),
        (lambda s, q, k, v: s.append(0, q, k, v[..., :5]), "value"),
        (lambda s, q, k, v: s.append(0, q, np.stack([k, k]), v), "2 sequences"),
        (lambda s, q, k, v: s.evict(7), "layer 7"),
        (lambda s, q, k, v: s.cache(7), "layer 7"),
        (lambda s, q, k, v: s.positions(0, 5), "head 5 of 2"),
        (lambda s, q, k, v: s.room(9), "layer 9"),
        (lambda s, q, k, v: s.commit(1), "begin_speculation"),
        (lambda s, q, k, v: s.begin_speculation(), "speculation 0"),
        (lambda s, q, k, v: make(high_water=32), "high_water"),
        (lambda s, q, k, v: make("critical_kv"), "criticalkv"),
        (lambda s, q, k, v: make("rest_kv_paper"), "one set per KV head"),
        (lambda s, q, k, v: make("key_diff", running=True), "keydiff"),
        (lambda s, q, k, v: make(threads=0), "threads is 0"),
        (lambda s, q, k, v: restkv.Session(s.policy, layers=0, query_heads=4, kv_heads=2, head_dim=16), "layers is 0"),
        (lambda s, q, k, v: restkv.Session(s.policy, layers=1, query_heads=3, kv_heads=2, head_dim=16), "multiple"),
    ],
)
def test_errors(attempt, text):
    session = make()
    arrays = stream(20)
    append(session, 0, arrays, 0, 20)
    before = content(session, 0)
    with pytest.raises(restkv.Error, match=text):
        attempt(session, *(array[0] for array in arrays))
    assert content(session, 0) == before


def test_a_metric_is_needed_where_distances_are_measured_through_w_o():
    session = make("standard")
    with pytest.raises(restkv.Error, match="W_O"):
        append(session, 0, stream(100), 0, 100)
    with pytest.raises(restkv.Error, match="2 of 8|heads"):
        session.set_metric(0, restkv.Metric(random_w_o(8, 16), 8))
        append(session, 0, stream(100), 0, 100)
