# SPDX-License-Identifier: Apache-2.0
"""The sentences that say nothing, which RULER and InfiniteBench hide things among."""

from __future__ import annotations

SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
LINE = " ".join(SENTENCES)


def lines(sentences: int) -> list[str]:
    """Noise of so many sentences as lines of five; the last one may be shorter."""
    whole, rest = divmod(sentences, len(SENTENCES))
    return [LINE] * whole + ([" ".join(SENTENCES[:rest])] if rest else [])
