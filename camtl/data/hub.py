"""Data sets of the Hugging Face hub, without the long wait when it cannot be reached."""

from __future__ import annotations

import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from camtl.errors import UsageError
from camtl.tasks import Task
from camtl.tasks.types.base import is_missing

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

#: Seconds to wait for any answer of the hub. The libraries themselves retry for more than twenty.
REACH_TIMEOUT = 4.0


def hub_is_offline() -> bool:
    """Whether the environment forbids hub access (``HF_HUB_OFFLINE`` or ``HF_DATASETS_OFFLINE``)."""
    import datasets

    return bool(datasets.config.HF_HUB_OFFLINE)


def hub_answers(timeout: float = REACH_TIMEOUT) -> bool:
    """Whether the hub answers within ``timeout`` seconds, by ``HF_ENDPOINT`` and the proxy settings."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return True  # an answer, if not a kind one
    except (OSError, ValueError):
        return False


def load_from_hub(
    task: Task, splits: Sequence[str], cache_dir: str | os.PathLike[str] | None
) -> dict[str, Dataset]:
    """Those of ``splits`` that the task's hub data set has; a copy in the local cache serves without network.

    Raises :class:`UsageError` at once when the hub cannot be reached and nothing is cached.
    """
    import datasets

    source = task.source
    if source is None or source.hub is None:
        raise UsageError(f"task {task.name!r} names no data set on the hub")
    offline = hub_is_offline()
    reachable = not offline and hub_answers()
    name = f"{source.hub}{f' ({source.config})' if source.config else ''}"
    try:
        with _offline_unless(reachable):
            everything = datasets.load_dataset(
                source.hub,
                source.config,
                revision=source.revision,
                cache_dir=str(cache_dir) if cache_dir else None,
            )
    except Exception as error:  # the library raises many kinds here; each means the same to the user
        if reachable:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        elif offline:
            reason = "hub access is switched off (HF_HUB_OFFLINE) and the data are not in the local cache"
        else:
            reason = "the hub cannot be reached and the data are not in the local cache"
        raise UsageError(
            f"task {task.name!r}: cannot load {name} from the hub: {reason}. Give local files with "
            f"--data_dir DIR, where DIR/{task.name}/ holds train.jsonl, validation.jsonl "
            "(or .csv, .tsv, .parquet)"
        ) from None
    found = {}
    for split in splits:
        theirs = source.splits.get(split, split)
        if theirs in everything:
            rows = _as_ours(task, everything[theirs], name)
            found[split] = rows if split.startswith("test") else _labelled(task, rows, split)
    return found


def _as_ours(task: Task, rows: Dataset, name: str) -> Dataset:
    """The rows with the task's names of columns and classes, as its source translates them."""
    source = task.source
    assert source is not None
    if source.columns:
        missing = [theirs for theirs in source.columns.values() if theirs not in rows.column_names]
        if missing:
            raise UsageError(
                f"task {task.name!r}: {name} on the hub has no column {missing[0]!r}; the columns there are: "
                f"{', '.join(rows.column_names)}"
            )
        taken = {*source.columns, *source.columns.values()}
        others = [column for column in rows.column_names if column not in taken]
        rows = rows.select_columns([*source.columns.values(), *others])
        rows = rows.rename_columns(
            {theirs: ours for ours, theirs in source.columns.items() if ours != theirs}
        )
    if source.labels and task.label_column in rows.column_names:
        rows = _with_our_classes(task, rows)
    return rows


def _with_our_classes(task: Task, rows: Dataset) -> Dataset:
    """The rows with the task's class names in place of what ``source.labels`` says the hub holds.

    A label may be a class or a list of classes. Ids of a ``ClassLabel`` become its names first: their order
    is the hub's, not the task's.
    """
    import datasets

    column = task.label_column
    given = rows[column][:]
    feature = rows.features[column]
    feature = getattr(feature, "feature", feature)  # of a list of labels, that of its entries
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
        given = [_each(label, lambda i: names[i] if i is not None and i >= 0 else None) for label in given]
    own = task.source.labels if task.source is not None else {}
    known = [part for label in given for part in (label if isinstance(label, list) else [label])]
    if not isinstance(feature, datasets.ClassLabel) and not any(str(part) in own for part in known):
        return rows  # nothing to translate, as in a column of a 0 or 1 for every class
    labels = [_each(label, lambda part: _our_class(part, own)) for label in given]
    return rows.remove_columns(column).add_column(column, labels)


def _each(label: Any, translate: Callable[[Any], Any]) -> Any:
    return [translate(part) for part in label] if isinstance(label, list) else translate(label)


def _our_class(label: Any, own: Mapping[str, str]) -> str | None:
    """The task's name of a hub's class, text also for one without a translation: a column has one type."""
    if str(label) in own:
        return own[str(label)]
    return None if is_missing(label) or label == -1 else str(label)


def _labelled(task: Task, rows: Dataset, split: str) -> Dataset:
    """Without the rows that have no label: SNLI marks those on which its annotators did not agree by -1."""
    if task.label_column not in rows.column_names:
        return rows
    labels = rows[task.label_column][:]
    kept = [i for i, label in enumerate(labels) if not _is_no_label(task, label)]
    if len(kept) == len(rows) or not kept:
        return rows  # none: loading says that the labels are missing
    logger.warning(
        "task %r: %s of %s %s rows have no label and are left out", task.name,
        f"{len(rows) - len(kept):,}", f"{len(rows):,}", split,
    )  # fmt: skip
    return rows.select(kept)


def _is_no_label(task: Task, label: Any) -> bool:
    """Whether a raw label is empty, or a -1 that is none: to a regression -1 may be a score."""
    if is_missing(label):
        return True
    if label != -1:
        return False
    try:
        return task.task_type.prepare_label(task, label) is None
    except ValueError:
        return True


@contextmanager
def _offline_unless(reachable: bool) -> Iterator[None]:
    """While the hub does not answer, let ``datasets`` look only into its cache instead of retrying."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not reachable
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
