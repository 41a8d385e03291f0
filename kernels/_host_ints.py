"""Small host integers in a kernel: entries of the words that ``camtl._tensors.pack`` makes.

A kernel takes them as ``w0 .. w7: tl.int64`` and ``bits``, all in its ``do_not_specialize``: other numbers
do not compile anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a kernel with packed integers must not specialise on.
PACKED = ["w0", "w1", "w2", "w3", "w4", "w5", "w6", "w7", "bits"]


@triton.jit
def entry(i, w0, w1, w2, w3, w4, w5, w6, w7, bits):
    """Entry ``i`` (int32, any shape) as int64."""
    per_word = 63 // bits
    word = i // per_word
    low = tl.where(word < 2, tl.where(word < 1, w0, w1), tl.where(word < 3, w2, w3)).to(tl.int64)
    high = tl.where(word < 6, tl.where(word < 5, w4, w5), tl.where(word < 7, w6, w7)).to(tl.int64)
    shift = ((i - word * per_word) * bits).to(tl.int64)
    limit = (shift * 0 + 1) << bits.to(tl.int64)
    return (tl.where(word < 4, low, high) >> shift) & (limit - 1)
