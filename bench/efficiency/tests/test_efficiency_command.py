# SPDX-License-Identifier: Apache-2.0
"""The command line, right and wrong."""

from __future__ import annotations

import sys

import pytest
import torch
from efficiency import __main__ as command
from efficiency.rows import parsed_row


def call(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["efficiency", *arguments])
    return command.main()


def test_a_whole_run(monkeypatch, tmp_path, capsys):
    out = str(tmp_path / "out")
    arguments = ["--lengths", "200", "--rows", "slow,tuned,standard", "--budget", "64", "--decode", "32", "--lead", "0"]
    arguments += ["--repeats", "1", "--no-memory", "--layers", "1", "--out", out]
    assert call(monkeypatch, "run", "--model", "random:tiny", *arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in ("slow", "tuned", "standard"))
    assert (tmp_path / "out" / "decode.svg").exists()
    assert call(monkeypatch, "report", out) == 0
    assert "## 200 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "random:huge"], "there is no geometry 'huge'"),
        (["--model", "nowhere.gguf"], "there is no file nowhere.gguf"),
        (["--rows", "standart"], "there is no preset standart"),
        (["--rows", "tuned@fast"], "tuned@fast: a prompt is read by dense, flex, minference, not by 'fast'"),
        (["--rows", "slow@flex"], "slow@flex: the slow baseline reads prompts by dense attention only"),
        (["--rows", "standard:window"], "'window' is not of the form key=value"),
        (["--rows", "standard:windows=3"], "windows"),
        (["--decode", "8"], "--decode 8: at least 32 tokens make a figure"),
        (["--lead", "-1"], "--lead -1: not below 0"),
        (
            ["--threads", "2", "--clock", "process"],
            "--clock process is for one thread on the CPU, this is cpu, 2 threads",
        ),
        (["--layers", "7"], "--layers 7: the model has 2"),
    ],
)
def test_arguments_gone_wrong_give_one_line(monkeypatch, tmp_path, capsys, arguments, told):
    always = ["--model", "random:tiny", "--lengths", "64", "--no-memory", "--out", str(tmp_path / "out")]
    assert call(monkeypatch, "run", *always, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("efficiency: ")
    assert told in error[0]


@pytest.mark.parametrize("arguments", [["--lengths", "0"], ["--lengths", "x"], ["--budget", "-1"], ["--minutes", "0"]])
def test_argparse_refuses_numbers(monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "run", *arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_run_without_figures(monkeypatch, tmp_path, capsys):
    arguments = [
        "--model",
        "random:tiny",
        "--layers",
        "1",
        "--lengths",
        "64",
        "--rows",
        "standard/paged",
        "--no-memory",
    ]
    assert call(monkeypatch, "run", *arguments, "--out", str(tmp_path)) == 1
    assert "`standard/paged` has no figures" in capsys.readouterr().out


def test_a_report_of_nothing(monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, "report", str(tmp_path)) == 2
    assert "holds no results" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(monkeypatch, capsys):
    assert call(monkeypatch, "gpu") == 77
    assert "no GPU" in capsys.readouterr().err


def test_lengths_have_units():
    assert command.lengths("4K,256k,1M,100,4096") == [4096, 262144, 2**20, 100]


def test_the_list_names_all_rows(monkeypatch, capsys):
    assert call(monkeypatch, "list") == 0
    printed = capsys.readouterr().out
    assert "standard/ragged@flex" in printed
    assert "random:llama-3-8b" in printed


def test_names_of_rows():
    changed = parsed_row("standard:window=16+allocation=uniform/ragged@minference")
    assert changed.policy.window == 16
    assert changed.policy.keys()["allocation"] == "uniform"
    assert (changed.layout, changed.prefill, changed.cache) == ("ragged", "minference", "policy")
    assert parsed_row("snap_kv").layout == "auto"
    # 32 query heads over 8 KV heads: a set a query head has a quarter of the tokens.
    assert parsed_row("rest_kv_released").budgeted(1024, 4096, 32, 8).budget == 256
    assert parsed_row("standard").budgeted(0.25, 4096, 32, 8).budget == 1024
