"""Files written whole, as JSON that every reader takes."""

from __future__ import annotations

import json
import math

from camtl._io import read_json, write_json


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    value = {"loss": math.nan, "more": [1.5, (-math.inf, {"deep": math.inf})], "name": "NaN", "n": 3}
    path = write_json(tmp_path / "a.json", value)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content == {"loss": None, "more": [1.5, [None, {"deep": None}]], "name": "NaN", "n": 3}
    assert list(read_json(path)) == ["loss", "more", "name", "n"]
