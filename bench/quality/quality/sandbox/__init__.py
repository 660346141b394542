# SPDX-License-Identifier: Apache-2.0
"""Runs a program that a model wrote, where it can do no harm."""

from .executor import Outcome, SandboxError, run

__all__ = ["Outcome", "SandboxError", "run"]
