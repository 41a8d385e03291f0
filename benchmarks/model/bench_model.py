"""All model steps, each contender of each case."""

from __future__ import annotations

SECTION = "model"


def test_step(case, contender, measured):
    """One contender of one case."""
    measured(case, contender)
