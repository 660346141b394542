# SPDX-License-Identifier: Apache-2.0
"""Budgets over the layers of a model: kept sets of the program, of plain NumPy, and of single layers."""

import itertools
import json
import subprocess

import numpy as np
import pytest
import restkv
from case_layers import GOLDEN, TRACE, program, random_layer, random_w_o, read, trace_layers

OVER_LAYERS = [name for name in restkv.policies() if restkv.policy(name).over_layers]


def random_layers(count: int, **shape: int) -> list[dict]:
    """Layers whose keys and values grow from one to the next, so that shares differ."""
    layers = []
    for index in range(count):
        query, key, value = random_layer(**shape)
        order = np.random.default_rng(index).permutation(key.shape[2])
        layers.append(
            {"query": query, "key": key[:, :, order] * (1 + index), "value": value[:, :, order] * (1 + index)}
        )
        layers[-1]["w_o"] = random_w_o() + index
    return layers


def positions_of(runs: list[int]) -> list[int]:
    """From the lengths of dropped and kept runs in turn to the kept positions."""
    ends = list(itertools.accumulate(runs))
    return [n for begin, end in zip(ends[::2], ends[1::2], strict=True) for n in range(begin, end)]


def test_the_program_keeps_the_same():
    indices = [1, 10, 28]
    budget = 48
    command = [program(), "compare", TRACE, "--policies", *OVER_LAYERS, "--budgets", str(budget), "--json", "--kept"]
    done = subprocess.run(
        [*command, "--layers", *map(str, indices), "--quiet"], check=True, capture_output=True, text=True
    )
    layers = trace_layers(indices)
    group = layers[0]["query"].shape[1] // layers[0]["key"].shape[1]
    kept = {name: restkv.select_layers(restkv.policy(name, budget * group), layers) for name in OVER_LAYERS}
    compared = 0
    for row in json.loads(done.stdout)["kept"]:
        ours = kept[row["policy"]][indices.index(row["layer"])]
        assert [of_head.tolist() for of_head in ours] == [positions_of(runs) for runs in row["heads"]], row["policy"]
        compared += 1
    assert compared == len(OVER_LAYERS) * len(indices) == 15
    totals = {sum(of_layer.total for of_layer in of_model) for of_model in kept.values()}
    assert totals == {len(indices) * layers[0]["key"].shape[1] * budget * group}


def test_one_competition_is_one_sort():
    layers = random_layers(3, batch=2, tokens=70)
    policy = restkv.policy("knorm", 20, allocation="global", n_sink=2, recent=5)
    kept = restkv.select_layers(policy, layers)
    for b in range(2):
        scores = np.stack([-np.linalg.norm(layer["key"][b].astype(np.float64), axis=-1) for layer in layers])
        scores[:, :, :2] = scores[:, :, -5:] = np.inf
        best = np.argsort(-scores.reshape(-1), kind="stable")[: 3 * 2 * 20]
        expected = np.zeros(scores.size, bool)
        expected[best] = True
        ours = np.stack([of_layer.mask(70)[b] for of_layer in kept])
        assert (ours == expected.reshape(scores.shape)).all()


@pytest.mark.parametrize("path", [p for p in GOLDEN if "adakv" in p.name or "caote-" in p.name], ids=lambda p: p.stem)
def test_a_model_of_one_layer_is_a_layer(path):
    case = read(path)
    policy = restkv.policy(**case.case).replace(group="mean", allocation="adakv", floor=0.0, normalize=False)
    alone = restkv.select(policy, *case.layer(), w_o=case.tensors["wo"])
    (kept,) = restkv.select_layers(policy.replace(allocation="global"), [(*case.layer(), case.tensors["wo"])])
    assert kept == alone


@pytest.mark.parametrize("name", OVER_LAYERS)
def test_layers_come_in_one_by_one(name):
    layers = random_layers(4)
    policy = restkv.policy(name, 30, window=8)
    expected = restkv.select_layers(policy, layers)
    model = restkv.ModelSelection(policy, layers=4)
    cache = []
    for index, layer in enumerate(layers):
        model.add(**layer)
        assert model.layers == index + 1
        cache.append(layer["key"])
        for earlier in range(index + 1):
            if model.evicted(earlier):
                cache[earlier], _ = restkv.compact(model.cache_slots(earlier), cache[earlier], cache[earlier])
        sizes = [model.kept(earlier).total for earlier in range(index + 1)]
        assert sum(sizes) <= 4 * 2 * 2 * 30
    assert [model.kept(index) for index in range(4)] == expected
    assert sum(kept.total for kept in expected) == 4 * 2 * 2 * 30  # layers, sequences, heads, tokens
    assert len({kept.total for kept in expected}) > 1
    for index, kept in enumerate(expected):
        whole, _ = restkv.compact(kept, layers[index]["key"], layers[index]["key"])
        for b, h in itertools.product(range(2), range(2)):
            length = kept.lengths[b, h]
            np.testing.assert_array_equal(cache[index][b, h, :length], whole[b, h, :length])


@pytest.mark.parametrize("name", OVER_LAYERS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_sequences_of_other_lengths(name, padding):
    layers = random_layers(3, queries=96)
    lengths = np.array([96, 60])
    policy = restkv.policy(name, 30, window=8)
    together = restkv.select_layers(policy, layers, lengths=lengths, padding=padding)
    for b, length in enumerate(lengths):
        part = slice(96 - length, 96) if padding == "left" else slice(0, length)
        alone = [{k: x if k == "w_o" else x[b : b + 1, :, part] for k, x in layer.items()} for layer in layers]
        for kept, of_both in zip(restkv.select_layers(policy, alone), together, strict=True):
            for h in range(2):
                assert of_both[b, h].tolist() == (kept[0, h] + part.start).tolist()


def test_layers_as_tuples_and_policies_of_one_layer():
    layers = random_layers(3)
    metric = restkv.Metric(layers[0]["w_o"], 4)
    tuples = [(layer["query"], layer["key"], layer["value"], metric) for layer in layers]
    policy = restkv.policy("lowest_error_global", 30, window=8)
    same = [{**layer, "w_o": layers[0]["w_o"]} for layer in layers]
    assert restkv.select_layers(policy, tuples) == restkv.select_layers(policy, same, threads=2)
    pyramid = restkv.policy("pyramid_kv", 30, window=8)
    alone = [restkv.select(pyramid, *of[:3], layer_index=i, layer_count=3) for i, of in enumerate(tuples)]
    assert restkv.select_layers(pyramid, tuples) == alone
    assert restkv.select_layers(policy, []) == restkv.select_layers(pyramid, []) == []
    with pytest.raises(restkv.Error, match="layer 1 is a sequence of 2"):
        restkv.select_layers(policy, [tuples[0], tuples[1][:2]])
    with pytest.raises(restkv.Error, match="layer 0 has no key, only 'value'"):
        restkv.select_layers(policy, [{"value": tuples[0][2]}])


def test_what_is_refused():
    layer = random_layers(1)[0]
    policy = restkv.policy("lava_layers", 30, window=8)
    with pytest.raises(restkv.Error, match="select_layers") as caught:
        restkv.select(policy, layer["query"], layer["key"], layer["value"])
    assert caught.value.code == "unsupported"
    with pytest.raises(restkv.Error, match="session evicts each layer by itself"):
        restkv.Session(
            policy.replace(rescoring="none", method="snapkv", allocation="global"),
            layers=1,
            query_heads=4,
            kv_heads=2,
            head_dim=16,
        )
    with pytest.raises(restkv.Error, match="adakv is of each layer by itself"):
        restkv.ModelSelection(restkv.policy("standard"), 3)
    with pytest.raises(restkv.Error, match="layers is 0"):
        restkv.ModelSelection(policy, 0)
    with pytest.raises(restkv.Error, match="criticalkv"):
        restkv.select_layers(restkv.policy("critical_kv", 30, window=8, allocation="global"), [layer])
    with pytest.raises(restkv.Error, match="snapkv with the group's mean"):
        restkv.select_layers(policy.replace(allocation="cake"), [layer])
    with pytest.raises(restkv.Error, match="budget is 5"):
        restkv.select_layers(policy.replace(budget=5), [layer])

    model = restkv.ModelSelection(policy, 1, tokens=100)
    with pytest.raises(restkv.Error, match="layer 0 is not there: 0 of 1"):
        model.kept(0)
    model.add(**layer)
    kept = model.kept(0)
    for wrong in (layer, {**layer, "key": layer["key"][:1]}):
        with pytest.raises(restkv.Error):
            model.add(**wrong)
    assert model.kept(0) == kept and model.layers == 1
    two = restkv.ModelSelection(policy, 2)
    two.add(**layer)
    longer = {name: x if name == "w_o" else np.repeat(x, 2, axis=2) for name, x in layer.items()}
    with pytest.raises(restkv.Error, match="192 tokens, the plan has 96"):
        two.add(**longer)
    two.add(**layer)
    assert two.layers == 2
