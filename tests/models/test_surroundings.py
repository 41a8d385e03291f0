"""The model beside others: backends, devices, checkpoints, wrapped layers, empty batches."""

from __future__ import annotations

import pytest
import torch

from camtl import ops
from camtl.errors import UsageError
from camtl.ops import _backends


@pytest.mark.parametrize("op", ["film", "conditional_layer_norm", "conditional_attention", "bias_gelu"])
def test_backend_preference_reaches_the_ops(make_model, make_batch, monkeypatch, op):
    plain = _backends._REGISTRY[op]["reference"].run
    double = _backends.Implementation(lambda **call: 2 * plain(**call), lambda call: [], lambda: "")
    monkeypatch.setitem(_backends._REGISTRY[op], "cpu", double)
    model = make_model()
    batch = make_batch()
    with ops.set_backend("reference"):
        inside = model(**batch).logits
    assert not torch.allclose(inside, model(**batch).logits)  # the other is faster
    monkeypatch.delitem(_backends._REGISTRY[op], "cpu")
    torch.testing.assert_close(model(**batch).logits, inside)


def test_meta_device(make_model, make_batch):
    model = make_model(randomise=False, alignment="matrix", bottleneck="all").to("meta")
    out = model(**{k: v.to("meta") for k, v in make_batch().items()})
    assert out.logits.shape == (5, 3)
    assert out.loss.device.type == "meta"


def test_an_empty_batch_has_a_loss_of_zero(make_model):
    none = torch.zeros(0, dtype=torch.int64)
    out = make_model()(none.view(0, 5), task_ids=none, labels=torch.zeros(0))
    assert out.loss == 0
    assert out.logits.shape == (0, 3)


def test_checkpoints_are_not_reentrant(make_model):
    with pytest.raises(UsageError, match="use_reentrant"):
        make_model().activation_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_wrapped_linear_layers_are_called(make_model, make_batch, act):
    class Wrapper(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        @property
        def weight(self):
            raise AssertionError("read past the wrapper")

        def forward(self, x):
            return self.base(x) + 0.5

    model = make_model(hidden_act=act)
    batch = make_batch()
    layer = model.bert.encoder.layer[1]
    places = (layer.attention.output, layer.intermediate, layer.output)
    with torch.no_grad():
        for place in places:
            place.dense.bias.add_(0.5)
        want = model(**batch).logits
        for place in places:
            place.dense.bias.sub_(0.5)
            place.dense = Wrapper(place.dense)
        torch.testing.assert_close(model(**batch).logits, want)
