"""The part of the trainer that writes and opens checkpoints and result files."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import SaveStrategy, TrainOutput
from transformers.utils import logging as transformers_logging

from camtl._io import read_json, write_json
from camtl._version import __version__
from camtl.models.configuration import SWITCHES
from camtl.models.packing import packs
from camtl.tasks import Task
from camtl.training import resume
from camtl.training.arguments import SELECTION_SETTINGS, CaMtlTrainingArguments
from camtl.training.callbacks import saved_patience
from camtl.training.meter import TrainingMeter
from camtl.training.sampling import LossObserver, sampler_name

_PICKLED_ARGUMENTS = "training_args.bin"
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_seq_length")


class CheckpointingTrainer(Trainer):
    """The Trainer with saving that leaves every file whole or absent, and with exact resuming.

    What a checkpoint holds and needs of a run is declared here; :class:`~camtl.training.CaMtlTrainer` sets
    it all.
    """

    args: CaMtlTrainingArguments
    model: Any
    train_dataset: Any
    tasks: dict[str, Task]
    train_tasks: list[str]
    train_fingerprints: dict[str, str]
    sampler: str | type | Callable[..., Any]
    train_sampler: Any
    meter: TrainingMeter
    _observer: LossObserver | None = None
    _resumed: dict[str, Any] | None = None

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(str(self.args.output_dir))

    @property
    def data_seed(self) -> int:
        """Seed of the order of the rows."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def updates_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        batches = math.ceil(len(self.train_sampler) / self.args.world_size)
        return math.ceil(batches / self.args.gradient_accumulation_steps)

    @property
    def _batches_by_length(self) -> bool:
        return self.args.max_tokens_per_batch is not None or self.args.groups_by_length

    def _sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        if self.args.world_size == 1:
            return value
        return self.accelerator.reduce(value.clone(), reduction="sum")

    # -- opening
    def _open_checkpoint(self, value: str | bool | None) -> str | None:
        """Resolve, check and read the checkpoint to go on from (the same on every rank); clear leftovers."""
        found: list[str | None] = [None]
        if self.args.process_index == 0:
            found[0] = resume.resolve_checkpoint(value, self.output_dir)
            resume.remove_leftovers(self.output_dir)
        if self.args.world_size > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(found)
        checkpoint = found[0]
        self._resumed = None
        if checkpoint is not None:
            self._resumed = resume.read_state(checkpoint)
            resume.check_agreement(checkpoint, self._resumed["run"], self.run_settings())
        return checkpoint

    def run_settings(self) -> dict[str, Any]:
        """Everything that decides what a step trains, and on which rows; a resumed run must have the same."""
        args, config = self.args, self.model.config
        return {
            "tasks": list(self.tasks),
            "train_rows": dict(zip(self.train_tasks, self.train_dataset.sizes, strict=True)),
            "train_data": self.train_fingerprints,
            "label_scale": {
                info["name"]: "raw"
                if info.get("label_mean") is None
                else f"mean {info['label_mean']:.6g} deviation {info['label_std']:.6g}"
                for info in config.task_info
                if info["loss"] == "mse"
            },
            "sampler": sampler_name(self.sampler),
            "sampler_options": args.sampler_options or {},
            **{name: getattr(args, name) for name in SELECTION_SETTINGS},
            "batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "world_size": args.world_size,
            "max_tokens_per_batch": args.max_tokens_per_batch,
            "grouped": args.groups_by_length,
            **({"packed": packs(self.model.config, args.device)} if self._batches_by_length else {}),
            "epoch": [args.epoch_mode, args.percent_of_max_data_size, args.uniform_mt_sampling],
            "seed": self.data_seed,
            **{name: getattr(config, name) for name in (*_SIZES, *SWITCHES)},
        }

    def restore_counters(self) -> None:
        """Take up what a checkpoint's ``camtl_state.json`` holds beside the model, when training begins."""
        if self._resumed is None:
            return
        self.train_sampler.load_state_dict(self._resumed["sampler_state"])
        if self.args.process_index == 0:
            self.meter.restore(self._resumed["meter"])
            # Losses since the last log: without them the first mean after a resume would cover fewer steps.
            # The mean over the whole call covers the steps after the resume only: it leaves them out again.
            unlogged = self._resumed["unlogged"]["loss"]
            unlogged = math.nan if unlogged is None else unlogged  # null: the run had diverged
            self._tr_loss += unlogged
            self._total_loss_scalar -= unlogged
        self._globalstep_last_logged = self._resumed["unlogged"]["since_step"]

    def _is_finished(self, checkpoint: str) -> bool:
        """Whether the run that wrote ``checkpoint`` was over: all steps done, or out of patience."""
        args = self.args
        state = TrainerState.load_from_json(os.path.join(checkpoint, resume.TRAINER_STATE_FILE))
        self.get_train_dataloader()
        steps = (
            args.max_steps
            if args.max_steps > 0
            else math.ceil(args.num_train_epochs * self.updates_per_epoch())
        )
        patience = args.early_stopping_patience
        return state.global_step >= steps or (patience is not None and saved_patience(state) >= patience)

    def _load_finished(self, checkpoint: str) -> TrainOutput:
        """Stand where :meth:`train` would have ended: weights (the best ones if asked for), state, counts."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, resume.TRAINER_STATE_FILE))
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.state.is_local_process_zero = self.is_local_process_zero()
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and os.path.isdir(best):
            self._load_best_model()
        metrics: dict[str, float] = {}
        if self._resumed is not None and self.args.process_index == 0:
            self.meter.restore(self._resumed["meter"])
        metrics.update(self.meter.totals(self._sum_over_ranks))
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        loss = losses[-1] if losses else math.nan
        metrics["train_loss"] = loss
        if self.state.epoch is not None:
            metrics["epoch"] = self.state.epoch
        return TrainOutput(self.state.global_step, loss, metrics)

    # -- saving
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Hugging Face's, but under a temporary name until all of ``checkpoint-N`` is on disk."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        step = self.state.global_step
        final = run_dir / f"{resume.CHECKPOINT_PREFIX}{step}"
        staging = run_dir / f"{resume.STAGING_PREFIX}{step}"
        with self.meter.paused(), resume.writing(staging, final):
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.save_model(str(staging), _internal_call=True)
            self._name_best_checkpoint(run_dir, final)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
                self._save_rng_state(str(staging))
            state = self._camtl_state()
            if self.args.should_save:
                self._collect_callback_states()
                self.state.save_to_json(str(staging / resume.TRAINER_STATE_FILE))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                resume.publish(staging, final, state)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            resume.rotate(final, self.args.save_total_limit, best=self.state.best_model_checkpoint)

    def _name_best_checkpoint(self, run_dir: Path, final: Path) -> None:
        strategies = (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST)
        if self.args.save_strategy in strategies and self.state.best_global_step:
            best = run_dir / f"{resume.CHECKPOINT_PREFIX}{self.state.best_global_step}"
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)

    def _collect_callback_states(self) -> None:
        states: dict[str, Any] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name = type(callback).__name__
                if name in states:
                    kept = states[name] if isinstance(states[name], list) else [states[name]]
                    states[name] = [*kept, callback.state()]
                else:
                    states[name] = callback.state()
        self.state.stateful_callbacks = states  # type: ignore[assignment]

    def _camtl_state(self) -> dict[str, Any]:
        """What ``camtl_state.json`` holds beside the list of files. Every rank calls this."""
        if self._observer is not None:
            self._observer.flush()
        return {
            "camtl_version": __version__,
            "global_step": self.state.global_step,
            "run": self.run_settings(),
            "sampler_state": self.train_sampler.state_dict(),
            "meter": self.meter.state(self._sum_over_ranks),
            "unlogged": {
                "loss": float(self._sum_over_ranks(self._tr_loss)),
                "since_step": self._globalstep_last_logged,
            },
        }

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write model, config and tokenizer; what is there already is replaced by one whole file at a time.

        The arguments are written as JSON, not as the pickle that Hugging Face leaves.
        """
        target = self.output_dir if output_dir is None else Path(output_dir)
        if not self.args.should_save or target.name.startswith(resume.STAGING_PREFIX):
            self._write_model(target, state_dict)
            return
        target.mkdir(parents=True, exist_ok=True)
        staging = target / f"{resume.STAGING_PREFIX}model"
        shutil.rmtree(staging, ignore_errors=True)
        with resume.writing(staging, target):
            self._write_model(staging, state_dict)
            resume.move_files(staging, target)

    def _write_model(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        with _no_shard_bars():
            super()._save(str(folder), state_dict=state_dict)
        if not self.args.should_save:
            return
        (folder / _PICKLED_ARGUMENTS).unlink(missing_ok=True)
        arguments = folder / "training_args.json"
        arguments.write_text(self.args.to_json_string() + "\n", encoding="utf-8")
        for weights in folder.glob("*.safetensors"):
            # safetensors writes for the owner alone; the other files have what the umask allows.
            shutil.copymode(arguments, weights)

    # -- results
    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """Write ``<split>_results.json`` and update ``all_results.json``, each whole or not at all."""
        if not self.is_world_process_zero():
            return
        folder = self.output_dir
        write_json(folder / f"{split}_results.json", metrics)
        if combined:
            together = folder / "all_results.json"
            before = read_json(together) if together.exists() else {}
            write_json(together, {**before, **metrics})

    def save_state(self) -> None:
        """Write ``trainer_state.json`` into the output folder, whole or not at all."""
        if self.is_world_process_zero():
            target = self.output_dir / resume.TRAINER_STATE_FILE
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
            try:
                self.state.save_to_json(str(temporary))
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _no_shard_bars() -> Iterator[None]:
    """Hide the bar that transformers draws for every file of weights."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
