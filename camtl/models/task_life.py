"""Tasks come and go: adding, removing and choosing the tasks of a model, training some and not the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from camtl.errors import UsageError
from camtl.models.freezing import no_weight_decay
from camtl.models.single_task import SingleTaskMixin
from camtl.models.task_info import PER_TOKEN, normalise_tasks

#: The parameters of which every task has rows of its own, in the order of the tasks.
TASK_ROWS = frozenset(
    {
        "bert.task_type_embeddings.weight",
        "heads.weight",
        "heads.bias",
        "token_heads.weight",
        "token_heads.bias",
    }
)


class TaskLifeMixin(SingleTaskMixin):
    """``add_task``, ``remove_task``, ``freeze_shared``, ``set_active_task`` of :class:`CaMtlForMultiTask`."""

    config: Any
    bert: Any
    _active_task: str | None = None
    _added: tuple[str, ...] = ()
    _fixed_as_shared: frozenset[str] = frozenset()
    _has_fixed_rows: bool = False

    @property
    def active_task(self) -> str | None:
        """The task used where a call names none; None if it must be named (or there is only one)."""
        return self._active_task

    def set_active_task(self, name: str | None) -> None:
        """Use this task where ``task_ids`` or ``task`` is left out; None undoes it.

        To Hugging Face's own code the model then is one of that task alone: ``config.num_labels``,
        ``id2label``, ``label2id`` and ``problem_type`` are the task's, and so are the logits that ``forward``
        gives without ``task_ids`` (a label for every token where the task reads tokens).
        """
        if name is not None:
            self.config.task_index(name)
        self._active_task = name
        self.config.choose_labels(name)

    def own_logits(
        self: Any, logits: torch.Tensor, token_logits: torch.Tensor | None, name: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What all heads give, as a model of one task gives it.

        ``logits`` ``[B, C_max]`` become the task's own ``[B, C]``, of a regression in its labels' scale;
        ``token_logits`` ``[B, S, C_max]`` its own ``[B, S, C]``, None if it has none there. Of a task that
        reads tokens these are its logits too, 0 instead of -inf at padding, where a softmax would be NaN.
        """
        info = self.config.task_info[self.config.task_index(name)]
        size = info["num_labels"]
        if info["reads"] not in PER_TOKEN:
            own = logits[:, :size]
            if info["loss"] == "mse":
                mean, deviation = self.label_scale(name)
                own = own * deviation + mean
            return own, None
        assert token_logits is not None
        token_logits = token_logits[..., :size]
        if info["reads"] == "tokens":
            logits = token_logits.masked_fill(token_logits == -math.inf, 0.0)
        return logits, token_logits

    def _reads_tokens(self, name: str) -> bool:
        return bool(self.config.task_info[self.config.task_index(name)]["reads"] == "tokens")

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
    def add_task(self: Any, task: Any, init_from: str | None = None) -> int:
        """Add a task (name, dict or task object) at the end and return its id.

        Its embedding row and head rows start at N(0, ``initializer_range``), and so does what the first task
        of its kind brings along (``heads``, ``token_heads``, ``span_pooler``). Everything else stays as it
        was, and so do the other tasks' outputs (to rounding). The task embedding and the heads become new
        parameters: build optimisers anew. :meth:`freeze_shared` then trains the new task alone.

        Args:
            task: the task.
            init_from: a task of the model. The new one starts with its embedding row, and with its head's
                rows where both read the same, by the same loss, into the same number of outputs.

        Raises:
            UsageError: a taken name, a bad description, or an ``init_from`` that the model does not have.
        """
        info = normalise_tasks([task], None)[0]
        if info["name"] in self.config.tasks:
            raise UsageError(
                f"task {info['name']!r} is already one of this model's: {', '.join(self.config.tasks)}"
            )
        if init_from is not None and init_from not in self.config.tasks:
            raise UsageError(
                f"init_from: task {init_from!r} is unknown; this model has: {', '.join(self.config.tasks)}"
            )
        std = self.config.initializer_range
        embedding = self.bert.task_type_embeddings
        if embedding is not None:
            row = torch.empty_like(embedding.weight[:1]).normal_(0.0, std)
            if init_from is not None:
                row = embedding.weight[self.config.task_index(init_from)].unsqueeze(0)
            self._set_task_embedding(torch.cat([embedding.weight, row]))
        self._add_heads(info)
        self._set_tasks([*self.config.task_info, info])
        if init_from is not None:
            self._copy_head(self.config.task_index(init_from), self.config.num_tasks - 1)
        self._added = (*self._added, info["name"])
        return self.config.num_tasks - 1

    def _copy_head(self: Any, source: int, target: int) -> None:
        """Give a task the head rows of another, where they mean the same."""
        one, other = self.config.task_info[source], self.config.task_info[target]
        if any(one[name] != other[name] for name in ("reads", "loss", "num_labels")):
            return
        heads = self.token_heads if one["reads"] in PER_TOKEN else self.heads
        for parameter in (heads.weight, heads.bias):
            parameter[heads.rows(target)] = parameter[heads.rows(source)]

    def freeze_shared(self: Any, tasks: Sequence[str] | None = None) -> list[str]:
        """Freeze all that tasks share, so that training ``tasks`` cannot change the outputs of the others.

        What stays trainable are the parameters of which every task has rows of its own (task embedding and
        stacked heads), and ``span_pooler`` if no other task uses it. The other tasks' rows are left alone as
        long as no batch holds rows of those tasks: their gradients are then zero, and these parameters are
        exempt from weight decay (``no_weight_decay``), which would change them nonetheless. Holds for
        optimisers that make no update of a zero gradient, as SGD, Adafactor and Adam do (built after this
        call). Not stored with the model.

        Args:
            tasks: the tasks to train; None: those that :meth:`add_task` has added.

        Returns:
            The names of the trainable parameters.

        Raises:
            UsageError: an unknown task, or none named and none added.
        """
        chosen = list(self._added if tasks is None else tasks)
        if not chosen:
            raise UsageError("freeze_shared: no task has been added; name those to train: tasks=['new', ...]")
        for name in chosen:
            self.config.task_index(name)
        self.unfreeze_shared()
        others = [info for info in self.config.task_info if info["name"] not in chosen]
        own_pooler = all(info["reads"] != "spans" for info in others)
        fixed = set()
        for name, parameter in self.named_parameters():
            own = name in TASK_ROWS or (own_pooler and name.startswith("span_pooler."))
            if not own and parameter.requires_grad:
                parameter.requires_grad_(False)
                fixed.add(name)
        self._fixed_as_shared, self._has_fixed_rows = frozenset(fixed), True
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def unfreeze_shared(self: Any) -> None:
        """Undo :meth:`freeze_shared`; what was frozen before stays so."""
        for name, parameter in self.named_parameters():
            if name in self._fixed_as_shared:
                parameter.requires_grad_(True)
        self._fixed_as_shared, self._has_fixed_rows = frozenset(), False

    def no_weight_decay(self, name: str) -> bool:
        """Whether the parameter of this name is exempt from weight decay.

        Biases and layer norms are; after :meth:`freeze_shared` also the parameters with rows for each task.
        """
        return no_weight_decay(name) or (self._has_fixed_rows and name in TASK_ROWS)

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
        self._added = tuple(added for added in self._added if added != name)
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
