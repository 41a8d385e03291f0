"""Fused models on the Triton kernels, interpreted."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import camtl
from camtl.ops import _kernels

from .conftest import assert_same, make_batch, make_model, results

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not _kernels.INTERPRETED, reason="TRITON_INTERPRET=1 was not set before the start"),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_the_rule(family: str, packed: bool) -> None:
    model, batch = make_model(family, "ForMaskedLM"), make_batch((5, 2, 3), name="ForMaskedLM")
    fused = camtl.fuse(copy.deepcopy(model), packed=packed, strict=True)
    with camtl.set_backend("triton"), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*the preferred backend", RuntimeWarning)
        ours = results(fused, batch)
    exact = copy.deepcopy(model).double()
    assert_same(ours, results(model, batch), results(exact, batch), torch.float32)
