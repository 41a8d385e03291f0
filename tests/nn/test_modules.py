"""The modules used alone, from a condition."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import camtl.nn
from camtl.nn import (
    ConditionalAlignment,
    ConditionalBottleneck,
    ConditionalLayerNorm,
    ConditionalSelfAttention,
    FiLM,
    FiLMLinear,
    FusedLayerNorm,
    NormTables,
    StackedHeads,
)

B, S, D, C, T = 3, 6, 12, 5, 4
IDS = torch.tensor([2, 0, 2])
CU = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
OF_ROW = torch.tensor([0] * 4 + [2] * 5)  # the second sequence is empty


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _random(module):
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    return module.double()


def _data(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_public_names():
    for name in (
        "FiLM",
        "ConditionalLayerNorm",
        "ConditionalSelfAttention",
        "ConditionalBottleneck",
        "HyperNetwork",
    ):
        assert hasattr(camtl.nn, name)
    assert all(hasattr(camtl.nn, name) for name in camtl.nn.__all__)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (lambda: FiLM(C, D), {"gb_weights.weight", "gb_weights.bias"}),
        (
            lambda: ConditionalLayerNorm(D, C),
            {
                "weight",
                "bias",
                "ln_weight_modulation.gb_weights.weight",
                "ln_weight_modulation.gb_weights.bias",
            },
        ),
        (
            lambda: ConditionalSelfAttention(D, 3, 8, 3),
            {
                f"{n}.{p}"
                for n in ("query", "key", "value", "cond_block_diag_attn.gb_weights")
                for p in ("weight", "bias")
            }
            | {"random_weight_matrix"},
        ),
        (
            lambda: ConditionalBottleneck(D),
            {
                f"{n}.{p}"
                for n in ("emb_transf", "hidden_modulation.gb_weights", "down_proj_layer", "up_proj_layer")
                for p in ("weight", "bias")
            },
        ),
    ],
)
def test_released_parameter_names(module, names):
    assert set(module().state_dict()) == names


def test_generators_are_a_leaf_class():
    for module in (FiLM(C, D).gb_weights, ConditionalLayerNorm(D, C, shift_bias=True).ln_bias_modulation):
        assert type(module) is FiLMLinear
        assert not list(module.children())


def test_film():
    module, x, z = _random(FiLM(C, D)), _data(B, S, D), _data(T, C)
    gamma, beta = module.tables(z)
    want = (1 + gamma[IDS])[:, None] * x + beta[IDS][:, None]
    torch.testing.assert_close(module(x, z, IDS), want)
    torch.testing.assert_close(module(x, gamma=gamma, beta=beta, task_ids=IDS), want)
    torch.testing.assert_close(module(x, z[IDS]), want)  # a condition per sequence
    rows = _data(9, D)
    want = (1 + gamma[IDS[OF_ROW]]) * rows + beta[IDS[OF_ROW]]
    torch.testing.assert_close(module(rows, z, IDS, cu_seqlens=CU), want)
    with pytest.raises(ValueError, match="condition z"):
        module(x)
    with pytest.raises(ValueError, match="gamma and beta together, or neither; only beta"):
        module(x, z, IDS, beta=beta)


def test_no_index_gradient_reaches_the_tables():
    """The gradient of index_select on a GPU adds in any order; tables are fetched in ways that do not."""
    alignment = _random(ConditionalAlignment(C, D, kind="matrix"))
    attention = _random(ConditionalSelfAttention(D, 3, 8, 3, condition_size=C, film="entry"))
    x, z = _data(B, S, D), _data(T, C).requires_grad_()
    rows, cu = x.flatten(0, 1), torch.arange(B + 1, dtype=torch.int32) * S
    outputs = [alignment(x, z, IDS), alignment(rows, z, IDS, cu_seqlens=cu), attention(x, z, IDS)[0]]
    names, seen, waiting = set(), set(), [y.grad_fn for y in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            waiting += [parent for parent, _ in node.next_functions]
    assert "EmbeddingBackward0" in names
    assert not {name for name in names if name.startswith("Index")}


@pytest.mark.parametrize("shift", [False, True])
def test_conditional_layer_norm(shift):
    module = _random(ConditionalLayerNorm(D, C, shift_bias=shift))
    x, r, bias, z = _data(B, S, D), _data(B, S, D), _data(D), _data(T, C)
    tables = module.tables(z)
    assert isinstance(tables, NormTables)
    h = x + bias + r
    normal = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-12).sqrt()
    want = normal * ((1 + tables.gamma[IDS]) * module.weight + tables.beta[IDS])[:, None] + module.bias
    if shift:
        want = want + tables.shift[IDS][:, None]
    else:
        assert tables.shift is None
    torch.testing.assert_close(module(x, z, IDS, x_bias=bias, residual=r), want)
    torch.testing.assert_close(module(x, tables=tables, task_ids=IDS, x_bias=bias, residual=r), want)
    packed = module(
        x.flatten(0, 1),
        z,
        IDS,
        x_bias=bias,
        residual=r.flatten(0, 1),
        cu_seqlens=torch.arange(B + 1, dtype=torch.int32) * S,
    )
    torch.testing.assert_close(packed.view(B, S, D), want)
    with pytest.raises(ValueError, match="condition z"):
        module(x)


def test_plain_layer_norm():
    module, x, r, bias = _random(FusedLayerNorm(D)), _data(B, S, D), _data(B, S, D), _data(D)
    want = F.layer_norm(x + bias + r, (D,), module.weight, module.bias, 1e-12)
    torch.testing.assert_close(module(x, x_bias=bias, residual=r), want)
    torch.testing.assert_close(module(x), F.layer_norm(x, (D,), module.weight, module.bias, 1e-12))
    torch.manual_seed(4)
    dropped = module(x, dropout_p=0.5)
    assert not torch.allclose(dropped, module(x))
    lower = module.to(torch.float32)(x.to(torch.bfloat16), residual=r.float())  # as under autocast
    assert lower.dtype == torch.bfloat16
    exact = module(x.to(torch.bfloat16).float(), residual=r.float())
    assert torch.equal(lower, exact.to(torch.bfloat16))  # the residual is not rounded


def test_plain_layer_norm_of_packed_rows():
    module = _random(FusedLayerNorm(D))
    rows, tail = _data(9, D).requires_grad_(), torch.full((3, D), float("nan"), dtype=torch.float64)
    packed = module(torch.cat([rows, tail]), cu_seqlens=CU)
    torch.testing.assert_close(packed[:9], module(rows))
    assert not packed[9:].any()
    packed.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (rows, *module.parameters()))


def _attention_by_hand(module, x, z, ids, mask=None):
    H, Dh = module.num_heads, D // module.num_heads
    q, k, v = (
        f(x).view(*x.shape[:2], H, Dh).transpose(1, 2) for f in (module.query, module.key, module.value)
    )
    scores = q @ k.transpose(-1, -2) / Dh**0.5
    if module.block_width is not None:
        gamma, beta = module.cond_block_diag_attn.tables(z)
        w, n = module.block_width, x.shape[1]
        for b, t in enumerate(ids.tolist()):
            for i in range(n):
                for j in range(n):
                    if i // w == j // w:
                        entry = (1 + gamma[t, j % w]) * module.random_weight_matrix[i, j % w] + beta[t, j % w]
                        scores[b, :, i, j] = scores[b, :, i, j] + entry
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), scores.softmax(-1)


@pytest.mark.parametrize("width", [None, 1, 3, 4, 8])
def test_self_attention(width):
    module = _random(ConditionalSelfAttention(D, 3, 8, width, condition_size=C)).eval()
    x, z = _data(B, S, D), _data(T, C)
    mask = torch.ones(B, S)
    mask[0, 4:] = 0
    mask[1, 2] = 0
    condition = {} if width is None else {"z": z, "task_ids": IDS}
    got, none = module(x, **condition, attention_mask=mask)
    assert none is None
    want, probabilities = _attention_by_hand(module, x, z, IDS, mask)
    torch.testing.assert_close(got, want)
    again, given = module(x, **condition, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(again, want)
    torch.testing.assert_close(given, probabilities)
    packed, _ = module(x.flatten(0, 1), **condition, cu_seqlens=torch.arange(B + 1, dtype=torch.int32) * S)
    torch.testing.assert_close(packed.view(B, S, D), _attention_by_hand(module, x, z, IDS)[0])


def test_self_attention_refuses_nonsense():
    with pytest.raises(ValueError, match="num_heads"):
        ConditionalSelfAttention(10, 3, 8, 2)
    with pytest.raises(ValueError, match=r"block_width.*1\.\.8.*9"):
        ConditionalSelfAttention(D, 3, 8, 9)
    with pytest.raises(ValueError, match="film"):
        ConditionalSelfAttention(D, 3, 8, 2, film="rows")
    with pytest.raises(ValueError, match="num_heads must be 1 or more"):
        ConditionalSelfAttention(D, 0, 8, 2)
    for p in (3.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\)"):
            ConditionalSelfAttention(D, 3, 8, 2, dropout_p=p)
    module = ConditionalSelfAttention(D, 3, 8, 2)
    with pytest.raises(ValueError, match="condition z"):
        module(torch.zeros(1, 4, D))
    with pytest.raises(ValueError, match="padded input"):
        module(
            torch.zeros(4, D),
            torch.zeros(1, D),
            cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
            output_attentions=True,
        )


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_bottleneck(activation):
    module = _random(ConditionalBottleneck(D, C, activation=activation))
    assert module.down_proj_layer.out_features == D // 3
    x, z, r = _data(B, S, D), _data(T, C), _data(B, S, D)
    gamma, beta = module.tables(z)
    h = module.down_proj_layer((1 + gamma[IDS])[:, None] * x + beta[IDS][:, None])
    want = module.up_proj_layer(F.gelu(h) if activation == "gelu" else h)
    torch.testing.assert_close(module(x, z, IDS), want)
    torch.testing.assert_close(module(x, z, IDS, residual=r), want + r)
    torch.testing.assert_close(module(x, generated=torch.cat([gamma, beta], -1), task_ids=IDS), want)
    with pytest.raises(ValueError, match="condition z"):
        module(x)


@pytest.mark.parametrize("kind", ["film", "matrix"])
def test_alignment(kind):
    module = _random(ConditionalAlignment(C, D, kind=kind))
    x, z = _data(B, S, D), _data(T, C)
    gamma, beta = module.tables(z)
    if kind == "film":
        want = (1 + gamma[IDS])[:, None] * x + beta[IDS][:, None]
    else:
        want = x @ (module.matrix * (1 + gamma[IDS])[:, None] + beta[IDS][:, None])
    torch.testing.assert_close(module(x, z, IDS), want)
    rows = torch.cat([x.flatten(0, 1), _data(4, D)])  # four rows behind the last sequence
    packed = module(rows, z, IDS, cu_seqlens=torch.arange(B + 1, dtype=torch.int32) * S)
    torch.testing.assert_close(packed[: B * S].view(B, S, D), want)
    assert not packed[B * S :].any()
    torch.testing.assert_close(module(x[:, 0], z, IDS), want[:, 0])
    with pytest.raises(ValueError, match="kind"):
        ConditionalAlignment(C, D, kind="rows")
    with pytest.raises(ValueError, match="condition z"):
        module(x)
    with pytest.raises(ValueError, match="gamma and beta together"):
        module(x, z, IDS, gamma=gamma)
    module, cu = module.float(), torch.arange(B + 1, dtype=torch.int32) * S
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x.float(), z.float(), IDS).dtype == torch.float32
        assert module(rows.float(), z.float(), IDS, cu_seqlens=cu).dtype == torch.float32


def test_stacked_heads():
    heads = StackedHeads(D, [2, 1, 3], ["ce", "mse", "ce"]).double()
    features, ids = _data(4, D), torch.tensor([2, 0, 1, 2])
    losses, logits, entropy = heads(features, ids, torch.tensor([2.0, 1.0, 0.3, 0.0]))
    for b, t in enumerate(ids.tolist()):
        rows = heads.rows(t)
        own = features[b] @ heads.weight[rows].T + heads.bias[rows]
        torch.testing.assert_close(logits[b, : heads.sizes[t]], own)
    torch.testing.assert_close(losses[1], (logits[2, 0] - 0.3).square())
    torch.testing.assert_close(losses[2], F.cross_entropy(logits[[0, 3]], torch.tensor([2, 0])))
    assert entropy.shape == (4,)
    before = heads.weight.clone()
    heads.append(2, "ce", std=0.02)
    assert heads.sizes == (2, 1, 3, 2)
    assert heads.out_features == 8
    assert torch.equal(heads.weight[:6], before)
    heads.remove(1)
    assert heads.sizes == (2, 3, 2)
    assert heads.loss_types == ("ce", "ce", "ce")
    assert torch.equal(heads.weight[2:5], before[3:6])
    with pytest.raises(ValueError, match="positive"):
        StackedHeads(D, [])


def test_nn_and_models_import_without_the_heavy_packages():
    """nn knows no transformers; models need neither datasets nor pydantic nor seqeval."""
    code = """
import sys
for name in ("transformers", "datasets", "pydantic", "seqeval"):
    sys.modules[name] = None
import camtl.nn
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    code = """
import sys
for name in ("datasets", "seqeval", "sklearn", "scipy", "matplotlib"):
    sys.modules[name] = None
import camtl.models
higher = {"camtl.tasks", "camtl.data", "camtl.training"}
assert not higher & set(sys.modules)
camtl.models.CaMtlConfig(tasks=[{"name": "a", "num_labels": 2}])
assert not higher & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
