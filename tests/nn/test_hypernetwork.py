from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from camtl.models import CaMtlConfig, CaMtlForMultiTask
from camtl.nn import ConditionalBottleneck, FiLMLinear, HyperNetwork

T, C, D = 7, 6, 8


class Products(TorchDispatchMode):
    """Records ``(op, rows, columns)`` of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.seen.append((name, out.shape[-2], out.shape[-1]))
        return out


def _parts(seed: int = 0):
    torch.manual_seed(seed)
    parts = nn.ModuleDict(
        {
            "embedding": nn.Embedding(T, C),
            "transformation": nn.Linear(C, C),
            "alignment": FiLMLinear(C, 2 * D),
            "a": FiLMLinear(C, 4),
            "b": FiLMLinear(C, 10),
            "bottlenecks": nn.ModuleList([ConditionalBottleneck(D, C) for _ in range(3)]),
            "net": HyperNetwork(),
        }
    )
    return parts.eval()


def _run(parts):
    return parts["net"](
        parts["embedding"].weight,
        {"a": parts["a"], "b": parts["b"]},
        transformation=parts["transformation"],
        alignment=parts["alignment"],
        bottlenecks=list(parts["bottlenecks"]),
    )


def test_tables_are_those_of_the_generators():
    parts = _parts().double()
    tables = _run(parts)
    z = parts["embedding"].weight
    condition = parts["transformation"](z)
    torch.testing.assert_close(tables["alignment"], parts["alignment"](z))
    torch.testing.assert_close(tables["a"], parts["a"](condition))
    torch.testing.assert_close(tables["b"], parts["b"](condition))
    for k, bottleneck in enumerate(parts["bottlenecks"]):
        gamma, beta = bottleneck.tables(condition)
        torch.testing.assert_close(tables[f"bottleneck.{k}"], torch.cat([gamma, beta], -1))
    assert list(tables) == ["alignment", "a", "b", "bottleneck.0", "bottleneck.1", "bottleneck.2"]


def test_gradients_are_those_of_the_generators():
    parts, plain = _parts().double(), _parts().double()
    sum(table.square().sum() for table in _run(parts).values()).backward()
    z = plain["embedding"].weight
    condition = plain["transformation"](z)
    want = [plain["alignment"](z), plain["a"](condition), plain["b"](condition)]
    want += [t for b in plain["bottlenecks"] for t in b.tables(condition)]
    sum(table.square().sum() for table in want).backward()
    for (name, p), q in zip(parts.named_parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_one_product_for_all_that_read_the_transformed_embedding():
    with Products() as products:
        _run(_parts())
    assert sorted(products.seen) == sorted(
        [
            ("addmm", T, 2 * D),  # alignment, from z
            ("addmm", T, C),  # z'
            ("addmm", T, 4 + 10),  # every generator that reads z'
            ("baddbmm", T, C),  # emb_transf of all bottlenecks
            ("baddbmm", T, 2 * D),  # and their generators
        ]
    )


@pytest.mark.parametrize("preset", ["ca-mtl-base", "ca-mtl-large"])
def test_a_whole_forward_has_exactly_one_such_product(preset):
    tasks = [{"name": f"t{k}", "num_labels": 2} for k in range(T)]
    config = CaMtlConfig(
        vocab_size=20,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=36,
        max_position_embeddings=16,
        max_seq_length=12,
        preset=preset,
        tasks=tasks,
    )
    model = CaMtlForMultiTask(config).train()
    with Products() as products:
        model(torch.ones(3, 5, dtype=torch.int64), task_ids=torch.tensor([0, 5, 2]))
    generated = sum(g.out_features for g in model.bert.encoder.generators().values())
    tables = sorted(columns for name, rows, columns in products.seen if rows == T and name in ("mm", "addmm"))
    assert tables == sorted([24, 48, generated])
    assert sum(1 for name, rows, _ in products.seen if rows == T and name == "baddbmm") == 2


def _cached(parts):
    """The tables now, and whether they are the ones kept from before."""
    before = parts["net"]._cache
    with torch.no_grad():
        tables = _run(parts)
    return tables, before is not None and before[2] is tables


def test_tables_are_kept_in_eval_and_recomputed_when_anything_changes():
    parts = _parts()
    assert not _cached(parts)[1]
    with Products() as products:
        assert _cached(parts)[1]
    assert products.seen == []

    def grow():
        parts["embedding"].weight = nn.Parameter(torch.cat([parts["embedding"].weight, torch.ones(1, C)]))

    def write(parameter):
        with torch.no_grad():
            parameter.mul_(1.5)

    def replace_data():
        parts["a"].weight.data = parts["a"].weight.data.clone() + 1

    def sgd_step():
        optimiser = torch.optim.AdamW(parts.parameters(), lr=0.1)
        for p in parts.parameters():
            p.grad = torch.ones_like(p)
        optimiser.step()
        optimiser.zero_grad()

    changes = {
        "in place": lambda: write(parts["b"].bias),
        "embedding": lambda: write(parts["embedding"].weight),
        "transformation": lambda: write(parts["transformation"].weight),
        "alignment": lambda: write(parts["alignment"].bias),
        "bottleneck": lambda: write(parts["bottlenecks"][2].emb_transf.bias),
        "bottleneck generator": lambda: write(parts["bottlenecks"][0].hidden_modulation.gb_weights.weight),
        "load_state_dict": lambda: parts.load_state_dict(_parts(3).state_dict()),
        "new data": replace_data,
        "optimizer": sgd_step,
        "training and back": lambda: parts.train().eval(),
        "to": parts.double,
        "a new task": grow,
    }
    for what, change in changes.items():
        assert _cached(parts)[1], what
        change()
        tables, kept = _cached(parts)
        assert not kept, what
        fresh = copy.deepcopy(parts)
        fresh["net"].clear_cache()
        with torch.no_grad():
            for name, table in _run(fresh).items():
                assert torch.equal(table, tables[name]), (what, name)


def test_nothing_is_kept_while_gradients_flow():
    parts = _parts()
    _run(parts)
    assert parts["net"]._cache is None
    parts.train()
    with torch.no_grad():
        _run(parts)
    assert parts["net"]._cache is None
    assert _run(parts)["a"].requires_grad


def test_tables_kept_in_inference_mode_may_meet_autograd_later():
    parts = _parts()
    with torch.inference_mode():
        first = _run(parts)
        assert _run(parts) is first
    tables, kept = _cached(parts)
    assert kept
    x = torch.ones(T, 4, requires_grad=True)
    (x * tables["a"]).sum().backward()
    assert torch.equal(x.grad, tables["a"])


def test_leaving_training_mode_again_keeps_the_tables():
    parts = _parts()
    _cached(parts)
    parts.eval()
    assert _cached(parts)[1]
    parts["net"].train()
    assert parts["net"]._cache is None


def test_tables_on_the_meta_device():
    parts = _parts().to("meta")
    with torch.no_grad():
        assert _run(parts)["a"].shape == (T, 4)


def test_unchanged_parameters_under_data_writes_need_clear_cache():
    parts = _parts()
    _cached(parts)
    parts["a"].weight.data.add_(1)  # not counted by PyTorch: documented
    parts["net"].clear_cache()
    assert not _cached(parts)[1]


def test_autocast_does_not_reach_the_tables():
    parts = _parts()
    with torch.no_grad():
        want = _run(parts)
        with torch.autocast("cpu", torch.bfloat16):
            got = _run(parts)
    assert all(torch.equal(got[name], table) for name, table in want.items())
    assert {table.dtype for table in got.values()} == {torch.float32}


def test_copies_do_not_share_kept_tables():
    parts = _parts()
    _cached(parts)
    assert copy.deepcopy(parts)["net"]._cache is None
    assert pickle.loads(pickle.dumps(parts))["net"]._cache is None
    assert list(parts["net"].state_dict()) == []


def test_without_anything_to_make():
    net = HyperNetwork()
    assert net(torch.zeros(2, 3), {}) == {}
    tables = net(torch.ones(2, C), {"a": FiLMLinear(C, 4)})
    assert tables["a"].shape == (2, 4)
