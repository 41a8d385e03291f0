"""The report: every module that could be fused, what runs in its place, or why not."""

from __future__ import annotations

import copy

import pytest
from torch import nn

import camtl
from camtl.fusing import FuseReport, Row

from .conftest import make_batch, make_model


def test_rows_and_counts() -> None:
    model = make_model("bert", "ForSequenceClassification")
    report = camtl.fuse_report(camtl.fuse(model, gelu=False))
    assert isinstance(report, FuseReport)
    layer = "bert.encoder.layer.0"
    assert report.rows[0] == Row("bert.encoder", "packed", False, "switched off (packed=False)")
    assert Row(f"{layer}.attention.self", "attention", True, "softmax(q k^T) v in one pass") in report.rows
    end = "bias, dropout, residual and norm in one pass"
    assert Row(f"{layer}.output", "layer_norm", True, end) in report.rows
    assert Row(f"{layer}.intermediate", "gelu", False, "switched off (gelu=False)") in report.rows
    assert report.counts == {"attention": (2, 2), "layer_norm": (5, 5), "gelu": (0, 2), "packed": (0, 1)}
    names = dict(model.named_modules())
    assert all(row.module in names for row in report.rows)


def test_the_table() -> None:
    model = make_model("distilbert", activation="relu")
    with pytest.warns(RuntimeWarning, match="relu|ReLU"):
        camtl.fuse(model, packed=True)
    why = "the activation ReLU is not gelu with the exact erf"
    assert str(camtl.fuse_report(model)) == (
        "module                             kind        fused  how, or why not\n"
        "---------------------------------  ----------  -----  ---------------\n"
        "transformer                        packed      yes    padding is left out of the layers\n"
        "transformer.layer.* (2)            layer_norm  yes    bias, dropout, residual and norm in one pass\n"
        "transformer.layer.*.attention (2)  attention   yes    softmax(q k^T) v in one pass\n"
        f"transformer.layer.*.ffn (2)        gelu        no     {why}\n"
        "embeddings.LayerNorm               layer_norm  yes    norm in one pass\n"
        "\n"
        "fused: attention 2 of 2, layer_norm 3 of 3, gelu 0 of 2, packed 1 of 1"
    )


def test_before_fuse_and_after_unfuse(family: str) -> None:
    model = make_model(family, "ForMaskedLM")
    before = camtl.fuse_report(model)
    assert {row.detail for row in before.rows} == {"not fused: camtl.fuse(model) does it"}
    assert not any(row.replaced for row in before.rows)
    fused = camtl.fuse_report(camtl.fuse(copy.deepcopy(model), packed=True))
    assert [(row.module, row.kind) for row in fused.rows] == [(row.module, row.kind) for row in before.rows]
    assert all(row.replaced for row in fused.rows)
    assert camtl.fuse_report(camtl.unfuse(camtl.fuse(model))) == before


def test_it_looks_at_the_model_as_it_is() -> None:
    model = camtl.fuse(make_model("bert", "ForMaskedLM"))
    model.cls.predictions.transform.LayerNorm = nn.LayerNorm(32)
    model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda *_: None)
    rows = {(row.module, row.kind): row for row in camtl.fuse_report(model).rows}
    new = rows["cls.predictions.transform.LayerNorm", "layer_norm"]
    assert (new.replaced, new.detail) == (False, "it came after camtl.fuse: call it again")
    assert "as unfused: its dense layer is a Linear (or has hooks)" in str(camtl.fuse_report(model))
    camtl.fuse(model)
    assert camtl.fuse_report(model).counts["layer_norm"] == (6, 6)


def test_a_model_of_many_models() -> None:
    """Each is fused; what lies around them is not looked at."""
    both = nn.ModuleDict({"a": make_model("bert"), "b": make_model("roberta"), "c": nn.LayerNorm(32)})
    report = camtl.fuse_report(camtl.fuse(both, packed=True))
    assert report.counts == {"attention": (4, 4), "layer_norm": (10, 10), "gelu": (4, 4), "packed": (2, 2)}
    assert type(both["c"]) is nn.LayerNorm
    both["a"](**make_batch())
    camtl.unfuse(both["a"])
    assert camtl.fuse_report(both).counts["attention"] == (2, 4)


def test_repeated_modules_are_listed_once() -> None:
    """As in models that use one layer several times."""
    model = make_model("bert")
    model.encoder.layer[1] = model.encoder.layer[0]
    plain = copy.deepcopy(model)
    assert camtl.fuse_report(camtl.fuse(model)).counts["attention"] == (1, 1)
    batch = make_batch()
    assert (model(**batch)[0] - plain(**batch)[0]).abs().max() < 1e-5
