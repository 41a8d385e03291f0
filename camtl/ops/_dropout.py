"""Counter-based dropout: the same mask from every backend, from a seed that is a tensor.

The generator is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). One
call of it turns a 128-bit counter and a 64-bit key into four 32-bit words, and so serves four neighbouring
elements.

The contract, with ``dropout_seed = (seed, offset)``, both int64:

* element ``e`` (its row-major index in the op's logical tensor, see each op) takes word ``e % 4`` of call ``e
  // 4``;
* the key is the seed: word 0 its low, word 1 its high 32 bits (two's complement);
* the counter is ``e // 4 + offset`` as an unsigned 64-bit number, modulo 2**64: counter word 0 holds its low
  and word 1 its high 32 bits, words 2 and 3 are zero. Below 2**32 that is word 0 alone;
* a word becomes ``u = (word >> 8) * 2**-24`` in [0, 1), exact in float32;
* the element is kept if ``u >= p``, which is the integer test ``(word >> 8) >= ceil(p * 2**24)``, and then
  scaled by ``1 / (1 - p)``.

Everything here is integer arithmetic on int64 tensors: it runs on any device, and under compile and CUDA
graphs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def draw_seed(device: torch.device) -> Tensor:
    """A fresh ``dropout_seed``, int64 ``[2]`` on ``device``, from torch's own generator (no host sync)."""
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


def philox_4x32_10(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox on four counter words under two key words.

    All words are int64 tensors with values in [0, 2**32): those of the counter have one shape, which the four
    results have too, and those of the key broadcast to it. A product of two words needs 64 bits: int64 wraps,
    its bit pattern is still right, and only masked halves are used.
    """
    a, previous_1, b, previous_0 = counter
    key_0, key_1 = key
    for _ in range(_ROUNDS):
        product_0 = a * _MULTIPLIER_0
        product_1 = b * _MULTIPLIER_1
        # previous_* carry a whole product, of which the low word counts: the mask drops the rest.
        a = (product_1 >> 32).bitwise_xor_(previous_1).bitwise_xor_(key_0).bitwise_and_(_WORD)
        b = (product_0 >> 32).bitwise_xor_(previous_0).bitwise_xor_(key_1).bitwise_and_(_WORD)
        previous_0, previous_1 = product_0, product_1
        key_0 = (key_0 + _WEYL_0) & _WORD
        key_1 = (key_1 + _WEYL_1) & _WORD
    return a, previous_1 & _WORD, b, previous_0 & _WORD


def dropout_mask(seed: Tensor, shape: int | Sequence[int], p: float) -> Tensor:
    """Which elements dropout keeps: bool of ``shape`` (an int is one dimension) on the seed's device.

    ``seed`` is int64 ``[2]`` = (seed, offset). Elements are numbered in row-major order of ``shape``.
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    numel = math.prod(sizes)
    call = torch.arange((numel + 3) // 4, dtype=torch.int64, device=seed.device) + seed[1]
    zero = torch.zeros_like(call)
    words = philox_4x32_10(
        (call & _WORD, (call >> 32) & _WORD, zero, zero), (seed[0] & _WORD, (seed[0] >> 32) & _WORD)
    )
    threshold = math.ceil(p * 2**24) << 8
    return torch.stack([word >= threshold for word in words], dim=-1).flatten()[:numel].view(sizes)


def dropout(x: Tensor, p: float, seed: Tensor | None, shape: Sequence[int] | None = None) -> Tensor:
    """Dropout of ``x`` with probability ``p`` by the contract above; ``p = 0`` returns ``x`` itself.

    ``seed`` None draws one. ``shape`` is the logical shape whose row-major order numbers the elements
    (default: x's).
    """
    if p == 0.0:
        return x
    keep = dropout_mask(draw_seed(x.device) if seed is None else seed, x.shape if shape is None else shape, p)
    return torch.where(keep.view(x.shape), x * (1.0 / (1.0 - p)), 0.0)
