"""On a CUDA device: the rule of errors, autocast, and calls that never wait for the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import camtl

from .conftest import assert_same, make_batch, make_model, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def no_sync() -> Iterator[None]:
    """Every synchronising call raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def cuda_batch(**options: object) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in make_batch(**options).items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_the_rule(family: str, packed: bool, dtype: torch.dtype) -> None:
    model, batch = make_model(family).cuda().to(dtype), cuda_batch()
    found = [
        {key: value.cpu() for key, value in results(m, batch).items()}
        for m in (
            camtl.fuse(copy.deepcopy(model), packed=packed, strict=True),
            copy.deepcopy(model),
            copy.deepcopy(model).double(),
        )
    ]
    assert_same(*found, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtypes_of_the_unfused_model(
    family: str, dtype: torch.dtype, parameters: torch.dtype
) -> None:
    model, batch = make_model(family).cuda(), cuda_batch()
    truth = model(**batch)[0]
    model = model.to(parameters)
    fused = camtl.fuse(copy.deepcopy(model), packed=True, strict=True)
    with torch.autocast("cuda", dtype):
        theirs, ours = model(**batch)[0], fused(**batch)[0]
    assert ours.dtype == theirs.dtype
    real = batch["attention_mask"].bool()
    assert (ours - truth)[real].norm() <= 2 * (theirs - truth)[real].norm()


@pytest.mark.parametrize("mask", ["2-D", "4-D bool", "none"])
def test_padded_calls_never_wait(family: str, mask: str) -> None:
    fused, batch = camtl.fuse(make_model(family).cuda(), strict=True).train(), cuda_batch()
    if mask == "none":
        del batch["attention_mask"]
    elif mask == "4-D bool":
        batch["attention_mask"] = batch["attention_mask"].bool()[:, None, None]
    fused(**batch)[0].sum().backward()
    with no_sync():
        fused(**batch)[0].sum().backward()


def test_additive_4d_masks_are_not_read() -> None:
    model, batch = make_model("bert").cuda(), cuda_batch()
    expected = model(**batch)[0]
    hidden = batch["attention_mask"][:, None, None] == 0
    lowest = torch.finfo(torch.float32).min
    batch["attention_mask"] = torch.zeros(hidden.shape, device="cuda").masked_fill(hidden, lowest)
    fused = camtl.fuse(copy.deepcopy(model))
    with pytest.warns(RuntimeWarning, match="whole keys"):
        ours = fused(**batch)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_in_a_cuda_graph() -> None:
    """packed=True runs padded there: the number of real tokens would have to be read."""
    fused, batch = camtl.fuse(make_model("bert").cuda(), packed=True), cuda_batch()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = fused(**batch)[0][real]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            camtl.fuse(fused)(**batch)
        torch.cuda.current_stream().wait_stream(side)
        camtl.fuse(fused, packed=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fused(**batch)[0]
        graph.replay()
    torch.testing.assert_close(captured[real], expected, rtol=1e-4, atol=1e-4)


def test_heads_that_the_kernels_do_not_take() -> None:
    model = make_model("bert", hidden_size=320, num_attention_heads=2).cuda()
    batch = cuda_batch()
    with pytest.warns(RuntimeWarning, match="heads of 160 features are larger than 128"):
        ours = camtl.fuse(copy.deepcopy(model))(**batch)[0]
    torch.testing.assert_close(ours, model(**batch)[0], rtol=1e-3, atol=1e-3)
