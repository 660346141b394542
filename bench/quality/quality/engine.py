# SPDX-License-Identifier: Apache-2.0
"""Reads a prompt once and answers it from many compressed caches.

The prompt is prefilled with the full cache, once a sample. Each variant evicts from a fork of that cache, and variants of
a kind are decoded as one batch. The last token of the prompt is always read through the compressed cache: not even the
first token of an answer comes from the full one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import restkv
import torch
from restkv.transformers import RestKVCache
from transformers import DynamicCache

from . import presses
from .presses import PressVariant
from .tasks.task import LikelihoodSample, Sample, join

# When the question comes: before the eviction, or only to the compressed cache.
Question = Literal["aware", "agnostic"]


@dataclass(frozen=True)
class Answer:
    """What a variant made of a sample."""

    bytes: int  # of keys and values, when the question has been read
    kept: float  # tokens kept of those that were there to evict, as a fraction
    text: str = ""
    log_likelihoods: tuple[float, ...] = ()
    error: str = ""  # why there is no answer


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt, cut where the eviction is."""

    before: torch.Tensor  # [1, n]: prefilled
    after: torch.Tensor  # [1, m], m >= 1: read through the compressed cache


class PressedCache:
    """A cache that a press made, which knows less of its tokens than came: with the positions of those to come."""

    def __init__(self, cache: DynamicCache, seen: int):
        self.cache = cache
        self.seen = seen

    def next_positions(self, tokens: int) -> torch.Tensor:
        """`position_ids` [1, tokens]; they are counted as read."""
        first, self.seen = self.seen, self.seen + tokens
        return torch.arange(first, self.seen)[None]

    def attention_mask(self, tokens: int) -> None:
        """None is needed: there is one sequence, and no padding."""

    def fork(self) -> PressedCache:
        """A copy that goes its own way."""
        return PressedCache(copy.deepcopy(self.cache), self.seen)


class Engine:
    """A model that answers. `batch`: variants that are decoded together at most; `chunk`: tokens a prefill takes at once,
    which bounds the memory of long prompts."""

    def __init__(self, model: Any, tokenizer: Any, *, batch: int = 64, chunk: int = 8192, threads: int | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.batch = batch
        self.chunk = chunk
        self.threads = threads
        # transformers renamed the argument in its fifth major version.
        named = inspect.signature(model.forward).parameters
        self.cache_argument = "cache" if "cache" in named else "past_key_values"
        config = model.config.get_text_config()
        self.query_heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.query_heads
        stops = model.generation_config.eos_token_id
        self.stop_tokens = set(stops if isinstance(stops, list) else [stops])
        if tokenizer.eos_token_id is not None:
            self.stop_tokens.add(tokenizer.eos_token_id)

    def prompt(self, sample: Sample | LikelihoodSample, question: Question) -> Prompt:
        """A sample as the model wants it. The cut between context and question is one between tokens."""
        prefix = sample.answer_prefix if isinstance(sample, Sample) else ""
        plain = not sample.meta.get("chat", True) or self.tokenizer.chat_template is None
        if plain:
            text = join(sample.context + sample.question, prefix)
            begin, special = 0, True
        else:
            message = [{"role": "user", "content": sample.context + sample.question}]
            text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            # A template may trim the message.
            begin = text.find(sample.context.strip())
            if begin < 0:
                raise ValueError(f"{sample.id}: the chat template changes the context")
            text, special = text + prefix, False
        cut = begin + len(sample.context if plain else sample.context.strip())
        context = self.tokenizer.encode(text[:cut], add_special_tokens=special)
        rest = self.tokenizer.encode(text[cut:], add_special_tokens=False)
        if not context or not rest:
            raise ValueError(
                f"{sample.id}: {len(context)} tokens of context and {len(rest)} behind it: both are needed"
            )
        tokens = torch.tensor([context + rest], device=self.model.device)
        at = len(context) if question == "agnostic" else tokens.shape[1] - 1
        return Prompt(tokens[:, :at], tokens[:, at:])

    @torch.inference_mode()
    def prefill(self, prompt: Prompt, policies: Sequence[restkv.Policy | None]) -> RestKVCache:
        """The full cache of what comes before the eviction, with the queries that the policies look at."""
        windows = [p.window for p in policies if p is not None and "queries" in p.needs]
        window = "all" if None in windows else max(windows, default=1)
        cache = RestKVCache(None, self.model, when="manual", window=window, threads=self.threads)
        for part in prompt.before.split(self.chunk, dim=1):
            self.model(part, **{self.cache_argument: cache}, use_cache=True, logits_to_keep=1)
        return cache

    def answers(
        self,
        sample: Sample | LikelihoodSample,
        variants: Mapping[Any, restkv.Policy | PressVariant | None],
        question: Question,
    ) -> dict[Any, Answer]:
        """What each variant answers. One whose policy refuses the prompt, as a budget below what it protects, answers
        with the error."""
        prompt = self.prompt(sample, question)
        by_press = {name: v for name, v in variants.items() if isinstance(v, PressVariant)}
        variants = {name: v for name, v in variants.items() if name not in by_press}
        full = self.prefill(prompt, list(variants.values()))
        everything = full.bytes()
        answers: dict[Any, Answer] = {}
        compressed: dict[Any, RestKVCache] = {}
        for name, policy in variants.items():
            try:
                compressed[name] = full.fork() if policy is None else full.fork().evict(policy)
            except restkv.Error as error:
                answers[name] = Answer(0, 0.0, error=str(error))
        for group in batches(variants, compressed, self.batch):
            stored = [compressed[name].bytes() for name in group]
            stacked = RestKVCache.stack([compressed.pop(name) for name in group])
            if isinstance(sample, Sample):
                outcomes: list[Any] = self.write(stacked, prompt.after, len(group), sample)
            else:
                outcomes = self.judge(stacked, prompt.after, len(group), sample)
            for name, bytes_, outcome in zip(group, stored, outcomes, strict=True):
                answers[name] = as_answer(outcome, bytes_, everything)
        for name, press in by_press.items():
            answers[name] = self.answer_by_press(prompt, sample, press, everything)
        return answers

    @torch.inference_mode()
    def answer_by_press(
        self, prompt: Prompt, sample: Sample | LikelihoodSample, press: PressVariant, everything: int
    ) -> Answer:
        """What a press of kvpress answers: with a prefill, and decoding, of its own."""
        attention = self.model.config._attn_implementation
        try:
            cache, bytes_ = presses.compressed(self.model, self.cache_argument, prompt.before, press)
            pressed = PressedCache(cache, prompt.before.shape[1])
            read = self.write if isinstance(sample, Sample) else self.judge
            return as_answer(read(pressed, prompt.after, 1, sample)[0], bytes_, everything)
        except restkv.Error as error:
            return Answer(0, 0.0, error=str(error))
        finally:
            self.model.set_attn_implementation(attention)
            for layer in self.model.model.layers:
                layer.self_attn.masked_key_indices = None

    def forward(self, cache: RestKVCache | PressedCache, tokens: torch.Tensor, keep: int) -> torch.Tensor:
        """Logits [batch, keep, vocabulary] of the last tokens."""
        count = tokens.shape[1]
        return self.model(
            tokens,
            **{self.cache_argument: cache.cache if isinstance(cache, PressedCache) else cache},
            attention_mask=cache.attention_mask(count),
            position_ids=cache.next_positions(count),
            use_cache=True,
            logits_to_keep=keep,
        ).logits

    @torch.inference_mode()
    def write(self, cache: RestKVCache | PressedCache, after: torch.Tensor, rows: int, sample: Sample) -> list[str]:
        """Greedy decoding of all rows, until each has ended."""
        tokens = after.expand(rows, -1)
        written: list[list[int]] = [[] for _ in range(rows)]
        running = set(range(rows))
        stops = list(sample.meta.get("stop", ()))
        for _ in range(sample.max_new_tokens):
            tokens = self.forward(cache, tokens, 1)[:, -1].argmax(-1, keepdim=True)
            for row in tuple(running):
                token = int(tokens[row])
                if token in self.stop_tokens:
                    running.discard(row)
                    continue
                written[row].append(token)
                if stops and any(stop in self.tokenizer.decode(written[row]) for stop in stops):
                    running.discard(row)
            if not running:
                break
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in written]
        return [cut_at(text, stops) for text in texts]

    @torch.inference_mode()
    def judge(
        self, cache: RestKVCache | PressedCache, after: torch.Tensor, rows: int, sample: LikelihoodSample
    ) -> list[tuple[float, ...]]:
        """Log-likelihood of each choice behind the prompt, in nats, summed over its tokens."""
        choices = [self.tokenizer.encode(choice, add_special_tokens=False) for choice in sample.choices]
        if not all(choices):
            raise ValueError(f"{sample.id}: choice {choices.index([])} has 0 tokens")
        # What all choices have in common is read once; each choice then goes on from a fork.
        first = self.forward(cache, after.expand(rows, -1), 1)[:, -1].log_softmax(-1)
        sums = []
        for choice in choices:
            total = first[:, choice[0]].double()
            if len(choice) > 1:
                told = torch.tensor([choice], device=after.device)
                logits = self.forward(cache.fork(), told[:, :-1].expand(rows, -1), 0)
                likelihoods = logits.log_softmax(-1).gather(-1, told[:, 1:, None].expand(rows, -1, 1))
                total = total + likelihoods.double().sum((1, 2))
            sums.append(total)
        return [tuple(row) for row in torch.stack(sums, 1).tolist()]


def as_answer(outcome: str | tuple[float, ...], stored: int, everything: int) -> Answer:
    """A text or log-likelihoods, with the bytes they come from."""
    fields: dict[str, Any] = {"text": outcome} if isinstance(outcome, str) else {"log_likelihoods": outcome}
    return Answer(stored, stored / everything, **fields)


def batches(
    variants: Mapping[Any, restkv.Policy | None], caches: Mapping[Any, RestKVCache], size: int
) -> list[list[Any]]:
    """Names of variants that are decoded together: with as many sets a layer, their rows about as long."""
    by_sets: dict[bool, list[Any]] = {}
    for name in sorted(caches, key=lambda name: caches[name].bytes()):
        policy = variants[name]
        by_sets.setdefault(policy is not None and policy.keys().get("group") == "none", []).append(name)
    return [names[i : i + size] for names in by_sets.values() for i in range(0, len(names), size)]


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the strings that end it."""
    ends = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return text[: min(ends)] if ends else text
