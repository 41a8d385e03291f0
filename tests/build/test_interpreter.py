"""When Triton's interpreter runs the kernels: the variable counts, not the order of imports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("given", "first", "wanted"),
    [
        ("1", "import triton", "True"),  # as transformers does
        ("1", "", "True"),
        ("0", "import triton, os; os.environ['TRITON_INTERPRET'] = '1'", "False"),
        ("0", "", "False"),
    ],
    ids=["triton imported before", "nothing before", "set after triton's import", "not set"],
)
def test_who_interprets(given: str, first: str, wanted: str) -> None:
    code = f"{first}\nfrom camtl.ops import _kernels\nprint(_kernels.INTERPRETED)"
    environment = {**os.environ, "TRITON_INTERPRET": given}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [wanted]
