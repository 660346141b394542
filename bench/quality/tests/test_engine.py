# SPDX-License-Identifier: Apache-2.0
"""The engine on a small model with random weights: against plain transformers, and against itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
restkv = pytest.importorskip("restkv")

from quality.engine import Engine, cut_at
from quality.presses import parsed
from quality.tasks.task import LikelihoodSample, Sample
from quality.variants import Comparison, budgeted, variant

WORDS = ["alpha", "beta", "gamma", "delta", "eta", "theta", "iota", "kappa", "mu", "nu", "xi", "pi", "rho", "tau"]


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.6,  # logits far apart, so that rounding decides no token
        eos_token_id=255,
        pad_token_id=254,
    )
    return Engine(transformers.LlamaForCausalLM(config).eval(), Letters())


class Letters:
    """A byte a token. Token 255 ends a text."""

    chat_template = None
    eos_token_id = 255

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids, *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(token) for token in token_ids)


def sample(count: int = 40) -> Sample:
    context = " ".join(WORDS[(i * 5 + i // 7) % len(WORDS)] for i in range(count))
    return Sample("one", context, " and then?", ["x"], max_new_tokens=12, answer_prefix="It is")


def plain_answer(engine: Engine, of: Sample) -> str:
    """What transformers' own cache and greedy generation give."""
    ids = torch.tensor([engine.tokenizer.encode(of.prompt)])
    model = engine.model
    kept, model.config._attn_implementation = model.config._attn_implementation, "sdpa"
    try:
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=of.max_new_tokens, do_sample=False, attention_mask=ids * 0 + 1)
    finally:
        model.config._attn_implementation = kept
    tokens = [t for t in out[0, ids.shape[1] :].tolist() if t != 255]
    return engine.tokenizer.decode(tokens)


@pytest.mark.parametrize("question", ["aware", "agnostic"])
def test_full_cache_and_budgets_beyond_the_prompt_answer_like_transformers(engine, question):
    variants = {"full": None}
    for name in ("standard", "snap_kv_kv_heads", "rest_kv_released", "random_kv_heads"):
        variants[name] = restkv.policy(name, budget=4096)
    answers = engine.answers(sample(), variants, question)
    expected = plain_answer(engine, sample())
    assert {name: answer.text for name, answer in answers.items()} == dict.fromkeys(variants, expected)
    assert len(expected) > 3
    assert answers["full"].kept == 1.0


def test_what_is_decoded_together_changes_no_answer(engine):
    policies = {
        f"{name}@{tokens}": budgeted(restkv.policy(name), tokens, 6, 2)
        for name in ("standard", "snap_kv_kv_heads", "random_kv_heads", "rest_kv_released")
        for tokens in (48, 100, 150)
    }
    variants = {"full": None, **policies}
    together = engine.answers(sample(), variants, "aware")
    alone = {name: engine.answers(sample(), {name: policy}, "aware")[name] for name, policy in variants.items()}
    assert together == alone
    assert len({answer.text for answer in together.values()}) > 3  # eviction does change answers


def test_bytes_are_those_of_the_budget_for_every_kind_of_set(engine):
    per_token = 2 * 2 * 8 * 4 * 2  # layers, KV heads, channels, bytes, keys and values
    answers = engine.answers(
        sample(),
        {
            "kv": budgeted(restkv.policy("snap_kv_kv_heads"), 96, 6, 2),
            "query": budgeted(restkv.policy("rest_kv_released"), 96, 6, 2),
            "ada": budgeted(restkv.policy("standard"), 96, 6, 2),
        },
        "agnostic",
    )
    assert {answer.bytes for answer in answers.values()} == {96 * per_token}


def test_a_budget_that_a_policy_refuses_is_an_answer_with_the_reason(engine):
    answers = engine.answers(
        sample(), {"small": restkv.policy("standard", budget=3), "fits": restkv.policy("standard", budget=64)}, "aware"
    )
    assert "3" in answers["small"].error and "32" in answers["small"].error
    assert answers["fits"].error == "" and answers["fits"].bytes > 0


def test_the_question_is_not_in_the_cache_that_is_compressed_before_it(engine):
    aware, agnostic = engine.prompt(sample(), "aware"), engine.prompt(sample(), "agnostic")
    assert engine.tokenizer.decode(agnostic.before[0].tolist()) == sample().context
    assert aware.after.shape[1] == 1
    assert torch.equal(torch.cat([aware.before, aware.after], 1), torch.cat([agnostic.before, agnostic.after], 1))


@pytest.mark.parametrize("question", ["aware", "agnostic"])
def test_likelihoods_are_those_of_one_forward(engine, question):
    choices = [" one", " twelve", "x", " no"]
    of = LikelihoodSample("two", sample().context, " so:", choices, 1)
    variants = {
        "full": None,
        "all": restkv.policy("standard", budget=4096),
        "few": restkv.policy("standard", budget=64),
    }
    answers = engine.answers(of, variants, question)
    expected = []
    for choice in choices:
        tokens = torch.tensor([engine.tokenizer.encode(of.prompt + choice)])
        with torch.inference_mode():
            logits = engine.model(tokens).logits[0].double().log_softmax(-1)
        n = len(choice)
        expected.append(float(logits[-n - 1 : -1].gather(-1, tokens[0, -n:, None]).sum()))
    assert answers["full"].log_likelihoods == pytest.approx(expected, abs=1e-4)
    assert answers["all"].log_likelihoods == pytest.approx(expected, abs=1e-4)
    assert answers["few"].log_likelihoods != pytest.approx(expected, abs=1e-2)


def test_a_sample_without_a_context_is_refused(engine):
    with pytest.raises(ValueError, match="0 tokens of context"):
        engine.answers(Sample("empty", "", "what?", ["x"], 4), {"full": None}, "aware")


def test_text_ends_at_the_first_stop():
    assert cut_at("one\n\ntwo Q: three", ["Q:", "\n\n"]) == "one"
    assert cut_at("one", ["Q:"]) == "one"


@pytest.mark.parametrize("tokens", [64, 120])
def test_kvpress_answers_as_the_same_policy_of_ours(engine, tokens):
    """SnapKV and KeyDiff, by kvpress and by restkv: other code for scores, eviction, cache and decoding."""
    pytest.importorskip("kvpress")
    comparison = Comparison(window=16, sinks=0, width=5)
    press = {name: parsed(f"kvpress/{name}", comparison) for name in ("SnapKVPress", "KeyDiffPress")}
    variants = {
        "snap": restkv.policy("snap_kv_kv_heads", window=16, recent=16, kernel=5, budget=tokens),
        "SnapKVPress": replace(press["SnapKVPress"], budget=tokens),
        "diff": restkv.policy("key_diff", n_sink=0, recent=0, budget=tokens),
        "KeyDiffPress": replace(press["KeyDiffPress"], budget=tokens),
    }
    for question in ("aware", "agnostic"):
        answers = engine.answers(sample(), variants, question)
        assert answers["snap"].text == answers["SnapKVPress"].text
        assert answers["diff"].text == answers["KeyDiffPress"].text
        assert len({(a.bytes, a.kept, a.error) for a in answers.values()}) == 1
    of = LikelihoodSample("two", sample().context, " so:", [" one", " no"], 1)
    likelihoods = engine.answers(of, variants, "agnostic")
    assert likelihoods["SnapKVPress"].log_likelihoods == pytest.approx(likelihoods["snap"].log_likelihoods, abs=1e-3)
    assert engine.model.config._attn_implementation == "restkv"


def test_a_press_that_kvpress_does_not_have_is_said(engine):
    pytest.importorskip("kvpress")
    variants = {"full": None, "none": replace(parsed("kvpress/NoSuchPress", Comparison()), budget=64)}
    assert "NoSuchPress" in engine.answers(sample(), variants, "aware")["none"].error


def test_a_changed_key_outdoes_what_rows_have_in_common():
    comparison = Comparison(width=5)
    assert variant("standard", comparison).keys()["kernel"] == 5
    keys = variant("standard:spatial=following,kernel=11", comparison).keys()
    assert (keys["spatial"], keys["kernel"], keys["window"]) == ("following", 11, comparison.window)
