"""Masks: none, 2-D, 3-D and 4-D; padding on either side, holes, rows without a token; what gets packed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import camtl
from camtl.errors import UsageError
from camtl.fusing import _attention, _packing
from camtl.ops import _backends

from .conftest import FAMILIES, check, make_batch, make_config, make_model, results


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of ``conditional_attention`` that follow."""
    seen: list[dict[str, Any]] = []
    op = _attention.ops.conditional_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        seen.append({"q": args[0], **kwargs})
        return op(*args, **kwargs)

    monkeypatch.setattr(_attention.ops, "conditional_attention", counted)
    return seen


@pytest.mark.filterwarnings("ignore:.*padding on the left:RuntimeWarning")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("side", ["none", "right", "left", "holes"])
def test_2d(family: str, side: str, packed: bool) -> None:
    check(make_model(family), make_batch(side=side), lambda m: camtl.fuse(m, packed=packed))


@pytest.mark.parametrize("kind", ["bool", "float", "int32", "all ones"])
def test_2d_of_any_dtype(kind: str) -> None:
    batch = make_batch()
    if kind == "all ones":
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    else:
        batch["attention_mask"] = batch["attention_mask"].to(getattr(torch, kind))
    check(make_model("bert"), batch, lambda m: camtl.fuse(m, packed=True, strict=True))


def test_2d_needs_no_more_than_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls_of(monkeypatch)
    model = camtl.fuse(make_model("bert"), strict=True)
    batch = make_batch()
    model(**batch)
    assert [call["attention_mask"].tolist() for call in seen] == [batch["attention_mask"].bool().tolist()] * 2
    seen.clear()
    for mask in (None, torch.ones(4, 9)):  # nothing masked: no mask
        model(batch["input_ids"], attention_mask=mask)
    assert [call["attention_mask"] for call in seen] == [None] * 4


def wide(mask: Tensor) -> Tensor:
    """``[B, 1, S, S]`` bool: the keys of ``mask``, and for odd queries not the first key."""
    S = mask.shape[1]
    keys = mask.bool()[:, None, None].expand(-1, 1, S, S).clone()
    keys[:, :, 1::2, 0] = False
    keys[:, :, :, 1] = True
    return keys


@pytest.mark.filterwarnings("ignore:.*hides more than whole keys:RuntimeWarning")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_4d(family: str, additive: bool, packed: bool) -> None:
    model, batch = make_model(family), make_batch()
    mask = wide(batch["attention_mask"])
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    fused = camtl.fuse(copy.deepcopy(model), packed=packed)
    batch["attention_mask"] = mask
    ours, theirs = results(fused, batch), results(model, batch)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=2e-5, msg=key)


def test_4d_falls_back_with_one_warning_that_names_the_module() -> None:
    batch = make_batch()
    batch["attention_mask"] = wide(batch["attention_mask"])
    fused = camtl.fuse(make_model("bert"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fused(**batch)
        fused(**batch)
    assert [str(w.message) for w in caught] == [
        "camtl.fuse: encoder.layer.0.attention.self: the attention mask hides more than whole keys (or it "
        "cannot be told without waiting); computed unfused"
    ]
    with pytest.raises(UsageError, match=r"layer\.0\.attention\.self: the attention mask"):
        camtl.fuse(fused, strict=True)(**batch)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -torch.inf, -1e4, None])
def test_4d_that_hides_whole_keys_stays_fused(
    value: float | None, expanded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls_of(monkeypatch)
    model, batch = make_model("bert"), make_batch()
    expected = model(**batch)[0]
    keys = batch["attention_mask"].bool()
    batch["attention_mask"] = keys[:, None, None]
    if value is not None:
        batch["attention_mask"] = torch.zeros(4, 1, 1, 9).masked_fill(~keys[:, None, None], value)
    if expanded:
        batch["attention_mask"] = batch["attention_mask"].expand(4, 1, 9, 9)
    fused = camtl.fuse(copy.deepcopy(model), strict=True)
    torch.testing.assert_close(fused(**batch)[0], expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 2


def test_4d_with_other_values_is_added() -> None:
    model, batch = make_model("bert"), make_batch(side="none")
    batch["attention_mask"] = torch.randn(4, 1, 1, 9)
    with pytest.warns(RuntimeWarning, match="whole keys"):
        ours = camtl.fuse(copy.deepcopy(model))(**batch)[0]
    torch.testing.assert_close(ours, model(**batch)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*hides more than whole keys:RuntimeWarning")
def test_3d(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``[B, S, S]`` is ``[B, 1, S, S]``, which it is compared with: the unfused model refuses the former."""
    model, batch = make_model(family), make_batch()
    fused = camtl.fuse(copy.deepcopy(model))
    mask = wide(batch["attention_mask"])
    ours = fused(batch["input_ids"], attention_mask=mask[:, 0].long())[0]
    torch.testing.assert_close(ours, model(batch["input_ids"], attention_mask=mask)[0], rtol=1e-5, atol=1e-5)
    seen = calls_of(monkeypatch)
    ours = fused(batch["input_ids"], attention_mask=batch["attention_mask"][:, None])[0]  # [B, 1, S]: keys
    assert len(seen) == 2
    torch.testing.assert_close(ours, model(**batch)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_without_a_token_harms_no_other(family: str, packed: bool) -> None:
    model, batch = make_model(family, "ForSequenceClassification"), make_batch()
    batch["attention_mask"][2] = 0
    fused = camtl.fuse(copy.deepcopy(model), packed=packed)
    ours, theirs = fused(**batch).logits, model(**batch).logits
    assert ours.isfinite().all()
    others = torch.tensor([0, 1, 3])
    torch.testing.assert_close(ours[others], theirs[others], rtol=1e-5, atol=1e-5)
    fused(**batch).logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fused.parameters())
    fused(batch["input_ids"], attention_mask=torch.zeros(4, 9))  # none has any


# -- packing


def test_packed_leaves_padding_out(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls_of(monkeypatch)
    fused, batch = camtl.fuse(make_model(family), packed=True, strict=True), make_batch(side="holes")
    out = fused(**batch)[0]
    count = int(batch["attention_mask"].sum())
    assert [call["q"].shape[0] for call in seen] == [count] * 2
    lengths = batch["attention_mask"].sum(1)
    assert seen[0]["cu_seqlens"].diff().tolist() == lengths.tolist()
    assert seen[0]["max_seqlen"] == 9
    assert out.shape == (4, 9, 32)
    assert (out[batch["attention_mask"] == 0] == 0).all()


def test_without_padding_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls_of(monkeypatch)
    fused = camtl.fuse(make_model("bert"), packed=True, strict=True)
    fused(**make_batch(side="none"))
    fused(**make_batch(lengths=(9, 9, 9, 9)))
    assert [call["q"].dim() for call in seen] == [4] * 4


def test_padding_on_the_left_runs_padded_because_heads_read_the_first_position() -> None:
    model, batch = make_model("bert", "ForSequenceClassification"), make_batch(side="left")
    fused = camtl.fuse(copy.deepcopy(model), packed=True)
    with pytest.warns(
        RuntimeWarning, match=r"bert\.encoder: packed=True and padding on the left; the padded form runs"
    ):
        ours = fused(**batch).logits
    torch.testing.assert_close(ours, model(**batch).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="on the left"):
        camtl.fuse(fused, packed=True, strict=True)(**batch)


def test_packed_with_hidden_states_runs_padded(family: str) -> None:
    model, batch = make_model(family), make_batch()
    fused = camtl.fuse(copy.deepcopy(model), packed=True)
    with pytest.warns(
        RuntimeWarning, match="packed=True and output_hidden_states=True, .*; the padded form runs"
    ):
        ours = fused(**batch, output_hidden_states=True).hidden_states
    theirs = model(**batch, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_packed_span_heads_run_padded_and_say_so(family: str) -> None:
    with pytest.warns(RuntimeWarning, match="packed of .*: the loss of a span head reads padding"):
        fused = camtl.fuse(make_model(family, "ForQuestionAnswering"), packed=True)
    report = camtl.fuse_report(fused)
    assert report.counts["packed"] == (0, 1)
    assert report.counts["attention"] == (2, 2)
    base = camtl.fuse(fused.base_model, packed=True, strict=True)
    assert camtl.fuse_report(base).counts["packed"] == (1, 1)


def test_packed_and_chunked_feed_forward_do_not_meet(family: str) -> None:
    model = make_model(family, chunk_size_feed_forward=3)
    with pytest.warns(RuntimeWarning, match="chunk_size_feed_forward=3 cuts sequences"):
        fused = camtl.fuse(copy.deepcopy(model), packed=True)
    batch = make_batch()
    torch.testing.assert_close(fused(**batch)[0], model(**batch)[0], rtol=1e-5, atol=1e-5)


def test_packed_reads_the_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(self.shape) or tolist(self))
    monkeypatch.setattr(Tensor, "item", lambda self: reads.append("item"))
    monkeypatch.setattr(Tensor, "__bool__", lambda self: reads.append("bool"))
    batch = _packing.PackedEncoder()._packed(torch.randn(2, 4, 8), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]))
    assert batch is not None
    assert reads == [torch.Size([2])]
    assert batch.cu_seqlens.dtype == torch.int32


def test_packed_dropout_does_not_depend_on_padding() -> None:
    """Attention dropout by the position in the own sequence: the same mask packed and padded."""
    name = {"attention_probs_dropout_prob": 0.5}
    model, batch = make_model("bert", **name).train(), make_batch()
    real = batch["attention_mask"].bool()
    found = []
    for packed in (False, True):
        fused = camtl.fuse(copy.deepcopy(model), packed=packed)
        torch.manual_seed(5)
        found.append(fused(**batch)[0][real])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_by_name_without_fuse(family: str) -> None:
    """The attention alone, as Hugging Face users choose one."""
    prefix, module, _ = FAMILIES[family]
    cls = getattr(module, f"{prefix}Model")
    torch.manual_seed(0)
    model = cls._from_config(make_config(family), attn_implementation="camtl").eval()
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    batch = make_batch()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch)[0][real], plain(**batch)[0][real], rtol=1e-5, atol=1e-5)
    assert camtl.fuse_report(model).counts["attention"] == (2, 2)
    assert camtl.fuse_report(plain).counts["attention"] == (0, 2)


@pytest.mark.parametrize("op", ["conditional_layer_norm", "conditional_attention", "bias_gelu"])
def test_the_preferred_backend_is_used(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _backends._REGISTRY[op]["reference"].run
    double = _backends.Implementation(lambda **call: 2 * plain(**call), lambda call: [], lambda: "")
    model, batch = camtl.fuse(make_model("bert"), packed=True), make_batch()
    usual = model(**batch)[0]
    monkeypatch.setitem(_backends._REGISTRY[op], "reference", double)
    with camtl.set_backend("reference"):
        assert not torch.allclose(model(**batch)[0], usual)
