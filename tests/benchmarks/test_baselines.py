"""Others compute what the op computes, where they claim to; libraries are called as they want to be."""

from __future__ import annotations

import itertools
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from camtl import benchmarks, ops
from camtl.benchmarks import _contenders, shapes
from camtl.benchmarks.baselines import fla, flex, liger, released, sdpa
from camtl.benchmarks.model import _setup
from camtl.benchmarks.ops import bench_conditional_attention as conditional_attention
from camtl.benchmarks.ops import bench_conditional_bottleneck as conditional_bottleneck
from camtl.benchmarks.ops import bench_conditional_layer_norm as conditional_layer_norm
from camtl.benchmarks.ops import bench_film as film
from camtl.ops import reference

SIZES = [
    shapes.Size("tiny", 4, 8, T=3, dtype=torch.float32),
    shapes.Size("tiny", 5, 8, T=3, dtype=torch.float32, packed=True),
]


class OnGpu:
    """A case's rivals as they are on a GPU, to be run on CPU tensors."""

    def __init__(self, kind, size):
        self.case = kind.CASE(size, "cpu", smoke=True)
        self.inputs = self.case.inputs()
        self.case.device = "cuda"
        self.rivals = {r.name: r for r in self.case.rivals(self.case.batch)}

    def outputs(self, name):
        """Of the op, and of a rival, both in the case's own form."""
        with torch.no_grad():
            inputs = [x.detach() for x in self.inputs]
            got = self.case._unpacking(self.rivals[name])(*inputs)[0]
            return got, self.case.call("reference", *inputs)


@pytest.mark.parametrize("size", SIZES, ids=["padded", "packed"])
@pytest.mark.parametrize("kind", [film, conditional_bottleneck])
def test_short_forms_are_the_op(kind, size):
    torch.testing.assert_close(*OnGpu(kind, size).outputs("torch compiled"))


@pytest.mark.parametrize("size", SIZES, ids=["padded", "packed"])
def test_flex_attention_is_the_op(size):
    """It has no backward pass on a CPU, but a forward one."""
    torch.testing.assert_close(*OnGpu(conditional_attention, size).outputs("FlexAttention, learned tables"))


def test_flex_attention_says_why_it_is_absent():
    assert "dropout" in flex.absent("cuda", 0.1)
    assert "backward" in flex.absent("cpu", 0.0)
    assert flex.absent("cuda", 0.0) == ""


def test_one_way_of_sdpa_is_an_order():
    """The efficient kernels are not on a CPU, and nothing else runs in their place."""
    gpu = OnGpu(conditional_attention, SIZES[0])
    for way in ("efficient", "cuDNN"):
        with pytest.raises(RuntimeError):
            gpu.rivals[f"SDPA {way}, learned bias"].fn(*gpu.inputs)


def test_sdpa_without_bias_is_plain_attention():
    size = SIZES[0]
    q, k, v = OnGpu(conditional_attention, size).inputs[:3]
    expected = ops.conditional_attention(q, k, v, None, None, None, None, backend="reference")
    torch.testing.assert_close(sdpa.no_bias(0.0)(q, k, v), expected)


@pytest.fixture
def package(monkeypatch):
    """Stands in for a package that is not installed."""

    def make(name, **content):
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            module = types.ModuleType(".".join(parts[:n]))
            module.__path__ = []
            module.__spec__ = types.SimpleNamespace(name=module.__name__)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(sys.modules[name]).update(content)

    return make


def _norms(size):
    case = conditional_layer_norm.CASE(size, "cpu", smoke=True)
    x, residual, x_bias, weight, bias, *_ = inputs = case.inputs()
    h = x + x_bias.to(x.dtype) + residual
    expected = F.layer_norm(h, h.shape[-1:], weight.to(h.dtype), bias.to(h.dtype), 1e-12)
    return {r.name: r for r in case.rivals(case.batch)}, inputs[:5], expected


def test_liger_is_called_as_it_wants_to_be(package):
    seen = []

    class LigerLayerNormFunction:
        @staticmethod
        def apply(x, weight, bias, eps):
            seen.append((x.dtype, weight.dtype, bias.dtype, eps))
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    package("liger_kernel.ops.layer_norm", LigerLayerNormFunction=LigerLayerNormFunction)
    size = shapes.Size("tiny", 4, 8, T=3, dtype=torch.bfloat16)
    rivals, inputs, expected = _norms(size)
    torch.testing.assert_close(rivals["Liger LayerNorm"].fn(*inputs), expected)
    assert seen == [(torch.bfloat16, torch.bfloat16, torch.bfloat16, 1e-12)]
    assert liger.absent("cuda") == ""
    assert liger.absent("cpu") == "needs a GPU"


def test_fla_is_called_as_it_wants_to_be(package):
    def layer_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False):
        assert weight.dtype == x.dtype == residual.dtype
        return F.layer_norm(x + residual, x.shape[-1:], weight, bias, eps)

    package("fla.modules.layernorm", layer_norm=layer_norm)
    rivals, inputs, expected = _norms(shapes.Size("tiny", 4, 8, T=3, dtype=torch.bfloat16))
    torch.testing.assert_close(rivals["fla LayerNorm"].fn(*inputs), expected)
    assert fla.absent("cuda") == ""


def test_what_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(_contenders.importlib.util, "find_spec", lambda name: None)
    assert liger.absent("cuda") == "liger-kernel is not installed"
    assert fla.absent("cuda") == "flash-linear-attention is not installed"


# -- the released code's ways


def test_a_released_norm_takes_the_first_condition_of_each_task():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 4, 6), torch.randn(6), torch.randn(6)
    gamma, beta = torch.randn(2, 5, 6)
    ids = torch.tensor([7, 2, 7, 0, 2])  # neither sorted nor without gaps

    def scale(task, mine):
        return (1 + gamma[mine][0]) * weight + beta[mine][0]

    got = released.conditional_layer_norm(x, scale, bias, ids, 1e-12)
    first = torch.tensor([0, 1, 0, 3, 1])
    y = F.layer_norm(x, (6,), eps=1e-12)
    expected = y * ((1 + gamma) * weight + beta)[first][:, None] + bias
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("L", "w"), [(8, 3), (8, 8), (16, 4), (7, 1), (128, 22)])
def test_a_released_bias_is_ours(L, w):
    torch.manual_seed(0)
    table, gamma, beta = torch.randn(L, w), torch.randn(3, w), torch.randn(3, w)
    ids = torch.tensor([2, 0, 0, 1])
    got = released.attention_bias(table, gamma[ids], beta[ids])
    torch.testing.assert_close(got, reference._attention_bias(table, gamma, beta, ids, L)[:, 0])


def test_a_released_mask_hides_padding():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 2, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    got, probabilities = released.attention(q, k, v, None, mask)
    expected = ops.conditional_attention(q, k, v, None, None, None, None, attention_mask=mask)
    torch.testing.assert_close(got, expected)
    assert not probabilities[0, :, :, 3:].any()


def test_a_released_loss_is_ours():
    torch.manual_seed(0)
    sizes, ids = [2, 1, 3, 2], torch.tensor([2, 0, 1, 2, 0, 1, 1])  # task 3 is absent
    features, weight, bias = torch.randn(7, 5), torch.randn(8, 5), torch.randn(8)
    labels = torch.tensor([2.0, 1, 0.5, 0, 0, 3.25, -1])
    ends = [2, 3, 6, 8]

    def head(task, x):
        rows = slice(ends[task] - sizes[task], ends[task])
        return F.linear(x, weight[rows], bias[rows])

    found = released.multitask_loss(features, head, 4, ids, labels)
    losses, logits, entropy = ops.multitask_loss(
        features, weight, bias, sizes, ids, labels, backend="reference"
    )
    torch.testing.assert_close(found.per_task, losses)
    torch.testing.assert_close(found.loss, losses.sum() / 3)
    torch.testing.assert_close(found.entropy, entropy)
    torch.testing.assert_close(found.logits, logits[ids == 2])
    means = torch.stack([entropy[ids == t].mean() for t in ids.tolist()])
    torch.testing.assert_close(found.mean_entropy, means)
    assert found.largest == pytest.approx(float(means.max()))
    silent = released.multitask_loss(features, head, 4, ids, None)
    assert silent.loss is None
    assert not silent.per_task.any()


@pytest.mark.parametrize("borrow", [None, [-1, -1, 0]])
def test_a_released_choice_has_our_scores(borrow):
    torch.manual_seed(0)
    entropy, ids = torch.rand(11), torch.tensor([2, 0, 1, 2, 0, 1, 1, 0, 2, 2, 2])
    chosen, scores = released.select_uncertain(entropy, ids, 4, borrow)
    ours, expected = ops.select_uncertain(
        entropy, ids, 4, 3, score="reference", borrow=borrow, backend="reference"
    )
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(scores[chosen], scores[ours])


def test_a_choice_among_sure_candidates_is_not_a_number_that_is_none():
    _, scores = released.select_uncertain(torch.zeros(4), torch.tensor([0, 0, 1, 1]), 2)
    assert not scores.any()


# -- the comparison


def test_differences_are_found():
    true = [torch.tensor([1.0, -math.inf, 2.0]), torch.ones(3)]
    assert _contenders.differences(true, true, torch.float32) == []
    near = [true[0] * 1.0001, true[1]]
    assert _contenders.differences(near, true, torch.float32) == []
    for got, word in (
        ([true[0] * 1.1, true[1]], "result 0 [3]: off by"),
        ([true[0], torch.ones(2)], "result 1: shape [2]"),
        ([torch.tensor([1.0, 0.0, 2.0])], "infinite"),
        ([torch.tensor([1.0, -math.inf, math.nan])], "infinite"),
    ):
        (reason,) = _contenders.differences(got, true, torch.float32)
        assert word in reason
    assert _contenders.differences([true[0] * 1.02], true, torch.bfloat16) == []


def test_a_wrong_baseline_is_caught(monkeypatch):
    (case, *_) = benchmarks.cases("ops", "cpu", None, "smoke", ["conditional_attention"])
    right = released.attention_bias
    monkeypatch.setattr(released, "attention_bias", lambda *a: 1.1 * right(*a))
    wrong = next(c for c in case.contenders() if c.name == "released")
    assert case.check(wrong, case.inputs())


def test_functions_are_compiled_apart():
    """The functions that one definition makes do not count as one that is compiled again and again."""
    torch._dynamo.reset()
    counted = []

    def made(n):
        return lambda x: x * n

    for n in range(torch._dynamo.config.recompile_limit + 4):
        fn = _contenders.compiled(made(n), smoke=True)
        assert float(fn(torch.ones(()))) == n
        counted.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert all(b > a for a, b in itertools.pairwise(counted))


def test_bert_is_as_large_as_ours():
    from camtl.benchmarks.baselines import huggingface

    setup = _setup.Setup("minilm", 4)
    with torch.device("meta"):
        model = huggingface.bert(setup)
    products = sum(
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layer." in n
    )
    bottleneck = 2 * 384 * 128
    assert products == setup.weights(range(6)) - bottleneck
