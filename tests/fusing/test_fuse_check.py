"""``camtl fuse-check`` and the example: what they print, and when they fail."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertTokenizerFast, GPT2Config

import camtl
from camtl.bench.fused import deviations, paces
from camtl.cli import main
from camtl.fusing import _modules

from .conftest import make_batch, make_model

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fuse_bert.py"
WORDS = ("the", "train", "left", "on", "time", "nobody", "had", "told", "it", "rained", "why", "a", "dog")


def call(*argv: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["fuse-check", *map(str, argv)])
    assert "Traceback" not in err.getvalue()
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a head, and its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    model = make_model("bert", "ForSequenceClassification", max_position_embeddings=128)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_report_equality_and_speed(folder: Path, packed: bool) -> None:
    code, out, _ = call(folder, "--device", "cpu", "--seconds", 0.05, *(["--packed"] if packed else []))
    assert code == 0
    assert f"model    {folder}: bert" in out
    assert "input    1 batch of 8 rows, up to 128 tokens, 41 % real" in out
    assert f"fused: attention 2 of 2, layer_norm 5 of 5, gelu 2 of 2, packed {int(packed)} of 1" in out
    assert re.search(r"last_hidden_state +\d\.\d\de-\d\d +\d\.\d\de-\d\d +\d\.\d\de-\d\d  yes", out)
    assert len(re.findall(r"^gradient of ", out, re.MULTILINE)) == 3
    assert "\nequal: all " in out
    for step in ("inference", r"forward \+ backward"):
        assert re.search(rf"{step} +\d+\.\d\d +\d+\.\d\d +\d+\.\d\dx", out)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_and_lengths(folder: Path, dtype: str) -> None:
    code, out, _ = call(
        *(folder, "--device", "cpu", "--dtype", dtype, "--lengths", "5,9", "--batch-size", 3, "--seconds", 0)
    )
    assert code == 0
    assert f"{dtype} on cpu" in out
    assert "input    1 batch of 3 rows, up to 9 tokens, 70 % real" in out
    assert "before/after" not in out


def test_texts(folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(["the train left on time", "why", "nobody had told", "it rained"]))
    code, out, _ = call(
        *(folder, "--device", "cpu", "--text_file", texts, "--batch_size", 3, "--packed", "--seconds", 0)
    )
    assert code == 0
    assert "input    2 batches of 3 rows, up to 7 tokens, 76 % real" in out


def test_a_model_that_is_not_equal_exits_with_1(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = _modules.norm
    monkeypatch.setattr(_modules, "norm", lambda *a, **k: norm(*a, **k) * 1.001)
    code, out, _ = call(folder, "--device", "cpu")
    assert code == 1
    assert re.search(r"last_hidden_state .* NO\n", out)
    assert re.search(r"^not equal: \d+ of \d+ results$", out, re.MULTILINE)
    assert "before/after" not in out  # what is wrong has no speed


def error(*argv: object) -> str:
    code, _, err = call(*argv)
    assert code == 2
    return err


def test_wrong_commands(folder: Path, tmp_path: Path) -> None:
    GPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt2")
    accepted = "bert, roberta, xlm-roberta, electra, distilbert"
    assert f"model_type is 'gpt2'; accepted: {accepted}" in error(tmp_path / "gpt2")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text('{"model_type": "ca-mtl"}')
    assert "is a camtl model, which runs on the fused ops as it is" in error(tmp_path / "ours")
    assert "no such folder" in error(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in error(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "bert"}')
    assert "no weights could be read" in error(tmp_path / "empty")
    for lengths in ("0", "129", "x", ""):
        assert "must be whole numbers from 1 to 128" in error(folder, "--lengths", lengths)
    make_model("bert").save_pretrained(tmp_path / "bare")
    (tmp_path / "some.txt").write_text("a text\n")
    assert "no tokenizer could be loaded" in error(tmp_path / "bare", "--text_file", tmp_path / "some.txt")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    assert "do not fit config.json, for instance encoder.layer.0" in error(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"no tensors")
    assert "no weights could be read" in error(tmp_path / "bare")
    (tmp_path / "none.txt").write_text("\n \n")
    assert "has no texts" in error(folder, "--text_file", tmp_path / "none.txt")
    assert "give one of them" in error(folder, "--text_file", tmp_path / "none.txt", "--lengths", "3")
    assert "seconds" in error(folder, "--seconds", "-1")
    if not torch.cuda.is_available():
        assert "there is no CUDA device here" in error(folder, "--device", "cuda")


def test_deviations_see_what_is_wrong() -> None:
    model = make_model("bert")
    batch = make_batch()
    found = deviations(model, camtl.fuse(make_model("bert"), packed=True), [batch, make_batch((3, 2))])
    assert {"last_hidden_state", "pooler_output"} < {d.result for d in found}
    assert all(d.ok for d in found)
    assert all(p.grad is None for p in model.parameters())
    other = make_model("bert")
    other.encoder.layer[0].output.dense.bias.data[0] += 1e-3
    assert not all(d.ok for d in deviations(model, other, [batch]))
    other.encoder.layer[0].output.dense.bias.data.fill_(torch.nan)
    assert not any(d.ok for d in deviations(model, other, [batch]) if d.result == "last_hidden_state")


def test_paces_name_what_fails() -> None:
    class Fails(torch.nn.Module):
        calls = 0

        def forward(self, **batch: Any) -> Any:
            self.calls += 1
            if self.calls > 1:
                raise ValueError("no more")
            return (batch["input_ids"].float(),)

    with pytest.raises(RuntimeError, match="timing the model after fusing: failed \\(ValueError: no more\\)"):
        paces(make_model("bert"), Fails(), [make_batch()], 0.01)


def test_the_example(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("fuse_bert", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ratio = module.main(str(folder), seconds=0.05)
    out = capsys.readouterr().out
    assert "fused: attention 2 of 2" in out
    assert "largest difference of an embedding: " in out
    assert f"time plain / time fused: {ratio:.2f}" in out
    assert "unfused again: True" in out
