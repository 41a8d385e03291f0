"""The rule for results: close to the truth, as close as plain PyTorch in the same dtype, a little more."""

from __future__ import annotations

import math

import pytest
import torch

from camtl.bench.check import check, largest_error, step_of


def leaves(dtype=torch.float32, rows=16):
    torch.manual_seed(0)
    return [torch.randn(size).to(dtype).requires_grad_() for size in ((rows, 8), (8,))]


def call(on, x, weight):
    """``weight`` has a gradient that sums over rows."""
    y = x * weight
    if on == "off":
        y = y * (1 + 8 * torch.finfo(x.dtype).eps)
    if on == "nan":
        y = torch.where(y == y.max(), math.nan, y)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_right_passes(dtype):
    assert check(call, "reference", leaves(dtype), rows=16) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_off_fails(dtype):
    wrong = check(call, "off", leaves(dtype), rows=16)
    assert wrong[0].startswith("result 0 [16, 8]: off by ")
    assert ", allowed " in wrong[0]


def test_not_a_number_fails():
    assert "off by inf" in check(call, "nan", leaves())[0]


class Doubled(torch.autograd.Function):
    """x, with a gradient twice as large as it should be."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_a_wrong_gradient_fails_alone():
    wrong = check(lambda on, x, w: (Doubled.apply(x) if on == "ours" else x) * w, "ours", leaves())
    assert len(wrong) == 1
    assert wrong[0].startswith("result 1 [16, 8]")


def test_integers_must_be_the_same():
    def order(on, x):
        return x.detach().argsort(descending=on == "ours")

    x = [torch.arange(4.0)]
    assert check(order, "reference", x) == []
    assert check(order, "ours", x) == ["result 0: not reference's"]


def test_shapes_and_numbers_of_results_must_be_the_same():
    x = [torch.zeros(4)]
    assert check(lambda on, x: x[1:] if on == "ours" else x, "ours", x) == ["result 0: shape [3], not [4]"]
    assert check(lambda on, x: (x, x) if on == "ours" else x, "ours", x) == ["2 results, reference has 1"]


def test_infinities_of_the_same_sign_are_equal():
    got, true = torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 1.5], dtype=torch.float64)
    assert largest_error(got, true) == 0.5
    assert largest_error(-got, true) == math.inf
    assert largest_error(torch.zeros(0), torch.zeros(0)) == 0.0


def test_a_step_returns_outputs_and_gradients():
    x, w = leaves()
    y, dx, dw = step_of(torch.mul, [x, w])()
    assert torch.equal(y, x * w)
    torch.testing.assert_close(dw, (dx / w * x).sum(0))
    (again, *_), (_, dx2, _) = step_of(torch.mul, [x, w])(), step_of(torch.mul, [x, w])()
    assert torch.equal(again, y)
    assert torch.equal(dx2, dx)  # the same cotangents every time


def test_only_trained_outputs_have_gradients():
    x, w = leaves()
    results = step_of(lambda x, w: (x * w, x + w), [x, w], trained=1)()
    assert len(results) == 4
    torch.testing.assert_close(results[2] / w, step_of(torch.mul, [x, w])()[1] / w)
