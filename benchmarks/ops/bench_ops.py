"""All ops, each contender of each case: forward and backward."""

from __future__ import annotations

SECTION = "ops"


def test_op(case, contender, measured):
    measured(case, contender)
