# SPDX-License-Identifier: Apache-2.0
"""The memory a row takes on the CPU: the resident set of a process that does nothing else.

    python -m efficiency.memory '{"model": ..., "row": ..., ...}'

loads the model, sets the kernel's mark of the peak back, reads the prompt and some tokens, and prints the figures as
JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

DECODED = 4  # tokens; a cache that grows by copying shows it with the first


def of_process(**facts: Any) -> dict[str, int]:
    """Runs a row in a process of its own; the facts are those of `main`. Returns bytes: loaded, peak_prefill,
    after_prefill, peak_decode. Raises RuntimeError with the process's last line where it fails."""
    # Blocks above 1 MB go back to the system when they are freed, so that the resident set is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, "-m", "efficiency.memory", json.dumps(facts)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"the process ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def resident(name: str) -> int:
    """Bytes of this process by a name of /proc: VmRSS or VmHWM. Raises RuntimeError where there is no such thing."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError as error:
        raise RuntimeError(f"the memory of a process needs Linux's /proc: {error}") from error
    found = re.search(rf"^{name}:\s*(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024


def settle() -> None:
    """Gives everything free back to the system, and sets the peak to what is left."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def main(model: str, dtype: str, layers: int | None, row: str, tokens: int, budget: float) -> dict[str, int]:
    """Reads the prompt and `DECODED` tokens in this process."""
    import torch

    from . import rows
    from .measure import Load, Reader
    from .models import load, prompt

    loaded_model = load(model, dtype=dtype, device="cpu", layers=layers)
    ids = prompt(model, loaded_model, tokens)
    with torch.inference_mode():
        chosen, work = rows.parsed_row(row), Load(tokens, DECODED, 0, budget)
        if chosen.prefill != "dense":  # a compiler that is loaded, too, is no memory of the row
            Reader(loaded_model, chosen, work).prefill(ids)
        reader = Reader(loaded_model, chosen, work)
        settle()
        figures = {"loaded": resident("VmRSS")}
        token = reader.prefill(ids)
        figures["peak_prefill"] = resident("VmHWM")
        settle()
        figures["after_prefill"] = resident("VmRSS")
        for _ in range(DECODED):
            token = reader.forward(token)
        figures["peak_decode"] = resident("VmHWM")
    return figures


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
