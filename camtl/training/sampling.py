"""The run's sampler, and the losses it may want to see."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from camtl.data import MultiTaskBatchSampler, MultiTaskDataset, get_sampler, make_sampler
from camtl.data.batching import LengthAwareBatches
from camtl.data.samplers import CHUNK
from camtl.errors import UsageError
from camtl.training.arguments import UNCERTAINTY_ONLY, CaMtlTrainingArguments, field_default

_FLUSH_EVERY = 8


def sampler_name(sampler: str | type | Callable[..., Any]) -> str:
    """What a sampler is called in a checkpoint: its name, or that of its class or function."""
    return sampler if isinstance(sampler, str) else str(getattr(sampler, "__name__", type(sampler).__name__))


def build_sampler(
    sampler: str | type | Callable[..., Any],
    dataset: MultiTaskDataset,
    batch_size: int,
    seed: int,
    args: CaMtlTrainingArguments,
    packed: bool = False,
) -> MultiTaskBatchSampler | LengthAwareBatches:
    """The sampler of a run over a data set, in batches that suit the rows' lengths where ``args`` say so.

    ``packed`` says what the batches will be. Bad options raise :class:`UsageError`.
    """
    options: dict[str, Any] = dict(args.sampler_options or {})  # type: ignore[arg-type]
    make: Any = get_sampler(sampler)
    if getattr(make, "selects", False):
        options.setdefault("candidates_per_task", args.candidates_per_task)
    else:
        given = [name for name in UNCERTAINTY_ONLY if getattr(args, name) != field_default(name)]
        if given:
            raise UsageError(
                f"{', '.join(given)}: only for the sampler uncertainty, not for {sampler_name(sampler)}; "
                f"leave {'it' if len(given) == 1 else 'them'} out, or give sampler uncertainty"
            )
    try:
        built = make_sampler(
            sampler,
            dataset.sizes,
            batch_size,
            seed,
            epoch=args.epoch_mode,
            percent_of_max_data_size=args.percent_of_max_data_size,
            uniform_mt_sampling=args.uniform_mt_sampling,
            **options,
        )
    except TypeError as error:
        raise UsageError(f"sampler {sampler_name(sampler)}: {error}") from error
    batches: MultiTaskBatchSampler | LengthAwareBatches = built
    if args.max_tokens_per_batch is not None or args.groups_by_length:
        batches = LengthAwareBatches(
            built,
            dataset.lengths,
            packed=packed,
            grouped=args.groups_by_length,
            max_tokens=args.max_tokens_per_batch,
        )
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        epochs = args.max_steps * args.gradient_accumulation_steps * args.world_size / len(batches)
    built.num_epochs = max(1, math.ceil(epochs))
    return batches


class LossObserver:
    """Brings the per-task losses of every rank's batches to a sampler that adapts to them, in stream order.

    Losses stay on the device until a few batches have come together (on the CPU, where a look costs nothing,
    until the next batch). The sampler lets a loader run ``CHUNK`` batches ahead of the losses it has seen;
    what is fetched ahead and what waits here must fit into that, or the stream would depend on timing.

    Args:
        sampler: has ``observe(step, losses)``, ``step`` counting the global batches of the epoch.
        task_ids: the model's ids of the sampler's tasks.
    """

    def __init__(
        self, sampler: Any, args: CaMtlTrainingArguments, accelerator: Any, task_ids: Sequence[int]
    ) -> None:
        self._sampler = sampler
        self._accelerator = accelerator
        self._task_ids = list(task_ids)
        self._ranks = args.world_size
        prefetched = args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2)
        ahead = self._ranks * (args.gradient_accumulation_steps + prefetched + 2)
        room = (CHUNK - ahead) // self._ranks
        if room < 1:
            raise UsageError(
                f"the sampler loss can follow the losses at a distance of {CHUNK} batches, but {ahead} are "
                "fetched ahead; lower gradient_accumulation_steps, dataloader_num_workers or "
                "dataloader_prefetch_factor"
            )
        self._wait = 1 if args.device.type == "cpu" else min(room, _FLUSH_EVERY)
        self._step = 0
        self._pending: list[Tensor] = []

    def begin(self, step: int) -> None:
        """The next loss is that of this rank's batch ``step`` of the epoch."""
        self._step = step

    def add(self, loss_per_task: Tensor) -> None:
        """Take the losses [T] of this rank's next batch."""
        self._pending.append(loss_per_task.detach().float())
        if len(self._pending) >= self._wait:
            self.flush()

    def flush(self) -> None:
        """Hand all waiting losses over. Every rank calls this at the same point."""
        if not self._pending:
            return
        losses = torch.stack(self._pending)
        self._pending.clear()
        if self._ranks > 1:
            losses = self._accelerator.gather(losses.unsqueeze(0))  # [ranks, steps, T]
            losses = losses.transpose(0, 1).reshape(-1, losses.shape[-1])
        base = self._step * self._ranks
        for offset, row in enumerate(losses.tolist()):
            self._sampler.observe(base + offset, [row[task] for task in self._task_ids])
        self._step += len(losses) // self._ranks
