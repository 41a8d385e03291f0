"""``camtl convert``: a trained model in another form; checkpoints of the code released with the paper."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl.cli._parser import CommandParser, add_flag
from camtl.errors import UsageError

if TYPE_CHECKING:
    import argparse

_DESCRIPTION = """
Write a trained model in another form: what training changed and no more, with the encoder it started from
named beside it; that as a whole model again; one of its tasks alone, also as a plain Hugging Face BERT.
Or turn a checkpoint of the code released with the CA-MTL paper into a camtl folder, or a camtl folder back
into that format. All of it keeps every number exactly, but for the rounding of a fold into plain BERT.
Checkpoints are read as plain tensors: nothing in them is executed.
"""
_EXAMPLES = (
    (
        "a small folder: what the run changed in its encoder, and what it added",
        "camtl convert runs/glue4 --adapter_only --output_dir shared/glue4",
    ),
    (
        "and a whole model of it again",
        "camtl convert shared/glue4 --base_model bert-base-uncased --output_dir models/glue4",
    ),
    ("one task alone", "camtl convert runs/glue4 --single_task mrpc --output_dir models/mrpc"),
    (
        "as a plain BERT (of a model without attention bias)",
        "camtl convert runs/glue4 --single_task mrpc --to bert --output_dir models/mrpc",
    ),
    (
        "a released checkpoint to a folder for camtl predict and eval",
        "camtl convert --from_reference pytorch_model.bin --variant base --config config.json \\\n"
        "      --tasks cola,mrpc,rte --tokenizer bert-base-cased --output_dir models/released",
    ),
    ("and back", "camtl convert --to_reference models/released --output pytorch_model.bin"),
)
# Where training scripts put the state dict inside what they saved.
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def run(argv: Sequence[str]) -> int:
    """Run ``camtl convert``."""
    parser = CommandParser(
        "convert",
        _DESCRIPTION,
        _EXAMPLES,
        "RUN [--single_task NAME [--to bert]] [--adapter_only] --output_dir DIR\n"
        "       camtl convert --from_reference FILE --variant NAME --tasks a,b,c --output_dir DIR\n"
        "       camtl convert --to_reference RUN --output FILE",
    )
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="folder of a trained model (--output_dir of camtl train)"
    )
    parser.add_argument(
        "--output_dir", metavar="DIR", help="folder to write (of a RUN: a new or an empty one)"
    )
    other = parser.add_argument_group("what to make of RUN (default, of a small folder: a whole model)")
    add_flag(other, "adapter_only", "write only what differs from the encoder that training started from")
    other.add_argument(
        "--base_model",
        metavar="NAME",
        help="that encoder, a folder or hub name (default: as RUN names it)",
    )
    other.add_argument("--single_task", metavar="NAME", help="leave all other tasks out")
    other.add_argument(
        "--to",
        metavar="bert",
        choices=("bert",),
        help="with --single_task: fold the task's conditioning into a plain BertForSequenceClassification, "
        "for switches of which BERT has a counterpart (no attention bias, no bottleneck with a norm)",
    )
    inward = parser.add_argument_group("from the released code")
    inward.add_argument("--from_reference", metavar="FILE", help="checkpoint, .bin, .pt or .safetensors")
    inward.add_argument(
        "--variant",
        metavar="base|large|bert",
        choices=("base", "large", "bert"),
        help="which model it is (bert: without any conditioning)",
    )
    inward.add_argument(
        "--config",
        metavar="FILE",
        help="config.json of its BERT (default: sizes from the tensors, heads of 64)",
    )
    inward.add_argument(
        "--tasks",
        metavar="a,b,c",
        nargs="+",
        help="its tasks in the order of its decoders (default: task0, task1, ...)",
    )
    inward.add_argument("--tasks_file", metavar="FILE", help="YAML file that describes tasks of your own")
    inward.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="its tokenizer, a folder or hub name, saved beside the model for predict",
    )
    outward = parser.add_argument_group("to the released code's format")
    outward.add_argument("--to_reference", metavar="RUN", help="folder of a camtl model")
    outward.add_argument("--output", metavar="FILE", help="file to write, .bin, .pt or .safetensors")
    args = parser.parse(argv)
    given = [name for name in ("run", "from_reference", "to_reference") if getattr(args, name)]
    if len(given) != 1:
        parser.error("give RUN, --from_reference FILE or --to_reference RUN, and one of them only")
    needed = {
        "run": ("output_dir",),
        "from_reference": ("variant", "output_dir"),
        "to_reference": ("output",),
    }
    for name in needed[given[0]]:
        if getattr(args, name) is None:
            parser.error(f"missing --{name}")
    for name in ("adapter_only", "base_model", "single_task", "to"):
        if getattr(args, name) and given != ["run"]:
            parser.error(f"--{name} is for RUN, not for --{given[0]}")
    if args.run:
        from camtl.cli._convert_run import convert_run

        return convert_run(args)
    return _from_reference(args) if args.from_reference else _to_reference(args)


def _from_reference(args: argparse.Namespace) -> int:
    from camtl._io import read_json
    from camtl.cli._run_folder import TASKS_FILE, prepare_libraries

    config = read_json(args.config) if args.config else None
    if config is not None and not isinstance(config, Mapping):
        raise UsageError(f"{args.config}: holds no JSON object; give the config.json of a BERT")
    state = read_state(args.from_reference)
    prepare_libraries()
    from camtl.models import CaMtlForMultiTask
    from camtl.tasks import Task, dump_tasks_yaml

    tasks = _tasks(args)
    model = CaMtlForMultiTask.from_reference(state, variant=args.variant, config=config, tasks=tasks)
    output_dir = Path(args.output_dir)
    tokenizer = _tokenizer(args.tokenizer) if args.tokenizer else None
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        raise UsageError(
            f"--tokenizer {args.tokenizer}: knows {len(tokenizer):,} tokens, but the model has "
            f"{model.config.vocab_size:,}; "
            "give the tokenizer that the model was trained with"
        )
    model.save_pretrained(str(output_dir))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(output_dir))
    if all(isinstance(task, Task) for task in tasks or [None]):
        dump_tasks_yaml(tasks or [], output_dir / TASKS_FILE)
    counts = model.parameter_counts()
    print(
        f"wrote {output_dir}: {counts['total']:,} parameters, tasks {', '.join(model.config.tasks)}, "
        f"{model.config.max_seq_length} tokens"
    )
    if tokenizer is None:
        print(
            "note: there is no tokenizer in it; camtl predict and eval need one. "
            "Run this again with --tokenizer (for the released models: bert-base-cased or bert-large-cased)"
        )
    else:
        print(f'next: camtl predict {output_dir} --task {model.config.tasks[0]} --text "..."')
    return 0


def read_state(path: str) -> dict[str, Any]:
    """Read a state dict from a .safetensors file, or from a torch file with ``weights_only=True``.

    Raises:
        UsageError: no such file, not a checkpoint, or a pickle that holds more than tensors.
    """
    import torch

    if not Path(path).is_file():
        raise UsageError(f"--from_reference {path}: no such file")
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UsageError(f"{path}: not a safetensors file ({error})") from None
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # unpickling errors come in many kinds; every one means: not a file of tensors
        raise UsageError(
            f"{path}: is no file of tensors. Pickled objects are refused for safety; "
            "write the checkpoint with torch.save(model.state_dict(), FILE)"
        ) from None
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(hasattr(value, "shape") for value in content.values()):
        raise UsageError(f"{path}: holds no state dict (names to tensors)")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _tasks(args: argparse.Namespace) -> list[Any] | None:
    """Return task objects for known names, also in GLUE's spelling (sts-b), and bare names for others."""
    if not args.tasks:
        return None
    from camtl.tasks import get_task, list_tasks, load_tasks_yaml

    own = {task.name: task for task in load_tasks_yaml(args.tasks_file)} if args.tasks_file else {}
    builtin = list_tasks()
    found: list[Any] = []
    for name in [name.strip() for value in args.tasks for name in value.split(",") if name.strip()]:
        plain = name.lower().replace("-", "")
        found.append(own[name] if name in own else get_task(plain) if plain in builtin else name)
    return found


def _tokenizer(name: str) -> Any:
    from camtl.models.loading import load_tokenizer, resolve_encoder

    try:
        return load_tokenizer(resolve_encoder(name))
    except UsageError:
        raise UsageError(
            f"--tokenizer {name}: no tokenizer in a folder of that name, and none on a hub that answers"
        ) from None


def _to_reference(args: argparse.Namespace) -> int:
    if not args.output.endswith((".bin", ".pt", ".safetensors")):
        raise UsageError(f"--output {args.output}: the name must end in .bin, .pt or .safetensors")
    from camtl._io import atomic_write
    from camtl.cli._run_folder import load_trained, open_run, prepare_libraries

    folder = open_run(args.to_reference)
    prepare_libraries()
    import torch

    state = load_trained(folder).to_reference()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    if args.output.endswith(".safetensors"):
        from safetensors.torch import save

        content = save(tensors)
    else:
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        content = buffer.getvalue()
    atomic_write(args.output, content)
    print(
        f"wrote {args.output}: {len(tensors):,} tensors, {sum(t.numel() for t in tensors.values()):,} numbers"
    )
    return 0
