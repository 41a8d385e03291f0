"""``predict``: from texts to labels or scores in the task's own terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from camtl.errors import UsageError
from camtl.models.loading import load_tokenizer
from camtl.models.packing import packs

if TYPE_CHECKING:
    from camtl.tasks.types import Outputs
    from camtl.tasks.types.base import Where
    from camtl.tasks.view import TaskView

Text = str | tuple[str, ...] | list[str] | dict[str, Any]
#: What heads read that answer with places in the text.
BY_TOKEN = ("tokens", "positions")
_INPUTS = ("input_ids", "token_type_ids", "token_marks", "task_id")


class PredictionMixin:
    """``predict``, ``decode_logits`` and the lazily loaded ``tokenizer`` of :class:`CaMtlForMultiTask`."""

    config: Any
    _tokenizer: Any = None
    _tokenizer_source: str | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer: the one that was set, else loaded from where the model came from."""
        if self._tokenizer is None:
            name = self._tokenizer_source or self.config.name_or_path
            if not name:
                raise UsageError(
                    "this model has no tokenizer: set model.tokenizer, or load the model from a folder"
                )
            self._tokenizer = load_tokenizer(name)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer = value

    def decode_logits(self: Any, logits: torch.Tensor, task: str) -> list[dict[str, Any]]:
        """``logits`` ``[n, C_max]`` of one task to one dict per row, as its type decodes them.

        Classification: ``{"label", "score", "probabilities": {name: p}}``; multi-label: ``{"labels",
        "probabilities"}`` (``labels`` those above the threshold, one half unless the task says otherwise);
        regression: ``{"score"}``, in the labels' original scale. Tasks whose answers are places in the text
        need it: :meth:`predict`.
        """
        from camtl.tasks.types import Outputs

        info = self.config.task_info[self.config.task_index(task)]
        if info.get("reads", "pooled") in BY_TOKEN:
            raise UsageError(f"task {task!r}: its answers are places in the text; use predict")
        own = logits[:, : info["num_labels"]].detach().to("cpu", torch.float64).numpy()
        return self._decode(task, Outputs(logits=own))

    def _decode(self: Any, task: str, outputs: Outputs) -> list[dict[str, Any]]:
        view = self._view(task)
        mean, deviation = self.label_scale(task)
        return view.task_type.decode(replace(outputs, mean=mean, deviation=deviation), view)

    def _view(self: Any, task: str) -> TaskView:
        from camtl.tasks.view import TaskView

        return TaskView.from_config(self.config.task_info[self.config.task_index(task)])

    @torch.no_grad()
    def predict(
        self: Any,
        texts: Text | Sequence[Text],
        task: str | None = None,
        batch_size: int = 32,
        *,
        where: Where | None = None,
    ) -> list[dict[str, Any]]:
        """Predict a task for texts, in order.

        Args:
            texts: a list whose entries are a string, a pair (or more) of strings, or a dict with the task's
                columns; a single string or dict also goes, a single pair as a tuple. A classification, multi-
                label or regression task reads texts and pairs, whatever it was trained on. Texts longer than
                ``max_seq_length`` are cut, pairs longest first.
            task: its name; None: the active or the only one.
            batch_size: sequences at a time.
            where: says where entry i came from, for error messages, e.g. ``"in.jsonl, line 7"``.

        Returns:
            One dict per entry; see :meth:`decode_logits` and the ``decode`` of the task's type
            (:mod:`camtl.tasks.types`). The model is in eval mode during the call and left in the mode it was
            in.

        Raises:
            UsageError: an unknown task, an entry that is not what the task reads.
        """
        from camtl.tasks.types import Outputs

        if isinstance(texts, (str, tuple, dict)):
            texts = [texts]
        if task is None and self._active_task is None and self.config.num_tasks > 1:
            raise UsageError(
                f"task: this model has several; name one of {', '.join(self.config.tasks)}, or choose one "
                "with set_active_task"
            )
        name = self.config.tasks[self.default_task_id()] if task is None else task
        index = self.config.task_index(name)
        if batch_size < 1:
            raise UsageError(f"batch_size: {batch_size!r} is not accepted; accepted: 1 or more")
        view = self._view(name)
        if not texts:
            return []
        if view.task_type.plain:
            entries = [
                _check_text(text, view, where(i) if where else "texts") for i, text in enumerate(texts)
            ]
            rows, features = None, [self._tokenise(entry) for entry in entries]
        else:
            rows, features = self._rows(view, texts, where or (lambda i: f"texts, entry {i + 1}"))
        columns = {key: [feature[key] for feature in features] for key in features[0]}
        results = self._run([{**feature, "task_id": index} for feature in features], batch_size)
        if self.config.task_info[index].get("reads", "pooled") in BY_TOKEN:
            size = self.config.task_info[index]["num_labels"]
            outputs = Outputs(
                columns, token_logits=[result[:, :size].numpy() for result in results], rows=rows
            )
        else:
            size = self.config.task_info[index]["num_labels"]
            outputs = Outputs(columns, logits=torch.stack(results)[:, :size].double().numpy(), rows=rows)
        return self._decode(name, outputs)

    def _run(self: Any, features: list[dict[str, Any]], batch_size: int) -> list[torch.Tensor]:
        """What the model says of each sequence: logits [C], or [tokens, C] of a task that reads tokens."""
        from camtl.data import MultiTaskCollator

        packed = packs(self.config, self.device)
        collate = MultiTaskCollator(self.tokenizer.pad_token_id or 0, packed=packed)
        by_token = self.config.task_info[features[0]["task_id"]].get("reads", "pooled") in BY_TOKEN
        # of similar length together, so that little is padding; put back in order at the end
        order = sorted(range(len(features)), key=lambda i: -len(features[i]["input_ids"]))
        results: list[torch.Tensor] = [torch.empty(0)] * len(features)
        training = [module for module in self.modules() if module.training]
        if training:
            self.eval()
        try:
            for start in range(0, len(order), batch_size):
                chunk = order[start : start + batch_size]
                batch = collate([{k: features[i][k] for k in _INPUTS if k in features[i]} for i in chunk])
                batch = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                output = self(**batch, return_dict=True)
                found = (output.token_logits if by_token else output.logits).float().cpu()
                for i, values in zip(chunk, found, strict=True):
                    results[i] = values[: len(features[i]["input_ids"])] if by_token else values
        finally:
            for module in training:
                module.training = True
        return results

    def _tokenise(self: Any, entry: tuple[str, ...]) -> dict[str, Any]:
        """One text or pair (which may be mixed in a call) as a sequence."""
        return dict(
            self.tokenizer(
                *entry,
                truncation="longest_first",
                max_length=self.config.max_seq_length,
                return_token_type_ids=True,
                return_attention_mask=False,
            )
        )

    def _rows(
        self: Any, view: TaskView, entries: Sequence[Any], where: Where
    ) -> tuple[dict[str, list[Any]], list[dict[str, Any]]]:
        """Entries as the task's prepared columns, and their sequences."""
        given = [_as_row(entry, view, where(i)) for i, entry in enumerate(entries)]
        kind: Any = view.task_type
        names = kind.columns(view)
        for i, row in enumerate(given):
            missing = [name for name in names if name not in row]
            if missing:
                raise UsageError(
                    f"{where(i)}: has no {missing[0]!r}; task {view.name!r} reads {', '.join(names)}"
                )
        columns = {name: [row[name] for row in given] for name in names}
        from camtl.tasks.types.base import encode_rows

        rows = kind.prepare(view, columns, where, True)
        task: Any = view
        encoded = encode_rows(task, rows, self.tokenizer, self.config.max_seq_length, where)
        features = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        return rows, features


def _check_text(text: Any, view: TaskView, place: str) -> tuple[str, ...]:
    if isinstance(text, str):
        return (text,)
    if isinstance(text, dict) and all(isinstance(text.get(name), str) for name in view.text_columns):
        return tuple(text[name] for name in view.text_columns)
    if (
        isinstance(text, (tuple, list))
        and len(text) in (1, 2)
        and all(isinstance(part, str) for part in text)
    ):
        return tuple(text)
    raise UsageError(
        f"{place}: {text!r} is not accepted; accepted: a string or a pair of strings per entry, or a dict "
        f"with {' and '.join(view.text_columns)}"
    )


def _as_row(entry: Any, view: TaskView, place: str) -> dict[str, Any]:
    if isinstance(entry, dict):
        return entry
    texts = (entry,) if isinstance(entry, str) else entry
    if not isinstance(texts, (tuple, list)) or not all(isinstance(text, str) for text in texts):
        raise UsageError(
            f"{place}: {entry!r} is not accepted; accepted: texts, or a dict with the task's columns"
        )
    try:
        return view.task_type.row(view, texts)  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(f"{place}: task {view.name!r} {error}") from None
