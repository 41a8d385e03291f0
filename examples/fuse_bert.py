"""Fuse a Hugging Face model and embed sentences of many lengths: python examples/fuse_bert.py [model]."""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import camtl
from camtl.bench.clock import CpuClock
from camtl.models.loading import resolve_encoder

SENTENCES = [
    "The train left on time.",
    "Nobody had told the new neighbours that the bridge would be closed for the whole of the summer.",
    "It rained.",
    "She keeps a list of every book she has lent, whom she lent it to, and whether it ever came back, and "
    "reads it aloud at dinner when the conversation slows down.",
    "Two of the three lamps in the corridor are broken again.",
    "Why?",
    "The report covers four years of measurements from eleven stations along the coast, most of which were "
    "taken by volunteers.",
    "A small dog slept under the table.",
] * 2


def main(name: str = "minilm", seconds: float = 4.0) -> float:
    folder = resolve_encoder(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModel.from_pretrained(folder).eval()
    fused = camtl.fuse(copy.deepcopy(plain), packed=True)  # packed: no work for padding
    print(camtl.fuse_report(fused))

    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)

    @torch.no_grad()
    def embed(model: torch.nn.Module) -> Tensor:
        hidden = model(**batch).last_hidden_state
        return (hidden * mask).sum(1) / mask.sum(1)  # mean over the real tokens

    difference = (embed(fused) - embed(plain)).abs().max()
    print(f"\n{len(SENTENCES)} sentences, {100 * mask.float().mean():.0f} % of the batch is real tokens")
    print(f"largest difference of an embedding: {difference:.1e}")
    assert difference < 1e-4

    times, _ = CpuClock().in_turns({"plain": lambda: embed(plain), "fused": lambda: embed(fused)}, seconds)
    ratio = statistics.median(p / f for p, f in zip(times["plain"], times["fused"], strict=True))
    print(f"time plain / time fused: {ratio:.2f}")

    camtl.unfuse(fused)
    print(f"unfused again: {torch.equal(embed(fused), embed(plain))}")
    return ratio


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="minilm", help="a model folder, a hub id, or minilm")
    main(parser.parse_args().model)
