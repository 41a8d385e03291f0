"""What a run counts: losses per task, rows seen and used, time. Sums stay on the device until logged."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


class TrainingMeter:
    """Counts of one run. Only what reads them waits for the device: interval, shares, totals, state.

    Args:
        tasks: task names in order.
        device: where the batches are.
        scores_candidates: whether rows are chosen by a scoring pass (adds the shares of data and of time).
    """

    def __init__(self, tasks: Sequence[str], device: torch.device, scores_candidates: bool) -> None:
        self.tasks = list(tasks)
        self.device = device
        self.scores_candidates = scores_candidates
        zeros = torch.zeros(len(tasks), device=device)
        self._loss, self._present = zeros.clone(), zeros.clone()
        self._rows, self._all_rows = zeros.long(), zeros.long()
        self._seen = 0
        self._scoring_seconds = 0.0
        self._training_seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._running_since: float | None = None

    # -- counting
    def rows(self, seen: int, task_ids: Tensor) -> None:
        """Count a batch: ``seen`` rows came from the loader, those of ``task_ids`` [B] are trained on."""
        self._seen += seen
        self._rows.scatter_add_(0, task_ids.long(), torch.ones_like(task_ids, dtype=torch.long))

    def losses(self, loss_per_task: Tensor, present: Tensor) -> None:
        """Add a batch's ``loss_per_task`` [T], 0 where ``present`` [T] says that the task has none."""
        self._loss += loss_per_task.detach().to(self._loss.dtype)
        self._present += present.to(self._present.dtype)

    # -- time
    def start(self) -> None:
        """Training begins."""
        self._running_since = time.perf_counter()

    def stop(self) -> None:
        """Training ends or pauses."""
        if self._running_since is not None:
            self._training_seconds += time.perf_counter() - self._running_since
            self._running_since = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (evaluation, saving) is no training time."""
        running = self._running_since is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Time a scoring pass: by events on a CUDA device, by the clock elsewhere."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            begun = time.perf_counter()
            yield
            self._scoring_seconds += time.perf_counter() - begun

    def _drain_events(self) -> None:
        for begin, end in self._events:
            end.synchronize()
            self._scoring_seconds += begin.elapsed_time(end) / 1000.0
        self._events.clear()

    # -- reading
    def interval(self, reduce: Reduce) -> dict[str, float]:
        """Figures since the last call, over all ranks.

        ``loss_<task>``: mean over the steps that had labels of the task; with scoring also
        ``train_share_<task>``: its share of the rows trained on.
        """
        loss, present, rows = (
            reduce(self._loss).tolist(),
            reduce(self._present).tolist(),
            reduce(self._rows).tolist(),
        )
        self._drain_events()
        self._all_rows += self._rows
        for counter in (self._loss, self._present, self._rows):
            counter.zero_()
        logs = {
            f"loss_{task}": total / count
            for task, total, count in zip(self.tasks, loss, present, strict=True)
            if count > 0
        }
        if self.scores_candidates and sum(rows):
            logs |= {f"train_share_{task}": n / sum(rows) for task, n in zip(self.tasks, rows, strict=True)}
        return logs

    def shares(self, reduce: Reduce) -> dict[str, float]:
        """Share of each task in all rows trained on so far, over all ranks; empty before the first step."""
        rows = reduce(self._all_rows + self._rows).tolist()
        total = sum(rows)
        return {task: n / total for task, n in zip(self.tasks, rows, strict=True)} if total else {}

    def totals(self, reduce: Reduce) -> dict[str, float]:
        """Figures of the whole run (also of what came before a resume).

        ``train_share_<task>``; with scoring also ``train_data_share`` (rows trained on over rows taken from
        the loader) and ``train_scoring_time_share`` (of the training time, evaluation and saving left out).
        """
        logs = {f"train_share_{task}": share for task, share in self.shares(reduce).items()}
        if self.scores_candidates:
            self._drain_events()
            used = int(reduce(self._all_rows + self._rows).sum())
            seen = int(reduce(torch.tensor([self._seen], device=self.device)))
            with self.paused():
                seconds = self._training_seconds
            logs["train_data_share"] = used / max(seen, 1)
            logs["train_scoring_time_share"] = self._scoring_seconds / max(seconds, 1e-9)
        return logs

    # -- resume
    def state(self, reduce: Reduce) -> dict[str, Any]:
        """All counts over all ranks, as plain numbers for JSON. float32 sums survive exactly."""
        self._drain_events()
        with self.paused():
            return {
                "loss": reduce(self._loss).tolist(),
                "present": reduce(self._present).tolist(),
                "rows": reduce(self._rows).tolist(),
                "all_rows": reduce(self._all_rows).tolist(),
                "seen": int(reduce(torch.tensor([self._seen], device=self.device))),
                "scoring_seconds": self._scoring_seconds,
                "training_seconds": self._training_seconds,
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the counts of :meth:`state`: sums over ranks, so one rank alone restores them."""
        for target, key in (
            (self._loss, "loss"),
            (self._present, "present"),
            (self._rows, "rows"),
            (self._all_rows, "all_rows"),
        ):
            values = [math.nan if value is None else value for value in state[key]]  # of a diverged run
            target.copy_(torch.tensor(values, dtype=target.dtype))
        self._seen = int(state["seen"])
        self._scoring_seconds = float(state["scoring_seconds"])
        self._training_seconds = float(state["training_seconds"])
