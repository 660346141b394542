# SPDX-License-Identifier: Apache-2.0
"""Benchmarks read from published files: LongBench, InfiniteBench, ARC, HumanEval, and the reading itself."""

from __future__ import annotations

import gzip
import json
import re

import pytest
from quality import tasks
from quality.metrics.likelihood import perplexity
from quality.tasks import DataFileError, arc, longbench
from quality.tasks.files import OWN_DATA, read_rows
from quality.tasks.prompt import Prompt
from quality.tasks.published import choose, cut_middle

LONG = 100_000


def own(name, tokenizer, count=10, tokens=LONG):
    return list(tasks.by_name(name).samples(count, tokens, tokenizer, 1))


# --- reading


def test_rows_of_each_kind(tmp_path):
    rows = [{"a": 1, "b": ["x"]}, {"a": 2, "b": []}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "r.jsonl").write_text(lines + "\n")
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("r.jsonl", "r.json", "r.jsonl.gz"):
        assert read_rows(tmp_path / name) == rows


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    row = {"id": "1", "question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    (tmp_path / "arc" / "ARC-Easy").mkdir(parents=True)
    path = tmp_path / "arc" / "ARC-Easy" / "test-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert tasks.by_name("arc/easy", tmp_path).questions == [arc.Question("1", "Q?", ("x", "y"), 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", '{"a": 1}\nnonsense\n', "line 2 is not JSON"),
        ("r.jsonl", "\n", "holds no rows"),
        ("r.jsonl", "[1]\n", "row 1 should be an object, it is a list"),
        ("r.json", '{"a": 1}', "should hold a list of rows, it holds a dict"),
        ("r.csv", "a,b\n", "should end in .jsonl"),
    ],
)
def test_broken_files(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataFileError, match=message):
        read_rows(tmp_path / name)


def test_rows_are_drawn_by_the_seed():
    rows = list("abcdefgh")
    assert choose(rows, 8, 1) == choose(rows, 100, 2) == list(enumerate(rows))
    drawn = choose(rows, 3, 1)
    assert drawn == sorted(drawn) == choose(rows, 3, 1)
    assert len({tuple(choose(rows, 3, seed)) for seed in range(20)}) > 5


# --- LongBench


@pytest.mark.parametrize("task", longbench.KINDS)
def test_longbench_right_answers(task, pieces):
    """The right answer has the full score, and no words have none; the prompt is the benchmark's."""
    name = f"longbench/{task}"
    samples = own(name, pieces)
    assert samples
    rows = [json.loads(line) for line in (OWN_DATA / "longbench" / f"{task}.jsonl").read_text().splitlines()]
    for sample, row in zip(samples, rows, strict=True):
        prompt = longbench.KINDS[task].prompt
        assert sample.prompt == prompt.replace("{context}", row["context"]).replace("{input}", row["input"])
        assert not sample.meta["cut"]
        for answer in sample.answers:
            assert tasks.by_name(name).score(answer, sample) == pytest.approx(1, abs=1e-6)
        assert tasks.by_name(name).score("", sample) == 0
        assert tasks.by_name(name).score("zzz", sample) < 0.2


def test_longbench_first_line_counts(pieces):
    sample = own("longbench/trec", pieces)[0]
    assert tasks.by_name("longbench/trec").score("\nPerson\nPlace", sample) == 1
    assert tasks.by_name("longbench/trec").score("Place\nPerson", sample) == 0
    assert not sample.meta["chat"]
    sample = own("longbench/narrativeqa", pieces)[0]
    assert tasks.by_name("longbench/narrativeqa").score("\na wool\nsock", sample) == 1


def test_longbench_e(tmp_path, pieces):
    (tmp_path / "longbench").mkdir()
    text = (OWN_DATA / "longbench" / "qasper.jsonl").read_text()
    (tmp_path / "longbench" / "qasper_e.jsonl").write_text(text)
    assert len(list(tasks.by_name("longbench/qasper", tmp_path).samples(9, LONG, pieces, 1))) == 3


def test_row_without_a_field(tmp_path, pieces):
    (tmp_path / "longbench").mkdir()
    (tmp_path / "longbench" / "qasper.jsonl").write_text('{"input": "", "context": "", "answers": []}\n')
    with pytest.raises(DataFileError, match="row 1 lacks all_classes; it has answers, context, input"):
        next(tasks.by_name("longbench/qasper", tmp_path).samples(1, 10, pieces, 1))


def test_cut_in_the_middle(tokenizer):
    sample = own("longbench/narrativeqa", tokenizer, 1)[0]
    whole = sample.meta["tokens"]
    for tokens in (whole, whole - 1, whole // 2, 120):
        cut = own("longbench/narrativeqa", tokenizer, 1, tokens)[0]
        assert tasks.count_tokens(tokenizer, cut.prompt) == cut.meta["tokens"] <= tokens
        assert cut.meta["tokens"] > 0.97 * tokens - 1
        assert cut.meta["cut"] == (tokens < whole)
        assert cut.question == sample.question
        # The first half of the tokens, then the last.
        head = tokenizer.decode(tokenizer.encode(sample.context, add_special_tokens=False)[: tokens // 2])
        assert cut.context.startswith(head[: len(sample.context)])
        assert sample.context.endswith(cut.context[len(head) :])
    with pytest.raises(ValueError, match=r"row 1: the question has \d+ tokens, too many for a prompt cut to 40"):
        own("longbench/narrativeqa", tokenizer, 1, 40)


def test_cut_counts_the_answers_first_words(pieces):
    whole = Prompt("a b c d e f g h i j", " q", [], "x y z")
    cut, length = cut_middle(whole, 10, pieces, "here")
    assert (cut.context, length) == ("a b c d e j", 10)


def test_cut_fits_where_the_pieces_of_text_have_more_tokens(pieces):
    """Tokenizers may decode a piece of a text to one that has more tokens than it was cut from."""

    class Longer:
        encode = staticmethod(pieces.encode)

        @staticmethod
        def decode(token_ids, *, skip_special_tokens=False):
            return pieces.decode(token_ids) + "!"

    cut, length = cut_middle(Prompt("a b c d e f g h i j k l", " q", []), 10, Longer, "here")
    assert (cut.context, length) == ("a b c d e! k l!", 10)


# --- InfiniteBench


@pytest.mark.parametrize("name", tasks.names("infinitebench"))
def test_infinitebench_right_answers(name, pieces):
    task = tasks.by_name(name)
    samples = own(name, pieces, 5, 2000)
    assert samples
    for sample in samples:
        assert not sample.meta["chat"]
        if name.endswith("math_calc"):
            assert task.score(str(sample.answers), sample) == 1
        else:
            assert all(task.score(f"{answer}", sample) == pytest.approx(1) for answer in sample.answers[-1:])
        assert task.score("zzz", sample) == 0
        assert "{" not in sample.question + sample.answer_prefix


def test_infinitebench_hidden_keys(pieces):
    samples = own("infinitebench/passkey", pieces, 12, 2000)
    assert [sample.meta["depth"] for sample in samples] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 0]
    for sample in samples:
        key = sample.answers[0]
        assert re.fullmatch(r"\d{5}", key)
        line = f"The pass key is {key}. Remember it. {key} is the pass key."
        assert sample.context.split("\n").count(line) == 1
        before, _, behind = sample.context.partition(line)
        share = (len(before) - 150) / (len(before) - 150 + len(behind))
        assert share == pytest.approx(sample.meta["depth"], abs=0.04)
    for sample in own("infinitebench/number_string", pieces, 20, 500):
        assert re.fullmatch(r"\d{10}", sample.answers[0])
        runs = [len(run[0]) for run in re.finditer(r"(\d)\1*", sample.answers[0])]
        assert len(runs) <= 5  # five digits, each followed by its repetitions


def test_infinitebench_key_value(pieces):
    for sample in own("infinitebench/kv_retrieval", pieces, 3, 4000):
        pairs = json.loads(sample.context.partition("JSON data:\n")[2])
        key = re.search(r'Key: "(.*)"', sample.question)[1]
        assert [pairs[key]] == sample.answers
        assert list(pairs).index(key) == round(sample.meta["depth"] * (len(pairs) - 1))


def test_infinitebench_prompts_from_files(pieces):
    sample = own("infinitebench/code_run", pieces)[0]
    assert sample.context.startswith("There is a function called func_3 in the following Python code.\n\ndef func_1")
    assert sample.question == "\n\nPlease compute the exact value of func_3(8). "
    assert sample.answer_prefix == "The value of func_3(8) is"
    sample = own("infinitebench/math_find", pieces)[0]
    assert sample.context.startswith("What is the largest number in the following list?\n\n[412,")
    sample = own("infinitebench/longbook_choice_eng", pieces)[0]
    assert sample.question.endswith("\nA. Petrel\nB. Bishop\nC. Hare\nD. Ostrel\n\n")
    assert sample.answers == ["Bishop", "B"]


def test_infinitebench_options_must_hold_the_answer(tmp_path, pieces):
    (tmp_path / "infinitebench").mkdir()
    row = {"context": "c", "input": "q", "answer": ["x"], "options": ["a", "b", "c"]}
    (tmp_path / "infinitebench" / "longbook_choice_eng.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataFileError, match="3 options, and 'x' should be one of four"):
        next(tasks.by_name("infinitebench/longbook_choice_eng", tmp_path).samples(1, 100, pieces, 1))


# --- ARC


def test_arc_own_questions():
    for name, number in (("arc/easy", 36), ("arc/challenge", 28)):
        questions = tasks.by_name(name).questions
        assert len(questions) == len({question.text for question in questions}) == number
        assert all(len(set(question.choices)) == 4 for question in questions)
        answers = [question.answer for question in questions]
        assert all(answers.count(place) * 4 == len(questions) for place in range(4))  # no place is right by habit


def test_arc_layouts():
    old = {
        "id": "1",
        "question": {"stem": "Q?", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]},
        "answerKey": "B",
    }
    new = {"id": "1", "question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
    assert arc.parse(old, "here") == arc.parse(new, "here") == arc.Question("1", "Q?", ("x", "y"), 1)
    with pytest.raises(DataFileError, match="here: the answer 'C' is none of the choices A, B"):
        arc.parse({**new, "answerKey": "C"}, "here")
    with pytest.raises(DataFileError, match="here is in neither of ARC's layouts"):
        arc.parse({"id": "1", "question": {"text": "Q?"}, "answerKey": "C"}, "here")


def test_arc_shots(pieces):
    task = tasks.by_name("arc/challenge")
    for sample in own("arc/challenge", pieces, 4, 512):
        asked = next(question for question in task.questions if question.id == sample.id.rpartition("/")[2])
        assert sample.question == f"Question: {asked.text}\nAnswer:"
        assert asked.text not in sample.context
        assert sample.choices == [f" {choice}" for choice in asked.choices]
        shots = sample.context.split("\n\n")
        assert shots.pop() == ""
        assert len(shots) == len(set(shots)) == sample.meta["shots"] > 5
        solved = {f"Question: {other.text}\nAnswer: {other.choices[other.answer]}" for other in task.questions}
        assert set(shots) <= solved
        assert task.score_likelihoods([-1.0 if place == sample.answer else -90.0 for place in range(4)], sample) == 1
        assert task.score_likelihoods([-90.0 if place == sample.answer else -1.0 for place in range(4)], sample) == 0


def test_arc_shots_come_from_the_training_split(tmp_path, pieces):
    (tmp_path / "arc").mkdir()
    for level, split in (("Easy", "Test"), ("Challenge", "Train")):
        text = (OWN_DATA / "arc" / f"ARC-{level}-Test.jsonl").read_text()
        (tmp_path / "arc" / f"ARC-Easy-{split}.jsonl").write_text(text)
    task = tasks.by_name("arc/easy", tmp_path)
    trained = {question.solved.strip() for question in tasks.by_name("arc/challenge").questions}
    sample = next(task.samples(1, 512, pieces, 1))
    assert set(sample.context.strip().split("\n\n")) <= trained


# --- HumanEval


def test_humaneval_solutions_pass(pieces):
    task = tasks.by_name("humaneval/pass_at_1")
    samples = own("humaneval/pass_at_1", pieces, 20, 700)
    assert len(samples) == 10
    for sample in samples:
        assert sample.question not in sample.context
        assert sample.meta["shots"] == sample.context.count("\n\n\n") > 1
        assert task.score(sample.answers[0], sample) == 1, sample.id
        # What a model writes behind the function does not count.
        assert task.score(sample.answers[0] + "\n\ndef more():\n    raise SystemExit\nmore()", sample) == 1
        assert task.score("    return None\n", sample) == 0


def test_humaneval_published_file(tmp_path, pieces):
    (tmp_path / "humaneval").mkdir()
    text = (OWN_DATA / "humaneval" / "HumanEval.jsonl").read_bytes()
    (tmp_path / "humaneval" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(text))
    assert len(list(tasks.by_name("humaneval/pass_at_1", tmp_path).samples(20, 700, pieces, 1))) == 10


def test_humaneval_endless_program(pieces):
    from quality.tasks.humaneval import HumanEval

    task = HumanEval(OWN_DATA / "humaneval", seconds=0.3)
    sample = next(task.samples(1, 700, pieces, 1))
    assert task.score("    while True:\n        pass\n", sample) == 0


# --- perplexity


def test_windows_lie_side_by_side(tokenizer, tmp_path):
    (tmp_path / "perplexity").mkdir()
    text = " ".join(f"Line {number}, of a long text without an end." for number in range(400))
    (tmp_path / "perplexity" / "text.txt").write_text(text)
    task = tasks.by_name("perplexity/text", tmp_path)
    samples = list(task.samples(1000, 512, tokenizer, 1))
    pieces = [sample.choices[0] for sample in samples]
    assert samples[0].prompt + "".join(pieces) == text  # each word behind the first context is scored once
    position = len(samples[0].prompt)
    for sample in samples:
        assert text[:position].endswith(sample.prompt)
        assert sample.question
        assert sample.meta["tokens"] <= 512
        position += len(sample.choices[0])
    likelihoods = [-2.0 * sample.meta["choice_tokens"][0] for sample in samples]
    assert task.score_likelihoods([likelihoods[0]], samples[0]) == 2
    counts = [sample.meta["choice_tokens"][0] for sample in samples]
    assert perplexity(likelihoods, counts) == pytest.approx(7.389056)
