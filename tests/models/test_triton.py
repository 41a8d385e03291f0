"""The whole model on the Triton kernels, interpreted: eager against reference, compiled against eager."""

from __future__ import annotations

import warnings

import pytest
import torch

from camtl import ops
from camtl.ops import _kernels

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not _kernels.INTERPRETED, reason="TRITON_INTERPRET=1 was not set before the start"),
]


@pytest.fixture(autouse=True)
def _on_triton():
    """All calls run on Triton, or fail."""
    torch._dynamo.reset()
    with ops.set_backend("triton"), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*the preferred backend", RuntimeWarning)
        yield
    torch._dynamo.reset()


def step(model, run, batch):
    model.zero_grad()
    torch.manual_seed(2)
    out = run(**batch)
    out.loss.backward()
    return [out.loss, out.logits, *(p.grad for p in model.parameters())]


def same(got, wanted, **tolerance):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def packed(batch, room: int = 0):
    """The batch without padding, with ``room`` rows of no sequence at the end."""
    mask = batch["attention_mask"].bool()
    starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    rows = {
        name: torch.nn.functional.pad(batch[name][mask], (0, room))
        for name in ("input_ids", "token_type_ids")
    }
    longest = mask.shape[1]
    return {
        **rows,
        "cu_seqlens": starts,
        "max_seqlen": longest,
        "task_ids": batch["task_ids"],
        "labels": batch["labels"],
    }


@pytest.mark.parametrize("preset", ["ca-mtl-base", "ca-mtl-large", "ca-mtl"])
def test_a_step_equals_reference(make_model, make_batch, preset):
    model = make_model(num_hidden_layers=2, preset=preset).double()
    for batch in (make_batch(holes=True), packed(make_batch())):
        got = step(model, model, batch)
        with ops.set_backend("reference"):
            wanted = step(model, model, batch)
        same(got, wanted, rtol=1e-8, atol=1e-9)


def test_a_compiled_step_in_one_graph(make_model, make_batch):
    # dropout counts rows: eager "auto" would leave padding out, a compiled model does not
    model = make_model(num_hidden_layers=1, preset="ca-mtl-base", packed=False).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same(step(model, compiled, make_batch()), step(model, model, make_batch()), rtol=1e-4, atol=1e-5)


def test_other_lengths_do_not_compile_again(make_model, make_batch):
    model = make_model(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batches = [
        packed(make_batch(lengths), 33 - sum(lengths)) for lengths in ((9, 4, 7, 1, 9), (3, 9, 1, 1, 2))
    ]
    same(step(model, compiled, batches[0]), step(model, model, batches[0]), rtol=1e-4, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        same(step(model, compiled, batches[1]), step(model, model, batches[1]), rtol=1e-4, atol=1e-5)
