# SPDX-License-Identifier: Apache-2.0
"""Policies as values."""

import copy
import json
import pickle
import subprocess

import numpy as np
import pytest
import restkv
from case_layers import program


def test_every_policy_of_the_program_is_there():
    listed = json.loads(
        subprocess.run([program(), "compare", "--list-policies", "--json"], capture_output=True, check=True).stdout
    )
    rows = listed if isinstance(listed, list) else listed["policies"]
    beyond_a_layer = {"anticipated", "set_error", "anticipated_fitted", "set_error_fitted"}
    names = {row["name"] for row in rows if row["name"] not in beyond_a_layer}
    assert set(restkv.policies()) == names
    for row in rows:
        if row["name"] in names:
            assert restkv.policies()[row["name"]] == row["description"]


@pytest.mark.parametrize("name", [*restkv.policies(), "snap_kv", "snapkv", "restkv", "tova", "streaming_llm"])
def test_keys_and_pickles_make_the_same_policy(name):
    policy = restkv.policy(name, budget=100)
    again = restkv.policy(**policy.keys())
    assert again == policy and hash(again) == hash(policy)
    for twin in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy), eval(repr(policy))):
        assert twin == policy and twin.name == name


def test_what_is_left_out_is_the_default():
    policy = restkv.policy()
    assert policy == restkv.policy("standard", 1024)
    assert (policy.name, policy.budget, policy.window) == ("standard", 1024, 32)
    assert policy.keys()["allocation"] == "adakv"
    assert restkv.policy("standard", kernel=None) == policy


def test_replace_changes_what_it_is_told():
    policy = restkv.policy("snap_kv", 64, window=16)
    other = policy.replace(kernel=7, budget=65)
    assert (other.budget, other.keys()["kernel"], other.window) == (65, 7, 16)
    assert policy.budget == 64 and other != policy
    assert other.replace(kernel=policy.keys()["kernel"], budget=64) == policy
    tova = policy.replace(method="tova")
    assert (tova.keys()["method"], tova.budget, tova.window) == ("tova", 64, 16)
    assert policy != "snap_kv" and policy is not None


def test_a_ratio_and_a_budget_exclude_each_other():
    policy = restkv.policy("snap_kv", compression_ratio=0.75)
    keys = policy.keys()
    assert "budget" not in keys and policy.compression_ratio == 0.75
    assert policy.replace(budget=50).compression_ratio == 0
    with pytest.raises(restkv.Error, match="exclude each other"):
        restkv.policy("snap_kv", 10, compression_ratio=0.5)
    with pytest.raises(restkv.Error, match="1.5"):
        restkv.policy("snap_kv", compression_ratio=1.5)


def test_numbers_of_numpy_are_numbers():
    policy = restkv.policy("standard", np.int64(77), tau=np.float32(0.5), shared=False)
    assert policy == restkv.policy("standard", 77, tau=0.5)


def test_the_full_cache_has_no_budget():
    assert restkv.policy("full_cache", 8) == restkv.policy("full_cache")
    key = np.zeros((1, 1, 50, 4), np.float32)
    assert restkv.select(restkv.policy("full_cache", 8), None, key, None).total == 50


def test_what_a_policy_looks_at():
    assert restkv.policy("standard").needs == ("queries", "keys", "values", "wo")
    assert restkv.policy("snap_kv").needs == ("queries", "keys")
    assert restkv.policy("streaming_llm").needs == ()
    assert restkv.policy("standard").needs_w_o and not restkv.policy("caote").needs_w_o
    assert restkv.policy("h2o").needs_every_query and not restkv.policy("tova").needs_w_o
    assert not restkv.policy("standard").needs_every_query
    assert restkv.policy("rest_kv_paper").per_query_head and not restkv.policy("standard").per_query_head


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: restkv.policy("no_such"), "no_such"),
        (lambda: restkv.policy("standard", no_such=1), "no_such"),
        (lambda: restkv.policy("standard", budget="many"), "budget"),
        (lambda: restkv.policy("standard", budget=1 << 70), "64 bits"),
        (lambda: restkv.policy("standard", kernel=2.5), "2.5"),
        (lambda: restkv.policy("standard", spatial="cubic"), "cubic"),
        (lambda: restkv.policy("standard", shared=1), "shared"),
        (lambda: restkv.policy("standard", tau=[1]), "list"),
        (lambda: restkv.policy("standard", method="tova"), "exclude"),
        (lambda: restkv.policy(method="no_such"), "no_such"),
        (lambda: restkv.policy("set_error"), "set_error"),
        (lambda: restkv.policy("anticipated"), "anticipated"),
        (lambda: restkv.policy().replace(window=-(1 << 64)), "64 bits"),
    ],
)
def test_errors_name_what_is_wrong(make, text):
    with pytest.raises(restkv.Error, match=text) as caught:
        make()
    assert isinstance(caught.value, ValueError)
    assert caught.value.code in ("invalid_argument", "unsupported")


def test_an_error_can_be_pickled():
    with pytest.raises(restkv.Error) as caught:
        restkv.ModelSelection(restkv.policy(), 3)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.code) == (str(caught.value), "unsupported")


def test_policies_do_not_change():
    policy = restkv.policy()
    for name in ("budget", "window", "name", "anything"):
        with pytest.raises(AttributeError):
            setattr(policy, name, 3)
