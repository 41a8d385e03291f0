"""``camtl convert RUN``: a trained model as a small checkpoint, whole again, or one of its tasks alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl.cli._run_folder import (
    carry_over,
    check_writable,
    load_trained,
    note,
    open_run,
    prepare_libraries,
    read_config_json,
)
from camtl.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from camtl.models import CaMtlForMultiTask


def convert_run(args: argparse.Namespace) -> int:
    """Write ``args.run`` in another form to ``args.output_dir``."""
    folder, output_dir = open_run(args.run), Path(args.output_dir)
    config = read_config_json(folder)
    _check(args, folder, config, output_dir)
    prepare_libraries()
    small = "sha256" in (config.get("base_encoder") or {})
    model = load_trained(folder, args.base_model if small else None)
    tokenizer = _tokenizer(model)
    if tokenizer is None:
        note(f"{folder} has no tokenizer, and so {output_dir} has none")
    if args.to == "bert":
        print(f"wrote {output_dir}: {_write_bert(model, args.single_task, tokenizer, output_dir)}")
        if tokenizer is not None:
            call = f'transformers.pipeline("text-classification", model="{output_dir}", truncation=True)'
            print(f"next, in Python: {call}")
        return 0
    if args.single_task:
        model = model.single_task(args.single_task)

    def write(staging: Path) -> str:
        if args.adapter_only:
            from camtl.models.small_checkpoints import save_small

            model.tokenizer = tokenizer
            said = str(save_small(model, staging, base_model=None if small else args.base_model))
        else:
            model.save_pretrained(str(staging))
            if tokenizer is not None:
                tokenizer.save_pretrained(str(staging))
            said = f"{model.parameter_counts()['total']:,} parameters"
        carry_over(folder, staging, model.config.tasks)
        return said

    said = _whole_or_not_at_all(output_dir, write)
    print(f"wrote {output_dir}: tasks {', '.join(model.config.tasks)}; {said}")
    if tokenizer is not None:
        print(f'next: camtl predict {output_dir} --task {model.config.tasks[0]} --text "..."')
    return 0


def _check(args: argparse.Namespace, folder: Path, config: dict[str, Any], output_dir: Path) -> None:
    """Refuse what cannot be done before anything is loaded."""
    base = config.get("base_encoder") or {}
    small = "sha256" in base
    if args.to and not args.single_task:
        raise UsageError(f"--to {args.to}: a plain BERT has one task; say which: --single_task NAME")
    if args.to and args.adapter_only:
        raise UsageError(f"--to {args.to} and --adapter_only exclude each other; give one of them")
    if not (args.single_task or args.adapter_only or small):
        raise UsageError(f"{folder}: holds a whole model already; give --adapter_only or --single_task NAME")
    if args.single_task and args.single_task not in (config.get("tasks") or []):
        from camtl.cli._parser import suggestion

        name, names = args.single_task, list(config.get("tasks") or [])
        raise UsageError(
            f"--single_task {name}: {folder} has no such task{suggestion(name, names)} "
            f"(its tasks: {', '.join(names)})"
        )
    if args.adapter_only and not base and not args.base_model:
        raise UsageError(
            f"{folder}: does not say which encoder it was trained from; name it: --base_model NAME"
        )
    if args.base_model and not (small or args.adapter_only):
        raise UsageError(f"--base_model {args.base_model}: is for --adapter_only, and for what that wrote")
    if output_dir.is_file() or (output_dir.is_dir() and any(output_dir.iterdir())):
        raise UsageError(f"--output_dir {output_dir}: is there already; give a new or an empty folder")
    check_writable(output_dir, "--output_dir")


def _tokenizer(model: CaMtlForMultiTask) -> Any:
    try:
        return model.tokenizer
    except UsageError:
        return None


def _write_bert(model: CaMtlForMultiTask, task: str, tokenizer: Any, output_dir: Path) -> str:
    bert = model.to_bert(task)

    def write(staging: Path) -> str:
        bert.save_pretrained(str(staging))
        if tokenizer is not None:
            # Hugging Face's code cuts texts at this length, as this model did
            tokenizer.model_max_length = model.config.max_seq_length
            tokenizer.save_pretrained(str(staging))
        labels = ", ".join(model.config.labels_of(task).values())
        return f"BertForSequenceClassification of the task {task} ({labels})"

    return _whole_or_not_at_all(output_dir, write)


def _whole_or_not_at_all(output_dir: Path, write: Callable[[Path], str]) -> str:
    """Let ``write`` fill a folder under a temporary name, and give it its own when it is whole."""
    from camtl.training.resume import writing

    place = output_dir.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    staging = place.with_name(f".{place.name}.tmp-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    with writing(staging, place):
        staging.mkdir()
        said = write(staging)
        mode = (staging / "config.json").stat().st_mode
        for weights in staging.glob("*.safetensors"):
            weights.chmod(mode)  # safetensors writes for the owner alone
        if place.is_dir():
            place.rmdir()
        os.replace(staging, place)
    return said
