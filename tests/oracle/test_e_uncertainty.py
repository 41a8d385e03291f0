"""Group E: entropies, scores and selection of MT-Uncertainty, candidate order and epoch length."""

from __future__ import annotations

import math

import numpy as np
import torch

from camtl import ops
from camtl.data.samplers import SequentialTaskStreams, reference_epoch_batches

GROUP = "E_mt_uncertainty"


def _entropy(logits: torch.Tensor, sizes: list[int], ids: torch.Tensor) -> torch.Tensor:
    """Entropies through the op: heads whose rows are unit vectors return the given logits."""
    identity = torch.eye(logits.shape[1], dtype=logits.dtype)
    weight = torch.cat([identity[:size] for size in sizes])
    _, _, entropy = ops.multitask_loss(logits, weight, weight.new_zeros(len(weight)), sizes, ids)
    return entropy


def _check_entropies(case) -> None:
    for tag, dtype in case.precisions():
        names = [name[: -len(".entropy")] for name in case.under(f"{tag}.out.") if name.endswith(".entropy")]
        assert names
        for name in names:
            logits = case.under("in.", dtype)[f"{name}.logits"]
            ids = torch.zeros(len(logits), dtype=torch.int64)
            case.check(f"out.{name}.entropy", _entropy(logits, [logits.shape[1]], ids), tag)


def _borrow(tasks: list[str]) -> list[int] | None:
    if "sts-b" not in tasks or "mrpc" not in tasks:
        return None
    return [tasks.index("mrpc") if task == "sts-b" else -1 for task in tasks]


def _check_step(case, step: int, tag: str, dtype: torch.dtype) -> None:
    config, out = case.config, f"out.step{step}."
    tasks, k = config["tasks"], config["train_batch_size"]
    sizes, T = config["num_labels"], len(config["tasks"])
    candidates = case.tensors[f"{out}candidates"]
    ids = case.tensors[f"{out}candidate_task_id"]
    assert torch.equal(case.tensors["in.sample_task_id"][candidates], ids)
    entropy = _entropy(case.tensors["in.logits_table"].to(dtype)[candidates], sizes, ids)
    case.check(f"{out}entropy", entropy, tag)
    means = torch.stack([entropy[ids == t].mean() for t in ids.tolist()])
    case.check(f"{out}task_mean_entropy", means, tag)
    case.check(f"{out}max_mean_entropy", means.max(), tag)

    indices, scores = ops.select_uncertain(entropy, ids, k, T, score="reference", borrow=_borrow(tasks))
    case.check(f"{out}score", scores, tag)
    assert len(indices) == min(k, len(candidates)) == case.manifest[f"{tag}.select_size"][step]
    case.check(f"{out}selected_scores", scores[indices], tag)
    assert (scores[indices].diff() <= 0).all()
    recorded = case.tensors[f"{tag}.{out}selected_position"]
    rest = torch.ones(len(scores), dtype=torch.bool)
    rest[indices] = False
    if rest.any():
        assert scores[rest].max() <= scores[indices].min()
    if not case.manifest[f"{tag}.tie_at_boundary"][step]:
        assert set(indices.tolist()) == set(recorded.tolist())
        assert sorted(candidates[indices].tolist()) == sorted(
            case.tensors[f"{tag}.{out}selected_sample"].tolist()
        )
        assert sorted(ids[indices].tolist()) == sorted(case.tensors[f"{tag}.{out}selected_task_id"].tolist())
    best, _ = ops.select_uncertain(entropy, ids, k, T)  # the paper's score is the entropy itself
    torch.testing.assert_close(entropy[best], entropy.sort(descending=True).values[: len(best)])


def _check_stream(case) -> None:
    config = case.config
    sizes, batch = config["dataset_sizes"], config["train_batch_size"]
    streams = SequentialTaskStreams(sizes, batch, seed=None, short_batches=True)
    for step in range(config["steps"]):
        rows = np.concatenate(next(streams)).tolist()
        assert rows == case.tensors[f"out.step{step}.candidates"].tolist(), f"candidates of step {step}"
    lengths = [math.ceil(size / batch) for size in sizes]
    percent, uniform = config["percent_of_max_data_size"], config["uniform_mt_sampling"]
    assert reference_epoch_batches(lengths, batch, percent, uniform) == case.manifest["batches_per_epoch"]


def test_uncertainty(case):
    if "tasks" not in case.config:
        _check_entropies(case)
        return
    for tag, dtype in case.precisions():
        for step in range(case.config["steps"]):
            _check_step(case, step, tag, dtype)
    _check_stream(case)
