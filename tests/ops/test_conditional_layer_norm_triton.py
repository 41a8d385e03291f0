"""``conditional_layer_norm`` on Triton: tilings that its heuristic does not meet by itself."""

from __future__ import annotations

import pytest
import torch

from camtl import ops

SEED = torch.tensor([-5, 2**33])
NAMES = ("x", "weight", "bias", "gamma", "beta", "bias_shift", "x_bias", "residual")
TILINGS = [(1, 4, 1, 4, 1), (2, 4, 4, 4, 2), (8, 4, 2, 1, 5), (16, 8, 64, 2, 1)]


@pytest.fixture
def tile(monkeypatch):
    """Lets the kernels run with a configuration."""
    from camtl.kernels import conditional_layer_norm as kernels

    def choose(*numbers: int) -> None:
        config = kernels.LayerNormConfig(*numbers)
        monkeypatch.setattr(kernels, "_config", lambda x: config)

    return choose


def inputs_of(h, *size, T=3):
    D = size[-1]
    shapes = [(D,), (D,), (T, D), (T, D), (T, D), (D,), size]
    return [h.leaf(*size).detach() + 2, *(h.leaf(*shape).detach() for shape in shapes)]


def caller(tasks, starts=None, p=0.2):
    def call(on, x, weight, bias, gamma, beta, shift, x_bias, residual):
        return ops.conditional_layer_norm(
            x, weight, bias, gamma, beta, tasks, bias_shift=shift, x_bias=x_bias, residual=residual,
            dropout_p=p, dropout_seed=SEED, eps=1e-6, cu_seqlens=starts, backend=on,
        )  # fmt: skip

    return call


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.interpreter)], indirect=True)
class TestTriton:
    @pytest.mark.parametrize("tiling", TILINGS)
    @pytest.mark.parametrize(
        ("lengths", "tail"),
        [
            ((1, 0, 2, 1, 3, 0, 1, 1), 0),  # several sequences in a tile
            ((0, 0, 7, 21, 0), 30),  # whole tiles and programs of no sequence
            ((30,), 1),  # several programs in a sequence
        ],
    )
    def test_packed(self, h, backend, tile, tiling, lengths, tail):
        tile(*tiling)
        tasks, starts = torch.randint(0, 3, (len(lengths),)), h.cu(*lengths)
        inputs = inputs_of(h, sum(lengths) + tail, 12)
        h.assert_rule(caller(tasks, starts), inputs, torch.float32, backend=backend, names=NAMES)

    @pytest.mark.parametrize("tiling", TILINGS)
    def test_padded(self, h, backend, tile, tiling):
        tile(*tiling)
        inputs = inputs_of(h, 4, 5, 10)
        call = caller(torch.tensor([2, 0, 0, 2]))
        h.assert_rule(call, inputs, torch.float32, backend=backend, names=NAMES)

    @pytest.mark.parametrize("tail", [0, 9])
    def test_no_table_needs_no_sequence(self, h, backend, tile, tail):
        """Rows of all sequences are summed as one; those of none stay out."""
        tile(4, 4, 4, 4, 1)
        starts = h.cu(3, 0, 17, 5)
        x, weight, bias, *_, x_bias, residual = inputs_of(h, 25 + tail, 20)

        def call(on, x, weight, bias, x_bias, residual):
            return ops.conditional_layer_norm(
                x, weight, bias, x_bias=x_bias, residual=residual, eps=1e-6, cu_seqlens=starts, backend=on
            )

        h.assert_rule(call, [x, weight, bias, x_bias, residual], torch.float32, backend=backend)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("D", [2050, 6148])
    def test_wide_rows(self, h, backend, D, dtype):
        """Beyond the sums' block of features; numbers of dropout one by one, and in fours."""
        inputs = inputs_of(h, 2, 3, D)
        h.assert_rule(caller(torch.tensor([2, 0])), inputs, dtype, backend=backend, names=NAMES)

    def test_the_number_of_programs_changes_nothing_but_rounding(self, h, backend, tile):
        tasks, inputs = torch.tensor([1, 2, 1]), inputs_of(h, 3, 11, 8)
        found = []
        for programs in (1, 3, 11):
            tile(8, 4, 1, 4, programs)
            out, grads = h.outputs_and_gradients(lambda *a: caller(tasks)(backend, *a), inputs)
            found.append((*out, *grads))
        for other in found[1:]:
            h.same(other, found[0], rtol=1e-12, atol=1e-12)
            assert torch.equal(other[1], found[0][1])

    def test_a_seed_beyond_every_word(self, h, backend):
        """Counters that pass 2**64 begin again, as everywhere."""
        seed = torch.tensor([-1, -2])
        x, weight, bias = torch.randn(3, 16), torch.ones(16), torch.zeros(16)
        same = {"dropout_p": 0.5, "dropout_seed": seed, "eps": 1e-6}
        expected = ops.conditional_layer_norm(x, weight, bias, **same, backend="reference")
        h.same(ops.conditional_layer_norm(x, weight, bias, **same, backend=backend), expected)
