"""The emulation itself: warps, barriers and shared memory behave as CUDA's, and mistakes show."""

from __future__ import annotations

import pytest
import torch

from .emulation import module_of


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    return module_of(tmp_path_factory)


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def probes(module, request):
    module.set_reversed(request.param)
    yield module.probes
    module.set_reversed(False)


def test_exchanges_between_lanes(probes):
    out = torch.full((64, 7), -1, dtype=torch.int32)
    probes.shuffle(out.data_ptr(), 7, 64)
    for thread, row in enumerate(out.tolist()):
        lane, warp = thread % 32, thread // 32 * 32
        assert row[0] == warp + (lane ^ 5)
        assert row[1] == (thread + 3 if lane < 29 else thread)
        assert row[2] == (thread - 2 if lane % 8 >= 2 else thread)
        assert row[3] == warp + lane // 16 * 16 + 9
        assert row[4] % 2**32 == sum(1 << i for i in range(0, 32, 3))
        assert row[5] == warp + (lane ^ 1 if lane < 16 else lane ^ 9)
        assert row[6] == (lane >= 16)


@pytest.mark.parametrize("threads", [32, 96, 256])
def test_barriers_of_a_block_and_of_some_warps(probes, threads):
    out = torch.full((3,), torch.nan)
    probes.chain(out.data_ptr(), 3, threads)
    whole = threads * (threads - 1) / 2
    assert out.tolist() == [whole + 1000 * block * threads for block in range(3)]


def test_the_order_of_threads_shows(module):
    found = []
    for reverse in (False, True):
        module.set_reversed(reverse)
        out = torch.zeros(64)
        module.probes.wrong(out.data_ptr(), 0)
        found.append(out)
    module.set_reversed(False)
    assert not torch.equal(*found)


def test_shared_memory_begins_as_nan(probes):
    out = torch.zeros(64)
    probes.wrong(out.data_ptr(), 1)
    assert out[0].isnan()
    assert (out[1:] == 1).all()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (2, r"wrong \(cuda\): a barrier that not all threads reach"),
        (3, r"wrong \(cuda\): .*alignof.* \(block 0, 0, thread"),
        (4, r"wrong \(cuda\): a barrier that not all threads reach"),
    ],
)
def test_mistakes_end_the_launch_and_nothing_else(probes, what, message):
    out = torch.zeros(64)
    with pytest.raises(RuntimeError, match=message):
        probes.wrong(out.data_ptr(), what)
    out.zero_()
    probes.wrong(out.data_ptr(), 5)
    assert out[:40].tolist() == [1.0] * 40
    assert out[40:].tolist() == [0.0] * 24


def test_more_shared_memory_must_be_asked_for(module):
    with pytest.raises(RuntimeError, match="invalid argument"):
        module.probes.shared_memory(0, 40 * 1024 + 16)
    with pytest.raises(RuntimeError, match="invalid argument"):
        module.probes.shared_memory(100 * 1024, 128)
    module.probes.shared_memory(64 * 1024, 48 * 1024 + 16)


@pytest.mark.parametrize(
    ("dtype", "code", "K"), [(torch.bfloat16, 2, 16), (torch.float16, 3, 16), (None, 0, 8)]
)
def test_fragments_of_tensor_cores(probes, dtype, code, K):
    """Lanes hold what the PTX manual says: the product of tiles comes out, in tf32 without 13 bits."""
    a, b, c = torch.randn(16, K), torch.randn(K, 8), torch.full((16, 8), torch.nan)
    if dtype is None:
        low = [x.clone() for x in (a, b)]
        for x in low:
            x.view(torch.int32).bitwise_and_(-(2**13))
        assert not torch.equal(low[0], a)
    else:
        a, b = a.to(dtype), b.to(dtype)
        low = [a.float(), b.float()]
    probes.product(a.data_ptr(), b.data_ptr(), c.data_ptr(), code)
    torch.testing.assert_close(c, low[0] @ low[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_tensor_cores_round_towards_zero(probes, sign):
    """Next to 1, three terms of 1.75 * 2^-24 lose two bits each, and their sum what float32 does not hold."""
    a, b, c = torch.zeros(16, 8), torch.ones(8, 8), torch.full((16, 8), torch.nan)
    a[:, 0] = sign
    a[:, 1:4] = sign * 1.75 * 2**-24
    probes.product(a.data_ptr(), b.data_ptr(), c.data_ptr(), 0)
    assert (c == sign * (1 + 2**-23)).all()
    assert (a.double().sum(1).float() == sign * (1 + 3 * 2**-23)).all()  # 2.625: up
