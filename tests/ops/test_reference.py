"""What every op promises: repeatability, one graph, empty inputs; reference also no host reads, captures."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

from camtl import ops
from camtl.ops import reference


def calls(device):
    """One call of each op, padded and packed, with every option; floats and ints made on ``device``."""

    def x(*size):
        return torch.ones(*size, device=device, requires_grad=True)

    def tasks(n):
        return torch.zeros(n, dtype=torch.int64, device=device)

    seed, cu = (
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.zeros(4, dtype=torch.int32, device=device),
    )
    D, T, t = 6, 3, tasks(3)
    tables = (x(T, D), x(T, D))
    bottleneck = (*tables, x(2, D), x(2), x(D, 2), x(D), t)
    attention = (x(8, 3), x(T, 3), x(T, 3), t)
    options = {"dropout_p": 0.5, "dropout_seed": seed}
    norm = {"bias_shift": x(T, D), "x_bias": x(D), **options}
    heads = (x(4, D), x(8, D), x(8), [3, 4, 1], tasks(4), x(4, 4).detach())
    return {
        "film": lambda: ops.film(x(3, 4, D), *tables, t),
        "film packed": lambda: ops.film(x(7, D), *tables, t, cu_seqlens=cu),
        "norm": lambda: ops.conditional_layer_norm(
            x(3, 4, D), x(D), x(D), *tables, t, residual=x(3, 4, D), **norm
        ),
        "norm packed": lambda: ops.conditional_layer_norm(
            x(7, D), x(D), x(D), *tables, t, residual=x(7, D), cu_seqlens=cu, **norm
        ),
        "attention": lambda: ops.conditional_attention(
            x(3, 5, 2, 4),
            x(3, 5, 2, 4),
            x(3, 5, 2, 4),
            *attention,
            attention_mask=x(3, 5).detach(),
            **options,
        ),
        "attention packed": lambda: ops.conditional_attention(
            x(9, 3, 2, 4), None, None, *attention, cu_seqlens=cu, max_seqlen=5, **options
        ),
        "bottleneck": lambda: ops.conditional_bottleneck(x(3, 4, D), *bottleneck, activation="gelu"),
        "bottleneck packed": lambda: ops.conditional_bottleneck(
            x(7, D), *bottleneck, residual=x(7, D), cu_seqlens=cu
        ),
        "gelu": lambda: ops.bias_gelu(x(3, D), x(D)),
        "loss": lambda: ops.multitask_loss(*heads, loss_types=["bce", "ce", "mse"]),
        "select": lambda: ops.select_uncertain(
            x(9), tasks(9), 4, T, score="reference", borrow=[-1, 0, -1], reserve=[0, 0, 2]
        ),
    }


@pytest.mark.parametrize("name", calls("meta"))
def test_nothing_is_read_by_the_host_and_nothing_lies_on_another_device(name):
    """On the meta device a value that is read, or a tensor made on the CPU on the way, raises."""
    result = calls("meta")[name]()
    first = result[0] if isinstance(result, tuple) and name != "select" else result
    if isinstance(first, torch.Tensor):
        first.sum().backward()
        assert first.device.type == "meta"


def test_the_reference_source_has_no_sync_and_no_task_loop():
    source = Path(reference.__file__).read_text(encoding="utf-8")
    for forbidden in (".item(", ".tolist(", "nonzero", ".cpu(", "masked_select", ".numpy("):
        assert forbidden not in source
    assert not [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.For, ast.While))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", calls("meta"))
def test_every_op_can_be_captured_in_a_cuda_graph(name):
    call = calls("cuda")[name]
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            expected = call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call()
        graph.replay()
        torch.cuda.synchronize()
    torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("backend")
def test_two_runs_are_bitwise_equal():
    def run():
        torch.manual_seed(1)
        tasks, cu = torch.tensor([2, 0, 2]), torch.tensor([0, 30, 30, 75], dtype=torch.int32)
        x, gamma, beta = (torch.randn(*s).requires_grad_() for s in ((80, 3, 2, 16), (3, 7), (3, 7)))
        table, scale = torch.randn(64, 7).requires_grad_(), torch.randn(3, 32).requires_grad_()
        y = ops.conditional_attention(
            x, None, None, table, gamma, beta, tasks, cu_seqlens=cu, max_seqlen=45, dropout_p=0.1
        ).flatten(1)
        y = ops.conditional_layer_norm(
            y,
            scale[0],
            scale[1],
            scale,
            scale,
            tasks,
            dropout_p=0.1,
            cu_seqlens=cu,
            residual=x[:, 0].flatten(1),
        )
        return [y, *torch.autograd.grad(y.square().sum(), [x, gamma, beta, table, scale])]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.usefixtures("backend")
def test_one_dynamic_graph_serves_other_lengths():
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def block(x, gamma, beta, tasks, cu):
        y = ops.film(x, gamma, beta, tasks, cu_seqlens=cu).view(-1, 2, 4)
        return ops.conditional_attention(y, y, y, None, None, None, None, cu_seqlens=cu, max_seqlen=8)

    compiled = torch.compile(block, backend=count, fullgraph=True, dynamic=True)
    for lengths in ((3, 2), (4, 0, 5), (1, 2, 3, 4)):
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        args = (torch.randn(int(cu[-1]) + 2, 8), torch.randn(9, 8), torch.randn(9, 8))
        args = (*args, torch.randint(0, 9, (len(lengths),)), cu)
        torch.testing.assert_close(compiled(*args), block(*args))
    assert len(graphs) == 1


@pytest.mark.usefixtures("backend")
def test_one_dynamic_graph_serves_other_padded_lengths():
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def block(q, table, gamma, beta, tasks):
        return ops.conditional_attention(q, q, q, table, gamma, beta, tasks)

    compiled = torch.compile(block, backend=count, fullgraph=True, dynamic=True)
    tables = (torch.randn(24, 5), torch.randn(9, 5), torch.randn(9, 5))
    for B, S in ((3, 7), (4, 5), (6, 13), (5, 23)):
        args = (torch.randn(B, S, 2, 4), *tables, torch.randint(0, 9, (B,)))
        torch.testing.assert_close(compiled(*args), block(*args))
    assert len(graphs) == 1


@pytest.mark.usefixtures("backend")
def test_export():
    class Block(torch.nn.Module):
        def forward(self, x, gamma, beta, tasks):
            return ops.film(x, gamma, beta, tasks)

    args = (torch.randn(2, 3, 4), torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 2]))
    program = torch.export.export(Block(), args)
    torch.testing.assert_close(program.module()(*args), ops.film(*args))


@pytest.mark.usefixtures("backend")
def test_checkpointing_draws_the_same_mask_again():
    x = torch.randn(16, 32, requires_grad=True)

    def norm(x):
        return ops.conditional_layer_norm(
            x, torch.ones(32), torch.zeros(32), residual=x.detach(), dropout_p=0.5
        )

    grads = []
    for call in (norm, lambda x: torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(call(x).pow(3).sum(), x)[0])
    assert torch.equal(*grads)


@pytest.mark.usefixtures("backend")
def test_empty_inputs_keep_their_shapes():
    ids, none = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    tables = torch.randn(3, 4), torch.randn(3, 4)
    assert ops.film(torch.randn(0, 3, 4), *tables, ids).shape == (0, 3, 4)
    assert torch.equal(ops.film(torch.randn(3, 4), *tables, ids, cu_seqlens=none), torch.zeros(3, 4))
    q = torch.randn(0, 2, 4)
    out = ops.conditional_attention(q, q, q, torch.randn(6, 4), *tables, ids, cu_seqlens=none)
    assert out.shape == (0, 2, 4)
    options = {"score": "reference", "reserve": [1, 0], "borrow": [1, -1]}
    indices, scores = ops.select_uncertain(torch.zeros(0), ids, 3, 2, **options)
    assert indices.shape == scores.shape == (0,)
