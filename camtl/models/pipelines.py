"""``camtl.pipeline``: one task of a model as a function from texts to answers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from camtl.errors import UsageError

#: Rows of an endless input that are read ahead, in batches: enough to sort by length, few enough to hold.
_AHEAD = 32


class TaskPipeline:
    """One task of a model, to be called with texts; made by :func:`pipeline`.

    Attributes:
        model: the :class:`CaMtlForMultiTask`.
        task: the task's name.
        batch_size: texts at a time, where a call does not say.
    """

    def __init__(self, model: Any, task: str, batch_size: int = 32) -> None:
        from camtl.tasks.view import TaskView

        self.model = model
        self.task = task
        self.batch_size = batch_size
        self._view = TaskView.from_config(model.config.task_info[model.config.task_index(task)])

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.model.tokenizer

    def __repr__(self) -> str:
        return (
            f"TaskPipeline(task={self.task!r}, tasks={self.model.config.tasks}, device={str(self.device)!r})"
        )

    def __call__(self, inputs: Any, *, batch_size: int | None = None) -> Any:
        """Answer texts, as ``model.predict`` does.

        Args:
            inputs: one text, or one row: a pair as a tuple of two strings, or a dict with ``text`` (and
                ``text_pair``) or with the task's own columns. Or a list of texts and rows; in it a pair may
                be a list. Or any other iterable of them (a generator, a column of a data set).
            batch_size: texts at a time; None: as the pipeline was made with.

        Returns:
            The dict of a single text or row; a list of dicts, in order, for a list; an iterator of dicts,
            which reads its input as it goes, for any other iterable.

        Raises:
            UsageError: a row that is not what the task reads.
        """
        size = self.batch_size if batch_size is None else batch_size
        if isinstance(inputs, (str, tuple, Mapping)):
            return self._predict([inputs], size)[0]
        if isinstance(inputs, list):
            return self._predict(inputs, size)
        if isinstance(inputs, Iterable):
            return self._stream(inputs, size)
        raise UsageError(
            f"inputs: {inputs!r} is not accepted; accepted: a text, a pair as a tuple, a dict, or a list of "
            "them"
        )

    def _predict(self, rows: list[Any], batch_size: int) -> list[dict[str, Any]]:
        entries = [self._entry(row) for row in rows]
        answers: list[dict[str, Any]] = self.model.predict(entries, task=self.task, batch_size=batch_size)
        return answers

    def _stream(self, rows: Iterable[Any], batch_size: int) -> Iterator[dict[str, Any]]:
        if batch_size < 1:
            raise UsageError(f"batch_size: {batch_size!r} is not accepted; accepted: 1 or more")
        ahead = iter(rows)
        while chunk := list(islice(ahead, batch_size * _AHEAD)):
            yield from self._predict(chunk, batch_size)

    def _entry(self, row: Any) -> Any:
        """A row as ``predict`` takes it: ``text`` and ``text_pair`` become texts, where the task has no such
        columns of its own.
        """
        if not isinstance(row, Mapping):
            return row
        task_type: Any = self._view.task_type
        plain, columns = task_type.plain, task_type.columns(self._view)
        is_own = not plain and all(name in row for name in columns)
        if "text" in row and set(row) <= {"text", "text_pair"} and not is_own:
            pair = row.get("text_pair")
            return row["text"] if pair is None else (row["text"], pair)
        missing = [name for name in columns if name not in row]
        if plain and missing:
            raise UsageError(
                f"inputs: {dict(row)!r} has no {missing[0]!r}; task {self.task!r} reads "
                f"{' and '.join(columns)} (or text and text_pair)"
            )
        return dict(row)


def pipeline(
    task: str | None = None,
    model: Any = None,
    *,
    tokenizer: Any = None,
    device: int | str | torch.device | None = None,
    batch_size: int = 32,
    **kwargs: Any,
) -> TaskPipeline:
    """One task of a trained model as a function: ``camtl.pipeline("mrpc", model="runs/glue4")``.

    Args:
        task: the task's name; None: the model's active or only one.
        model: folder or hub id of a trained model, or a :class:`CaMtlForMultiTask`.
        tokenizer: a tokenizer, or folder or name of one; None: the model's own.
        device: ``"cuda:1"``, a ``torch.device``, a GPU's number or -1 for the CPU; None: a GPU if there is
            one, for a model that is loaded here, and where it is for any other.
        batch_size: texts at a time.
        **kwargs: for ``CaMtlForMultiTask.from_pretrained``, where ``model`` is a name.

    Returns:
        A callable; see :meth:`TaskPipeline.__call__`. The model is in eval mode.

    Raises:
        UsageError: no model, a model of another class, an unknown task or device, a task that must be named.
    """
    from camtl.models.modeling import CaMtlForMultiTask

    if batch_size < 1:
        raise UsageError(f"batch_size: {batch_size!r} is not accepted; accepted: 1 or more")
    target = None if device is None else _device(device)
    if isinstance(model, (str, os.PathLike)):
        model = CaMtlForMultiTask.from_pretrained(model, **kwargs)
        target = _best_device() if target is None else target
    elif not isinstance(model, CaMtlForMultiTask):
        given = "none" if model is None else f"a {type(model).__name__}"
        raise UsageError(
            f"model: {given} was given; accepted: the folder of a trained model, or a CaMtlForMultiTask"
        )
    elif kwargs:
        raise UsageError(f"pipeline: {', '.join(sorted(kwargs))}: only for a model that is loaded by name")
    if task is None:
        try:
            task = model.config.tasks[model.default_task_id()]
        except ValueError:
            raise UsageError(f"task: none given; this model has: {', '.join(model.config.tasks)}") from None
    model.config.task_index(task)
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = _load_tokenizer(os.fspath(tokenizer))
    if tokenizer is not None:
        model.tokenizer = tokenizer
    if target is not None:
        model.to(target)
    return TaskPipeline(model.eval(), task, batch_size)


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from camtl.models.loading import resolve_encoder

    try:
        return AutoTokenizer.from_pretrained(resolve_encoder(name))
    except (OSError, ValueError) as error:
        raise UsageError(f"tokenizer: {name}: no tokenizer could be loaded there") from error


def _device(given: int | str | torch.device) -> torch.device:
    try:
        if isinstance(given, int):
            device = torch.device("cpu") if given < 0 else torch.device("cuda", given)
        else:
            device = torch.device(given)
    except RuntimeError:
        raise UsageError(f"device: {given!r} is not accepted; accepted: cpu, cuda, cuda:1, mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device: {given!r}: there are {torch.cuda.device_count()} CUDA devices here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"device: {given!r} is not available here")
    return device


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
