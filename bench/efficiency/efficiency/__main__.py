# SPDX-License-Identifier: Apache-2.0
"""python -m efficiency: measures memory, time to the first token and decoding speed, and reports on figures."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .deadline import Deadline

NO_GPU = 77  # what test programs return that cannot run

# What matters most first: of a first round, the time may not suffice for all.
GPU_ROWS = (
    "slow",
    "tuned",
    "standard/ragged",
    "standard/padded",
    "snap_kv_kv_heads/padded",
    "rest_kv_released/padded",
    "tuned@flex",
    "standard/ragged@flex",
    "untouched",
    "lowest_error/ragged",
    "standard:allocation=uniform/padded",
    "standard/paged",
    "standard/ragged@minference",
)


def lengths(text: str) -> list[int]:
    """A list such as 4096,131072; K and M stand for 1024 and 1024 * 1024."""
    factors = {"K": 2**10, "M": 2**20}
    values = [int(part.rstrip("KMkm")) * factors.get(part[-1:].upper(), 1) for part in text.split(",")]
    if any(value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text}: lengths are positive")
    return list(dict.fromkeys(values))


def words(text: str) -> list[str]:
    """A list of names."""
    return [part.strip() for part in text.split(",") if part.strip()]


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 is needed")
    return value


def count(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number above 0 is needed")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="efficiency", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure; goes on where an earlier run ended")
    gpu = commands.add_parser("gpu", help="the same, with defaults for a GPU: 8B parameters, 128K tokens, 9 minutes")
    for command in (run, gpu):
        command.add_argument(
            "--model", default="smollm2", help="folder, .gguf file, hub name, smollm2, or random:GEOMETRY; see list"
        )
        command.add_argument("--layers", type=count, help="only the first ones")
        command.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
        command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
        command.add_argument("--threads", type=count, help="of PyTorch and of selections")
        command.add_argument("--lengths", type=lengths, default=[1024, 2048, 4096], help="of the prompts: 4K,128K")
        command.add_argument("--rows", type=words, help="see list")
        command.add_argument("--budget", type=positive, default=256, help="tokens a KV head, or below 1 a part")
        command.add_argument("--decode", type=count, default=64, help="tokens that are timed")
        command.add_argument("--lead", type=int, default=8, help="tokens before them")
        command.add_argument("--repeats", type=count, default=5, help="rounds; more of them go on with a finished run")
        command.add_argument("--clock", default="wall", choices=["wall", "process"], help="process: on a busy machine")
        command.add_argument("--minutes", type=positive, help="end after so many, with what there is")
        command.add_argument("--no-memory", action="store_true", help="on the CPU: no process a row for its memory")
        command.add_argument("--out", type=Path, default=Path("efficiency-results"))
    gpu.set_defaults(
        model="random:llama-3-8b",
        rows=GPU_ROWS,
        dtype="bfloat16",
        device="cuda",
        lengths=[131072],
        budget=1024,
        minutes=9.0,
        out=Path("efficiency-gpu"),
    )
    report = commands.add_parser("report", help="tables and plots of a folder of results")
    report.add_argument("results", type=Path)
    report.add_argument("--out", type=Path, help="the folder itself without it")
    commands.add_parser("list", help="rows, policies and geometries")
    return top


def main() -> int:
    """Exit status 0; 1 where no row gave a figure; 2 for what the command line or a file got wrong, with one line that
    says what; 77 without the GPU that was asked for."""
    arguments = parser().parse_args()
    try:
        return COMMANDS[arguments.command](arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"efficiency: {error}", file=sys.stderr)
        return 2


def run_command(arguments: argparse.Namespace) -> int:
    """efficiency run, efficiency gpu"""
    if arguments.decode < 32:
        raise ValueError(f"--decode {arguments.decode}: at least 32 tokens make a figure")
    if arguments.lead < 0:
        raise ValueError(f"--lead {arguments.lead}: not below 0")
    import torch

    from . import models, rows
    from .run import Plan, device_name, run

    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        print("efficiency: PyTorch sees no GPU here", file=sys.stderr)
        return NO_GPU
    models.check_name(arguments.model)
    if torch.device(arguments.device).type == "cuda":
        torch.cuda.set_device(torch.device(arguments.device).index or 0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.clock == "process" and (arguments.device != "cpu" or torch.get_num_threads() > 1):
        told = f"{arguments.device}, {torch.get_num_threads()} threads"
        raise ValueError(f"--clock process is for one thread on the CPU, this is {told}")
    plan = Plan(
        model=arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        layers=arguments.layers,
        lengths=arguments.lengths,
        rows=arguments.rows or rows.DEFAULT,
        budget=arguments.budget,
        decode=arguments.decode,
        lead=arguments.lead,
        repeats=arguments.repeats,
        threads=arguments.threads,
        clock=arguments.clock,
        memory=not arguments.no_memory,
        out=arguments.out,
        deadline=Deadline(arguments.minutes),
    )
    print(f"{device_name(arguments.device)}, PyTorch {torch.__version__}", flush=True)
    run(plan)
    return report_on(arguments.out, arguments.out)


def report_command(arguments: argparse.Namespace) -> int:
    """efficiency report"""
    return report_on(arguments.results, arguments.out or arguments.results)


def report_on(folder: Path, out: Path) -> int:
    """Writes the report and prints its tables; 1 where no row gave a figure."""
    from .report import write

    files = write(folder, out)
    print(files[0].read_text(encoding="utf-8"))
    print("\n".join(map(str, files)))
    return 0 if json.loads(files[1].read_text(encoding="utf-8"))["rows"] else 1


def list_command(arguments: argparse.Namespace) -> int:
    """efficiency list"""
    import restkv

    from . import models, rows

    print(rows.__doc__)
    print("Rows that run without --rows\n  " + "\n  ".join(rows.DEFAULT))
    print("Geometries with random weights\n  " + "\n  ".join(models.RANDOM + name for name in models.GEOMETRIES))
    print("Policies\n  " + "\n  ".join(restkv.policies()))
    return 0


COMMANDS = {"run": run_command, "gpu": run_command, "report": report_command, "list": list_command}

if __name__ == "__main__":
    sys.exit(main())
