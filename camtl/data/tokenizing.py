"""Tokenise a task's rows once; the result is kept in a cache file named after everything it depends on."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl.data.loading import place_of, prepare_dataset
from camtl.errors import UsageError
from camtl.tasks import Task
from camtl.tasks.types.base import TaskType, Where, encode_rows

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

#: Part of the cache key: raise it whenever the meaning or form of tokenised rows changes by more than the
#: code of a task's type, which is a part of the key too.
CACHE_VERSION = 3
TOKENISED_COLUMNS = (
    "input_ids",
    "token_type_ids",
    "labels",
    "token_marks",
    "token_labels",
    "token_begin",
    "token_end",
    "row",
    "length",
)
_BATCH = 1000
_PROGRESS_FROM = 20_000


def is_tokenised(dataset: Dataset) -> bool:
    """Whether a Dataset is a result of :func:`tokenize` (it has token ids, not texts)."""
    return {"input_ids", "length"} <= set(dataset.column_names)


def tokenize(
    task: Task,
    dataset: Dataset,
    tokenizer: Any,
    max_seq_length: int,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    allow_unlabelled: bool = False,
    description: str = "",
) -> Dataset:
    """Tokenise the rows of ``task``, in order.

    ``dataset`` has the task's text and label columns, as from :func:`camtl.data.load_task` or raw. Texts are
    cut to ``max_seq_length`` tokens, a pair by taking tokens from the longer text first; nothing is padded.

    Returns a Dataset with ``input_ids`` (list of int32), ``token_type_ids`` (list of int8, zeros if the
    tokenizer has none) and ``length`` (int32, tokens of the sequence), and what the task's type adds:
    ``labels`` (float32: class id or number, NaN for a row without label; a list of a 0 or 1 for every class
    of a multi-label task; absent if no row has one), ``token_marks`` (list of int8), ``token_labels``,
    ``token_begin``, ``token_end`` (lists of int32) and ``row`` (int32, the number of the row that a sequence
    is a part of; absent where every row is one sequence). See :meth:`camtl.tasks.TaskType.encode`.

    The cache (``cache_dir``, default the one of ``datasets``) is keyed by the rows, the task's columns,
    labels and options, the source of its type, the tokenizer's whole definition, the length and this code's
    version.
    """
    if is_tokenised(dataset):
        return dataset
    origin, dataset = dataset, prepare_dataset(task, dataset, allow_unlabelled)
    if len(dataset) == 0:
        raise UsageError(
            f"task {task.name!r}: no rows to tokenise{f' in {description}' if description else ''}"
        )
    least = task.task_type.shortest(task, tokenizer)
    if max_seq_length < least:
        raise UsageError(
            f"max_seq_length {max_seq_length} is too short for task {task.name!r}; at least {least}"
        )
    columns = {name: dataset[name][:] for name in dataset.column_names}
    key = _key(task, columns, tokenizer, max_seq_length)
    path = _cache_folder(cache_dir) / f"{task.name}-{len(dataset)}-{key[:24]}.arrow"
    cached = _read_cache(path)
    if cached is not None:
        return cached
    where = partial(place_of, task, origin)
    batches = _tokenised(task, columns, tokenizer, max_seq_length, where, description=description)
    return _write_cache(path, batches, key)


def _tokenised(
    task: Task,
    columns: Mapping[str, Sequence[Any]],
    tokenizer: Any,
    max_seq_length: int,
    where: Where,
    *,
    description: str,
) -> Iterator[dict[str, list[Any]]]:
    from tqdm.auto import tqdm

    rows = len(columns[task.text_columns[0]])
    labelled = _labelled(task, columns)
    bar = tqdm(
        total=rows,
        desc=f"tokenising {description or task.name}",
        unit="rows",
        disable=True if rows < _PROGRESS_FROM else None,  # None: no bar where no terminal is
    )
    with bar:
        for start in range(0, rows, _BATCH):
            part = {name: values[start : start + _BATCH] for name, values in columns.items()}
            batch = encode_rows(task, part, tokenizer, max_seq_length, partial(_from, where, start))
            batch["length"] = [len(ids) for ids in batch["input_ids"]]
            if "row" in batch:
                batch["row"] = [start + row for row in batch["row"]]
            if not labelled:
                batch.pop("labels", None)
                batch.pop("token_labels", None)
            yield batch
            bar.update(len(part[task.text_columns[0]]))


def _from(where: Where, start: int, row: int) -> str:
    return where(start + row)


def _labelled(task: Task, columns: Mapping[str, Sequence[Any]]) -> bool:
    """Whether any row has a label."""
    labels = columns.get(task.label_column)
    missing = -1 if task.task_type.features(task)[task.label_column] == "label" else None
    return labels is not None and any(label is not None and label != missing for label in labels)


def _key(task: Task, columns: Mapping[str, Sequence[Any]], tokenizer: Any, max_seq_length: int) -> str:
    digest = hashlib.sha256()
    about = {
        "version": CACHE_VERSION,
        "code": _code(task.task_type),
        "task": [task.name, task.type, task.text_columns, task.label_column, task.labels, task.options],
        "columns": list(columns),
        "max_seq_length": max_seq_length,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    digest.update(json.dumps(about, sort_keys=True).encode())
    for column in columns.values():
        for value in column:
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()


def _code(task_type: TaskType) -> list[str]:
    """Hashes of the modules that a type of task is written in, its own and those of its bases."""
    out = []
    for kind in type(task_type).__mro__[:-1]:
        module = sys.modules.get(kind.__module__)
        try:
            text = inspect.getsource(module) if module is not None else ""
        except (OSError, TypeError):  # typed in, or installed without sources
            text = ""
        out.append(f"{kind.__qualname__} {hashlib.sha256(text.encode()).hexdigest()}")
    return out


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what decides how a text is tokenised: rules, vocabulary, special tokens, versions."""
    import tokenizers
    import transformers

    about: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "versions": [tokenizers.__version__, transformers.__version__],
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "sides": [getattr(tokenizer, "truncation_side", ""), getattr(tokenizer, "padding_side", "")],
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        rules = json.loads(backend.to_str())
        # These two only remember the last call.
        rules.pop("truncation", None)
        rules.pop("padding", None)
        about["rules"] = rules
    else:
        about["vocabulary"] = tokenizer.get_vocab()
        about["init"] = {
            k: str(v) for k, v in getattr(tokenizer, "init_kwargs", {}).items() if "path" not in k
        }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    import datasets

    return Path(cache_dir if cache_dir is not None else datasets.config.HF_DATASETS_CACHE) / "camtl-tokenised"


def _read_cache(path: Path) -> Dataset | None:
    import pyarrow as pa
    from datasets import Dataset

    if not path.is_file():
        return None
    try:
        dataset = Dataset.from_file(str(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        logger.warning("the cache file %s cannot be read (%s) and is made anew", path, error)
        return None
    if len(dataset) == 0 or not is_tokenised(dataset):
        logger.warning("the cache file %s is not whole and is made anew", path)
        return None
    return dataset


def _write_cache(path: Path, batches: Iterator[dict[str, list[Any]]], key: str) -> Dataset:
    """Write batches to ``path``, first under a temporary name; if impossible keep them in memory."""
    import pyarrow as pa
    from datasets import Dataset, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    types: dict[str, Any] = {
        "input_ids": List(Value("int32")),
        "token_type_ids": List(Value("int8")),
        "labels": Value("float32"),
        "token_marks": List(Value("int8")),
        "token_labels": List(Value("int32")),
        "token_begin": List(Value("int32")),
        "token_end": List(Value("int32")),
        "row": Value("int32"),
        "length": Value("int32"),
    }
    features: Features | None = None
    tables: list[pa.Table] = []
    for batch in batches:
        if features is None:
            if isinstance(batch.get("labels", [0])[0], list):
                types["labels"] = List(Value("float32"))
            features = Features({name: types[name] for name in TOKENISED_COLUMNS if name in batch})
        # Arrow at once: as Python lists a large task would take ten times the memory.
        tables.append(pa.table({name: batch[name] for name in features}, schema=features.arrow_schema))
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ArrowWriter(path=str(temporary), features=features, fingerprint=key[:16]) as writer:
            for table in tables:
                writer.write_table(table)
            writer.finalize()
        os.replace(temporary, path)
        return Dataset.from_file(str(path))
    except OSError as error:
        logger.warning("tokenised rows are not kept: cannot write %s (%s)", path, error.strerror or error)
        return Dataset(pa.concat_tables(tables))
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
