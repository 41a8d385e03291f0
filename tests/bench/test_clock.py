"""Clocks: turns on a CPU, quantiles, what an exception means, the deadline; on a GPU events and graphs."""

from __future__ import annotations

import math
import time

import pytest
import torch

from camtl.bench.clock import CpuClock, CudaClock, Deadline, clock_for, outcome, quantiles


def test_quantiles_are_in_milliseconds():
    found = quantiles([0.005, 0.001, 0.002, 0.003, 0.004])
    assert found == {
        "p20": pytest.approx(2), "p50": pytest.approx(3), "p80": pytest.approx(4), "count": 5
    }  # fmt: skip
    assert quantiles([2e-6], scale=1e6) == {"p20": 2.0, "p50": 2.0, "p80": 2.0, "count": 1}


def test_contenders_take_turns_and_the_order_is_reversed():
    order = []
    steps = {name: (lambda name=name: (order.append(name), time.sleep(0.003))) for name in "abc"}
    times, gone = CpuClock().in_turns(steps, 0.0, least=4)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc" + "cba"  # the first looks how long calls take
    assert gone == {}
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(t >= 0.003 for found in times.values() for t in found)


def test_short_calls_are_repeated():
    asked = []

    class Known(CpuClock):
        def seconds(self, step, repeats=1):
            asked.append(repeats)
            return 1e-5

    times, _ = Known().in_turns({"a": lambda: None}, 0.0, least=2)
    assert asked == [1, 200, 200]
    assert times == {"a": [1e-5, 1e-5]}


def test_slow_contenders_have_fewer_rounds():
    class Slow(CpuClock):
        def seconds(self, step, repeats=1):
            return 1.5

    times, _ = Slow().in_turns({"a": lambda: None, "b": lambda: None}, 0.0, least=5)
    assert len(times["a"]) == 3


def test_rounds_end_with_the_budget_or_at_most():
    times, _ = CpuClock().in_turns({"a": lambda: time.sleep(0.002)}, 0.05, least=1, most=1000)
    assert 1 <= len(times["a"]) <= 30
    times, _ = CpuClock().in_turns({"a": lambda: time.sleep(0.002)}, 10.0, least=1, most=7)
    assert len(times["a"]) == 7


def test_the_deadline_leaves_one_round():
    times, gone = CpuClock().in_turns({"a": lambda: None, "b": lambda: None}, 1.0, deadline=Deadline(0.0))
    assert {name: len(t) for name, t in times.items()} == {"a": 1, "b": 1}
    assert gone == {}


@pytest.mark.parametrize("after", [0, 1, 3])
def test_who_fails_leaves_and_the_others_go_on(after):
    calls = 0

    def fails():
        nonlocal calls
        calls += 1
        time.sleep(0.003)
        if calls > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    times, gone = CpuClock().in_turns({"a": lambda: time.sleep(0.003), "b": fails}, 0.0, least=4)
    assert len(times["a"]) == 4
    assert "b" not in times
    assert gone == {"b": ("out of memory", "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB")}


def test_ctrl_c_ends_the_turns():
    def pressed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CpuClock().in_turns({"a": pressed}, 0.0)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("no kernel"), "failed"),
        (TimeoutError("no time left"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_what_an_exception_means(error, status):
    found, why = outcome(error)
    assert found == status
    assert why
    assert "\n" not in why


def test_a_reason_is_one_short_line():
    assert outcome(ValueError("a\n  b\n" + 1000 * "c"))[1].startswith("ValueError: a b ccc")
    assert len(outcome(ValueError(1000 * "c"))[1]) == 300


def test_deadline():
    Deadline().check()
    assert Deadline().left == math.inf
    assert 9 < Deadline(10.0).left <= 10
    with pytest.raises(TimeoutError, match="no time left"):
        Deadline(0.0).check()


def test_ceilings_of_a_cpu():
    found = clock_for("cpu").ceilings(smoke=True)
    assert found.keys() == {"copy_bytes_per_s", "matmul_flops_per_s_float32", "matmul_flops_per_s_bfloat16"}
    assert all(value > 0 for value in found.values())


def test_copies_of_inputs_fill_the_cache_several_times():
    clock = CudaClock.__new__(CudaClock)  # its arithmetic needs no GPU
    clock.cache = 1000
    inputs = [torch.randn(100, requires_grad=True), torch.arange(5)]
    sets = clock.rotated(inputs)
    assert len(sets) == math.ceil(3 * 1000 / 440)
    assert sets[0] is inputs
    assert all(torch.equal(a, b) for x in sets for a, b in zip(x, inputs, strict=True))
    assert all(x[0].requires_grad and x[0].is_leaf and not x[1].requires_grad for x in sets)
    assert len({x[0].data_ptr() for x in sets}) == len(sets)
    assert len(clock.rotated([torch.zeros(10**5)])) == 2
    assert len(clock.rotated([torch.zeros(1)])) == 16
    batch = {"input_ids": torch.zeros(2)}
    assert clock.rotated(batch) == [batch]


@pytest.mark.gpu
class TestGpu:
    """With events and graphs of a real GPU."""

    def steps(self, clock):
        sets = clock.rotated([torch.randn(512, 512, device="cuda") for _ in range(2)])
        return [lambda x=x: x[0] @ x[1] for x in sets]

    def test_all_numbers_of_a_contender(self):
        clock = CudaClock()
        found = clock.measured(self.steps(clock), 0.01, grad=False)
        assert found["why"] == ""
        assert 0 < found["graph_ms"]["p50"] < 1
        assert found["ms"]["count"] >= 20
        assert found["cold_ms"] > 0
        assert found["peak_bytes"] == 512 * 512 * 4
        assert found["host_us"] > 0
        assert found["host_no_grad_us"] > 0

    def test_who_waits_for_the_gpu_gets_no_graph(self):
        clock = CudaClock()
        x = torch.ones(8, device="cuda")
        found = clock.measured([lambda: x.sum().item()], 0.01)
        assert "no graph" in found["why"]
        assert found["ms"]["p50"] > 0
        assert clock.measured([lambda: x + 1], 0.01)["graph_ms"]  # what failed leaves nothing behind

    def test_ceilings(self):
        found = CudaClock().ceilings()
        assert found["copy_bytes_per_s"] > 1e11
        assert found["matmul_flops_per_s_bfloat16"] > found["matmul_flops_per_s_float32"]
