# SPDX-License-Identifier: Apache-2.0
"""RULER (Hsieh et al., arXiv 2404.06654): its 13 tasks, by the prompts and parameters of its synthetic.yaml.

The wording of the prompts and the parameters are the benchmark's (github.com/NVIDIA/RULER, Apache-2.0); the generators
are written anew, so that samples are alike, not the same. What differs on purpose: a prompt is filled up to the length
asked for, not down to the last whole step of the published generator; that length does not include the answer; and
an answer's first words do not end in a space, which would tear the answer's first token apart.
Answers are searched for as RULER does, in any letter case: all of them, or for the two question answering tasks any.
"""

from __future__ import annotations

from pathlib import Path

from ..generated import GeneratedTask
from .niah import NIAH_TASKS, Niah
from .qa import Hotpot, Squad
from .tracking import VariableTracking
from .wordlists import CommonWords, FrequentWords


def tasks(data: Path) -> list[GeneratedTask]:
    """All 13, reading what they need of published files from data/ruler."""
    folder = data / "ruler"
    return [
        *(Niah(name, parameters, folder) for name, parameters in NIAH_TASKS.items()),
        VariableTracking(),
        CommonWords(),
        FrequentWords(),
        Squad(folder),
        Hotpot(folder),
    ]
