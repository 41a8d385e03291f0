"""Callbacks: progress with per-task losses, early stopping, the run's own hooks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback

if TYPE_CHECKING:
    from camtl.training.trainer import CaMtlTrainer

_LOSS = "loss_"


def describe_logs(logs: Mapping[str, Any], step: int, max_steps: int) -> str:
    """One line for a logged dict: training losses, scores of an evaluation, or the summary at the end."""
    head = f"step {step}/{max_steps}" if max_steps > 0 else f"step {step}"
    if "train_runtime" in logs:
        seconds = logs["train_runtime"]
        return f"{head}  trained in {seconds:.0f} s  loss {_number(logs.get('train_loss'))}"
    if "eval_average" in logs:
        scores = "  ".join(f"{name} {_number(value)}" for name, value in task_scores(logs).items())
        average, loss = _number(logs["eval_average"]), _number(logs.get("eval_loss"))
        return f"{head}  average {average}  eval loss {loss}  {scores}"
    if "loss" not in logs:
        rest = "  ".join(f"{key} {_number(value)}" for key, value in logs.items() if key != "epoch")
        return f"{head}  {rest}"
    line = f"{head}  loss {_number(logs['loss'])}"
    losses = task_losses(logs)
    if losses:
        line += f" ({', '.join(f'{task} {_number(value)}' for task, value in losses.items())})"
    if "learning_rate" in logs:
        line += f"  lr {logs['learning_rate']:.2g}"
    return line


def task_losses(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return ``{task: loss}`` of one logged dict (the keys ``loss_<task>``)."""
    return {key.removeprefix(_LOSS): value for key, value in logs.items() if key.startswith(_LOSS)}


def task_scores(logs: Mapping[str, Any], prefix: str = "eval") -> dict[str, float]:
    """Return ``{"<task>_<metric>": value}`` of one evaluation: all but losses, averages and timings."""
    start = f"{prefix}_"
    other = ("_loss", "_runtime", "_per_second", "_preparation_time")
    summary = (f"{prefix}_average", f"{prefix}_task_sigma", f"{prefix}_loss")
    return {
        key.removeprefix(start): value
        for key, value in logs.items()
        if key.startswith(start) and key not in summary and not key.endswith(other)
    }


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class TaskProgressCallback(ProgressCallback):
    """Hugging Face's progress bar with every task's loss beside it; plain lines where no terminal is.

    Args:
        bars: draw bars. None: where both stdout and stderr are terminals.
    """

    def __init__(self, bars: bool | None = None) -> None:
        super().__init__()
        self.bars = sys.stdout.isatty() and sys.stderr.isatty() if bars is None else bars

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar at the step training starts from."""
        self.current_step = state.global_step
        if self.bars:
            super().on_train_begin(args, state, control, **kwargs)
            self.current_step = 0
            if state.global_step and self.training_bar is not None:
                self.training_bar.update(state.global_step)
                self.current_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Move the bar of an evaluation."""
        if self.bars:
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Losses go beside the bar; scores and, without a bar, losses become lines of their own."""
        if not state.is_world_process_zero or not logs:
            return
        if self.training_bar is None:
            print(describe_logs(logs, state.global_step, state.max_steps), flush=True)
        elif "loss" in logs:
            losses = "  ".join(f"{task} {_number(value)}" for task, value in task_losses(logs).items())
            self.training_bar.set_postfix_str(f"loss {_number(logs['loss'])}  {losses}".rstrip())
        else:
            self.training_bar.write(describe_logs(logs, state.global_step, state.max_steps))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close whatever bar is open (also after an interrupt, so that the next line starts clean)."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
        self.prediction_bar = self.training_bar = None


class EarlyStopping(EarlyStoppingCallback):
    """Early stopping whose count of evaluations without progress survives a resume."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the count from a resumed state; a fresh run starts at 0."""
        self.early_stopping_patience_counter = saved_patience(state)


def saved_patience(state: Any) -> int:
    """Evaluations without progress recorded in a trainer state; 0 if it has none."""
    saved = (state.stateful_callbacks or {}).get(EarlyStopping.__name__) or {}
    if isinstance(saved, list):
        saved = saved[-1]
    return int(saved.get("attributes", {}).get("early_stopping_patience_counter", 0))


class RunCallback(TrainerCallback):
    """Calls the trainer where a run begins and ends, and tells the sampler which epoch begins.

    accelerate and the Trainer pass ``set_epoch`` on only through some of their wrappers (sharded and resumed
    loaders hide the sampler), so the epoch is counted here from the global step.
    """

    def __init__(self, trainer: CaMtlTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up a checkpoint's counts and start the clock."""
        self._trainer.restore_counters()
        self._trainer.meter.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self._trainer.meter.stop()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch before the loader's iterator is made."""
        self._trainer.begin_epoch()
