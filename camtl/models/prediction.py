"""``predict``: from texts to labels or scores in the task's own terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from camtl.errors import UsageError
from camtl.models.packing import packs

Text = str | tuple[str, str] | list[str]


class PredictionMixin:
    """``predict``, ``decode_logits`` and the lazily loaded ``tokenizer`` of :class:`CaMtlForMultiTask`."""

    config: Any
    _tokenizer: Any = None
    _tokenizer_source: str | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer: the one that was set, else loaded from where the model came from."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            name = self._tokenizer_source or self.config.name_or_path
            if not name:
                raise UsageError(
                    "this model has no tokenizer: set model.tokenizer, or load the model from a folder"
                )
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(name)
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"{name}: no tokenizer could be loaded there; set model.tokenizer"
                ) from error
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer = value

    def decode_logits(self: Any, logits: torch.Tensor, task: str) -> list[dict[str, Any]]:
        """``logits`` ``[n, C_max]`` of one task to one dict per row.

        Classification: ``{"label", "score", "probabilities": {name: p}}``; multi-label: ``{"labels",
        "probabilities"}`` (``labels`` those above one half); regression: ``{"score"}``, in the labels'
        original scale.
        """
        info = self.config.task_info[self.config.task_index(task)]
        own = logits[:, : info["num_labels"]].detach().to("cpu", torch.float64)
        if info["loss"] == "mse":
            mean, std = self.label_scale(task)
            return [{"score": value * std + mean} for value in own[:, 0].tolist()]
        names = info["labels"] or [str(number) for number in range(info["num_labels"])]
        rows = (own.sigmoid() if info["loss"] == "bce" else own.softmax(-1)).tolist()
        results: list[dict[str, Any]] = []
        for row in rows:
            probabilities = dict(zip((str(name) for name in names), row, strict=True))
            if info["loss"] == "bce":
                labels = [name for name, p in probabilities.items() if p > 0.5]
                results.append({"labels": labels, "probabilities": probabilities})
            else:
                label = max(probabilities, key=lambda name: probabilities[name])
                results.append(
                    {"label": label, "score": probabilities[label], "probabilities": probabilities}
                )
        return results

    @torch.no_grad()
    def predict(
        self: Any, texts: Text | Sequence[Text], task: str | None = None, batch_size: int = 32
    ) -> list[dict[str, Any]]:
        """Predict a task for texts, in order; see :meth:`decode_logits` for the dicts.

        ``texts`` is a list whose entries are a string or a pair of strings (a single string also goes, a
        single pair as a tuple). Texts longer than ``max_seq_length`` are cut, pairs longest first. ``task``
        None: the active or the only one. The model is in eval mode during the call and left in the mode it
        was in.
        """
        if isinstance(texts, (str, tuple)):
            texts = [texts]
        entries = [self._check_text(text) for text in texts]
        name = self.config.tasks[self.default_task_id()] if task is None else task
        task_id = self.config.task_index(name)
        if batch_size < 1:
            raise UsageError(f"batch_size: {batch_size!r} is not accepted; accepted: 1 or more")
        tokenizer = self.tokenizer
        # of similar length together, so that little is padding; put back in order at the end
        order = sorted(range(len(entries)), key=lambda i: -sum(map(len, entries[i])))
        results: list[dict[str, Any]] = [{}] * len(entries)
        training = [module for module in self.modules() if module.training]
        if training:
            self.eval()
        try:
            for start in range(0, len(order), batch_size):
                chunk = order[start : start + batch_size]
                batch = self._encode([entries[i] for i in chunk], tokenizer, task_id)
                logits = self(**batch, return_dict=True).logits
                for i, result in zip(chunk, self.decode_logits(logits, name), strict=True):
                    results[i] = result
        finally:
            for module in training:
                module.training = True
        return results

    @staticmethod
    def _check_text(text: Any) -> tuple[str, ...]:
        if isinstance(text, str):
            return (text,)
        if (
            isinstance(text, (tuple, list))
            and len(text) in (1, 2)
            and all(isinstance(part, str) for part in text)
        ):
            return tuple(text)
        raise UsageError(
            f"texts: {text!r} is not accepted; accepted: a string or a pair of strings per entry"
        )

    def _encode(self: Any, entries: list[tuple[str, ...]], tokenizer: Any, task_id: int) -> dict[str, Any]:
        """Tokenise singles and pairs (which may be mixed) into one batch, packed where that is faster."""
        from camtl.data import MultiTaskCollator

        features = [
            {
                **tokenizer(
                    *entry,
                    truncation="longest_first",
                    max_length=self.config.max_seq_length,
                    return_token_type_ids=True,
                ),
                "task_id": task_id,
            }
            for entry in entries
        ]
        packed = packs(self.config, self.device)
        batch = MultiTaskCollator(tokenizer.pad_token_id or 0, packed=packed)(features)
        return {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
