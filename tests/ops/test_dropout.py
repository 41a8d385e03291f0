"""The dropout contract: known Philox vectors, element order, the counter's carry, and the ops that use it."""

from __future__ import annotations

import math

import pytest
import torch

from camtl import ops
from camtl.ops._dropout import draw_seed, dropout, dropout_mask, philox_4x32_10

VECTORS = [  # counter, key, words: from the known-answer file of Random123
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[torch.Tensor]:
    return [torch.tensor(int(word, 16)) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_known_answers(counter, key, expected):
    got = philox_4x32_10(words(counter), words(key))
    assert " ".join(f"{int(word):08x}" for word in got) == expected


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("numel", [1, 3, 4, 37])
@pytest.mark.parametrize(
    ("seed", "offset"),
    [(0, 0), (12345, 7), (2**62 - 1, 2**62 - 3), (-1, 5), (9, 2**32 - 2), (9, -1), (3, 2**63 - 2)],
)
def test_mask_is_the_documented_function_of_the_element(h, seed, offset, numel, p):
    got = dropout_mask(torch.tensor([seed, offset]), numel, p)
    assert torch.equal(got, h.keeps(seed, offset, p, numel))


def test_counter_carries_into_word_one(h):
    # Elements 0-3 use counter word 0 = ffffffff, elements 4-7 word 0 = 0 with word 1 = 1, not a repeat of
    # call 0.
    across = dropout_mask(torch.tensor([5, 2**32 - 1]), 4096, 0.5)
    start = dropout_mask(torch.tensor([5, 0]), 4096, 0.5)
    assert not torch.equal(across[4:], start[:-4])
    assert torch.equal(across[:64], h.keeps(5, 2**32 - 1, 0.5, 64))


def test_threshold_is_exact_in_24_bits():
    seed = torch.tensor([1, 2])
    smallest = 2.0**-24
    assert dropout_mask(seed, 1000, 0.0).all()
    assert dropout_mask(seed, 1000, smallest / 2).sum() >= 999
    assert torch.equal(
        dropout_mask(seed, 1000, 0.3), dropout_mask(seed, 1000, math.ceil(0.3 * 2**24) * smallest)
    )
    assert not dropout_mask(seed, 1000, 1 - 2.0**-40).any()


def test_rate_shape_and_scale():
    x = torch.ones(300, 7, 11)
    y = dropout(x, 0.25, torch.tensor([3, 4]))
    kept = y != 0
    assert y.shape == x.shape
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / 0.75))
    sigma = math.sqrt(0.25 * 0.75 / x.numel())
    assert abs(float(kept.float().mean()) - 0.75) < 5 * sigma
    assert dropout(x, 0.0, None) is x


def test_neighbouring_offsets_overlap_by_whole_calls():
    a = dropout_mask(torch.tensor([3, 0]), 400, 0.5)
    b = dropout_mask(torch.tensor([3, 10]), 360, 0.5)
    assert torch.equal(a[40:], b)


def test_drawn_seed_follows_torch_and_differs_between_calls():
    torch.manual_seed(7)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(7)
    assert torch.equal(first, draw_seed(torch.device("cpu")))
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64
    assert first.shape == (2,)


def test_the_backward_drops_what_the_forward_dropped(h):
    x = h.leaf(4, 6, 8)
    weight, bias, residual = torch.ones(8).double(), torch.zeros(8).double(), torch.randn(4, 6, 8).double()
    y = ops.conditional_layer_norm(
        x, weight, bias, residual=residual, dropout_p=0.5, dropout_seed=torch.tensor([1, 2])
    )
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert torch.equal(grad != 0, h.keeps(1, 2, 0.5, x.numel()).view(x.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("seed", "offset"),
    [
        (0, 0),
        (-1, 5),
        (2**63 - 1, -(2**63)),
        (9, 2**32 - 20),
        (9, 2**32),
        (7, -1),
        (3, 2**63 - 2),
        (-5, -300),
    ],
)
def test_every_instruction_set_drops_the_same_elements(h, dtype, seed, offset):
    """Odd starts (rows of an odd length) and any count: gradients of x are 0 where it was dropped."""
    given = torch.tensor([seed, offset])
    for D in (*range(1, 14), 31, 33, 63, 64, 65, 127, 150, 200):
        x = torch.randn(3, D, dtype=dtype, requires_grad=True)
        weight, bias, residual = (torch.randn(*s, dtype=dtype) for s in ((D,), (D,), (3, D)))
        dy = torch.randn(3, D, dtype=dtype)
        for p in (0.25, 0.7):
            keep = dropout_mask(given, (3, D), p)
            options = {"residual": residual, "dropout_p": p, "dropout_seed": given, "eps": 0.1}
            expected = ops.conditional_layer_norm(x, weight, bias, **options, backend="reference")
            for isa in h.every_isa():
                y = ops.conditional_layer_norm(x, weight, bias, **options, backend="cpu")
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
                (grad,) = torch.autograd.grad(y, x, dy)
                assert not grad[~keep].any(), isa
                assert D < 3 or grad[keep].all(), isa


def test_every_instruction_set_has_the_24_bits_of_the_threshold(h):
    """Where p sits between two neighbouring values of u the element is dropped, at them it is kept."""
    x, weight, bias = torch.randn(1, 40), torch.ones(40), torch.zeros(40)
    for e in (0, 5, 38):
        u = (h.philox_word(11, 4, e) >> 8) / 2**24
        for p, kept in ((u, True), (u + 2**-26, False), (u - 2**-26, True)):
            for _isa in h.every_isa():
                leaf = x.clone().requires_grad_()
                y = ops.conditional_layer_norm(
                    leaf,
                    weight,
                    bias,
                    residual=x,
                    dropout_p=p,
                    dropout_seed=torch.tensor([11, 4]),
                    backend="cpu",
                )
                (grad,) = torch.autograd.grad(y, leaf, torch.randn(1, 40))
                assert bool(grad[0, e] != 0) == kept


def test_no_seed_means_a_new_mask_each_call():
    x, weight, bias = torch.randn(8, 64), torch.ones(64), torch.zeros(64)
    calls = [ops.conditional_layer_norm(x, weight, bias, dropout_p=0.5) for _ in range(2)]
    assert not torch.equal(*calls)


def test_mask_under_compile_equals_eager():
    torch._dynamo.reset()
    graph = torch.compile(dropout_mask, backend="aot_eager", fullgraph=True)
    seed = torch.tensor([2**61 + 12345, 2**40 + 1])
    assert torch.equal(graph(seed, (5, 13), 0.4), dropout_mask(seed, (5, 13), 0.4))


@pytest.mark.slow
def test_mask_under_inductor_equals_eager():
    torch._dynamo.reset()
    graph = torch.compile(dropout_mask, fullgraph=True)
    seed = torch.tensor([2**61 + 12345, 2**40 + 1])
    assert torch.equal(graph(seed, (50, 131), 0.4), dropout_mask(seed, (50, 131), 0.4))
