# SPDX-License-Identifier: Apache-2.0
"""LongBench (Bai et al., arXiv 2308.14508): its 16 English tasks, from the published files.

The prompts, the lengths of the answers and which metric a task has are the benchmark's own (github.com/THUDM/LongBench,
MIT licence); so is that prompts are cut in the middle, and that few-shot and code tasks are not put into a chat
template. Files: data/longbench/<task>.jsonl, or <task>_e.jsonl of LongBench-E when there is no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..metrics.longbench import classification_score, code_similarity, count_score, retrieval_score
from ..metrics.overlap import answer_f1, rouge_l
from .prompt import Prompt
from .published import PublishedTask
from .task import Sample

_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
_QASPER = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)
_STORY = "as concisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"

_METRICS: dict[str, Callable[[str, str, Any], float]] = {
    "F1": lambda prediction, truth, _: answer_f1(prediction, truth),
    "ROUGE-L": lambda prediction, truth, _: rouge_l(prediction, truth),
    "classification": classification_score,
    "count": lambda prediction, truth, _: count_score(prediction, truth),
    "retrieval": lambda prediction, truth, _: retrieval_score(prediction, truth),
    "edit similarity": lambda prediction, truth, _: code_similarity(prediction, truth),
}


@dataclass(frozen=True)
class Kind:
    """A task's prompt, metric and answer length [tokens]."""

    prompt: str
    metric: str
    max_new_tokens: int
    chat: bool = True
    first_line: bool = False  # only the answer's first line is scored
    stop: tuple[str, ...] = ()


KINDS = {
    "narrativeqa": Kind(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        f"{_STORY}Story: {{context}}\n\nNow, answer the question based on the story {_STORY}"
        "Question: {input}\n\nAnswer:",
        "F1",
        128,
    ),
    "qasper": Kind(
        f"You are given a scientific article and a question. Answer the question {_QASPER}Article: {{context}}\n\n "
        f"Answer the question based on the above article {_QASPER}Question: {{input}}\n\nAnswer:",
        "F1",
        128,
    ),
    "multifieldqa_en": Kind(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        "F1",
        64,
    ),
    "hotpotqa": Kind(_PASSAGES, "F1", 32),
    "2wikimqa": Kind(_PASSAGES, "F1", 32),
    "musique": Kind(_PASSAGES, "F1", 32),
    "gov_report": Kind(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
        "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
        "ROUGE-L",
        512,
    ),
    "qmsum": Kind(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
        "in one or more sentences.\n\nQuery: {input}\nAnswer:",
        "ROUGE-L",
        512,
    ),
    "multi_news": Kind(
        "You are given several news passages. Write a one-page summary of all news. \n\n"
        "News:\n{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
        "ROUGE-L",
        512,
    ),
    "trec": Kind(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        "classification",
        64,
        chat=False,
        first_line=True,
    ),
    "triviaqa": Kind(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        "F1",
        32,
        chat=False,
        first_line=True,
    ),
    "samsum": Kind(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        "ROUGE-L",
        128,
        chat=False,
        first_line=True,
        stop=("\n",),
    ),
    "passage_count": Kind(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of "
        "unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, "
        "3, and so on.\n\nThe final answer is: ",
        "count",
        32,
    ),
    "passage_retrieval_en": Kind(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph "
        'that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\n'
        "The answer is: ",
        "retrieval",
        32,
    ),
    "lcc": Kind(
        "Please complete the code given below. \n{context}Next line of code:\n", "edit similarity", 64, chat=False
    ),
    "repobench-p": Kind(
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        "edit similarity",
        64,
        chat=False,
    ),
}


class LongBench(PublishedTask):
    """One task. A prompt longer than asked for is cut in the middle, a shorter one stays as it is."""

    fields = ("input", "context", "answers", "all_classes")

    def __init__(self, task: str, folder: Path) -> None:
        super().__init__(folder)
        self.task = task
        self.kind = KINDS[task]
        self.name = f"longbench/{task}"
        self.metric = self.kind.metric
        self.max_new_tokens = self.kind.max_new_tokens
        self.meta = {"chat": self.kind.chat, "stop": list(self.kind.stop)}

    @property
    def file_names(self) -> list[str]:
        return [f"{self.task}.jsonl", f"{self.task}_e.jsonl"]

    @property
    def origin(self) -> str:
        return (
            "LongBench's data.zip, unpacked; one object a line, {input, context, answers: [text], length, dataset, "
            "language, all_classes: [text] or null, _id}"
        )

    def prompt(self, row: Mapping[str, Any]) -> Prompt:
        before, behind = self.kind.prompt.split("{context}")
        return Prompt(
            context=before + row["context"],
            question=behind.replace("{input}", row["input"]),
            answers=list(row["answers"]),
            meta={"classes": row["all_classes"], "words": row.get("length")},
        )

    def score(self, prediction: str, sample: Sample) -> float:
        """The best score over the right answers."""
        if self.kind.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        metric = _METRICS[self.metric]
        return max(metric(prediction, answer, sample.meta["classes"]) for answer in sample.answers)


def tasks(data: Path) -> list[LongBench]:
    """All 16, reading from data/longbench."""
    return [LongBench(task, data / "longbench") for task in KINDS]
