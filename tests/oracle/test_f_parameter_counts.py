"""Group F: parameter counts of BERT-base and BERT-large sizes, built without memory on the meta device."""

from __future__ import annotations

import re

import pytest
import torch

from camtl.models import CaMtlConfig, CaMtlForMultiTask
from camtl.models.reference_format import VARIANTS, reference_name, split_heads

GROUP = "F_parameter_counts"
SIZES = {
    "base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}


def _model(size: str, variant: str, shape: tuple[int, int, int, int], **switches) -> CaMtlForMultiTask:
    vocab, length, tasks, outputs = shape
    counts = [1] * (tasks - 1) + [outputs - tasks + 1]
    config = CaMtlConfig(
        **SIZES[size],
        **{**VARIANTS[variant], **switches},
        vocab_size=vocab,
        max_seq_length=length,
        tasks=[{"name": f"t{k}", "num_labels": count} for k, count in enumerate(counts)],
    )
    with torch.device("meta"):
        return CaMtlForMultiTask(config)


def _reference_sizes(model, variant) -> dict[str, int]:
    depth = model.config.num_hidden_layers
    found = {
        reference_name(n, num_hidden_layers=depth, variant=variant): p.numel()
        for n, p in model.named_parameters()
        if not n.startswith("heads.")
    }
    heads = split_heads(model.heads.weight, model.heads.bias, model.heads.sizes)
    return {**found, **{n: t.numel() for n, t in heads.items()}}


def _check(label: str, want: dict) -> None:
    size = label.split(",", maxsplit=1)[0]
    vocab = int(re.search(r"vocab (\d+)", label)[1])
    tasks = int(re.search(r"(\d+) tasks", label)[1])
    length = int(re.search(r"L=(\d+)", label)[1])
    hidden = SIZES[size]["hidden_size"]
    outputs = want["groups"]["decoders"] // (hidden + 1)
    arguments = (vocab, length, tasks, outputs)
    model = _model(size, size, arguments)
    frozen = _model(size, size, arguments, freeze=want["freeze"])
    plain = _model(size, "bert", arguments)
    counts, plain_counts, trained = (
        model.parameter_counts(),
        plain.parameter_counts(),
        frozen.parameter_counts(),
    )
    assert counts["total"] == want["total"] == counts["trainable"]
    assert counts["encoder"] == want["encoder_only"]
    assert plain_counts["encoder"] == want["plain_bert_encoder"]
    assert plain_counts["total"] == want["plain_bert_multitask"]
    assert plain_counts["conditional"] == 0
    assert counts["conditional"] == counts["encoder"] - plain_counts["encoder"]
    assert counts["groups"] == want["groups"]
    assert trained["trainable"] == want["trainable_after_freeze"]
    assert trained["trainable_groups"] == want["trainable_groups"]
    plain_names = _reference_sizes(plain, "bert").keys() - {
        n for n in _reference_sizes(plain, "bert") if "decoders" in n
    }
    new = sum(n for name, n in _reference_sizes(model, size).items() if name not in plain_names)
    assert new == want["names_not_in_plain_bert"]
    inside = {
        re.sub(r"\.\d+\.", ".N.", name)
        for name, p in frozen.named_parameters()
        if p.requires_grad
        and (m := re.search(r"encoder\.layer\.(\d+)\.", name))
        and int(m[1]) in frozen.config.frozen_layers
    }
    assert sorted(inside) == sorted(want["trainable_inside_frozen_layers"])
    ratios = {
        "ratio_total_vs_plain_multitask": counts["total"] / plain_counts["total"],
        "ratio_encoder_vs_plain": counts["encoder"] / plain_counts["encoder"],
        "trainable_fraction": trained["trainable"] / counts["total"],
        "trainable_over_plain_bert": trained["trainable"] / plain_counts["encoder"],
        "trainable_per_task_over_plain_bert": trained["trainable"] / plain_counts["encoder"] / tasks,
        "total_over_num_tasks_x_plain": counts["total"] / plain_counts["encoder"] / tasks,
    }
    for name, value in ratios.items():
        assert value == pytest.approx(want[name], rel=1e-9), name
    assert trained["per_task"] == round(want["trainable_after_freeze"] / tasks)


def test_counts(case):
    assert case.manifest["counts"]
    for label, want in case.manifest["counts"].items():
        _check(label, want)
