"""Tasks come and go: adding, removing and choosing the tasks of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from camtl.errors import UsageError
from camtl.models.single_task import SingleTaskMixin
from camtl.models.task_info import normalise_tasks


class TaskLifeMixin(SingleTaskMixin):
    """``add_task``, ``remove_task``, ``set_active_task`` of :class:`CaMtlForMultiTask`."""

    config: Any
    bert: Any
    _active_task: str | None = None

    @property
    def active_task(self) -> str | None:
        """The task used where a call names none; None if it must be named (or there is only one)."""
        return self._active_task

    def set_active_task(self, name: str | None) -> None:
        """Use this task where ``task_ids`` or ``task`` is left out; None undoes it.

        To Hugging Face's own code the model then is one of that task alone: ``config.num_labels``,
        ``id2label``, ``label2id`` and ``problem_type`` are the task's, and so are the logits that ``forward``
        gives without ``task_ids``.
        """
        if name is not None:
            self.config.task_index(name)
        self._active_task = name
        self.config.choose_labels(name)

    def own_logits(self: Any, logits: torch.Tensor, name: str) -> torch.Tensor:
        """``[B, C_max]`` to the task's own ``[B, C]``; those of a regression in its labels' scale."""
        info = self.config.task_info[self.config.task_index(name)]
        own = logits[:, : info["num_labels"]]
        if info["loss"] != "mse":
            return own
        mean, deviation = self.label_scale(name)
        return own * deviation + mean

    def default_task_id(self) -> int:
        """The id of the active task, or of the only task; ValueError if neither exists."""
        if self._active_task is not None:
            return self.config.task_index(self._active_task)
        if self.config.num_tasks == 1:
            return 0
        raise ValueError(
            f"task_ids [B] is needed: this model has the tasks {self.config.tasks} and none is active "
            "(set_active_task chooses one)"
        )

    @torch.no_grad()
    def add_task(self: Any, task: Any) -> int:
        """Add a task (name, dict or task object) at the end and return its id.

        Its embedding row and head rows start at N(0, ``initializer_range``), and so does what the first task
        of its kind brings along (``heads``, ``token_heads``, ``span_pooler``). Everything else stays as it
        was, and so do the other tasks' outputs (to rounding). The task embedding and the heads become new
        parameters: build optimisers anew. A taken name or a bad description raises :class:`UsageError`.
        """
        info = normalise_tasks([task], None)[0]
        if info["name"] in self.config.tasks:
            raise UsageError(
                f"task {info['name']!r} is already one of this model's: {', '.join(self.config.tasks)}"
            )
        std = self.config.initializer_range
        embedding = self.bert.task_type_embeddings
        if embedding is not None:
            row = torch.empty_like(embedding.weight[:1]).normal_(0.0, std)
            self._set_task_embedding(torch.cat([embedding.weight, row]))
        self._add_heads(info)
        self._set_tasks([*self.config.task_info, info])
        return self.config.num_tasks - 1

    @torch.no_grad()
    def remove_task(self: Any, name: str) -> None:
        """Drop a task; the ids of the tasks behind it go down by one. The last task cannot be removed.

        With the last task of a kind what only its kind needs goes too.
        """
        index = self.config.task_index(name)
        if self.config.num_tasks == 1:
            raise UsageError(f"task {name!r} is the model's only task and cannot be removed")
        embedding = self.bert.task_type_embeddings
        if embedding is not None:
            self._set_task_embedding(torch.cat([embedding.weight[:index], embedding.weight[index + 1 :]]))
        self._remove_heads(index)
        self._set_tasks([info for info in self.config.task_info if info["name"] != name])
        if self._active_task == name:
            self.set_active_task(None)

    def _set_task_embedding(self: Any, weight: torch.Tensor) -> None:
        embedding = self.bert.task_type_embeddings
        embedding.weight = nn.Parameter(weight, requires_grad=embedding.weight.requires_grad)
        embedding.num_embeddings = weight.shape[0]

    def _set_tasks(self: Any, task_info: list[dict[str, Any]]) -> None:
        self.config.task_info = task_info
        self.config.tasks = [info["name"] for info in task_info]
        self.bert.config.task_info, self.bert.config.tasks = self.config.task_info, self.config.tasks
        self.bert.hypernetwork.clear_cache()
        self.refresh_label_scale()
