"""``camtl fuse-check``: what camtl.fuse does in a model, whether it stays the same, and how much faster."""

from __future__ import annotations

import argparse
import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from camtl.cli._parser import CommandParser, add_flag, positive
from camtl.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from camtl.bench.fused import Deviation, Pace

_DESCRIPTION = """
Loads the encoder of a Hugging Face model, fuses a copy of it by camtl.fuse, prints which of its modules run
on camtl's ops and why others do not, compares outputs and gradients of both with the model in float64, and
times both on this machine. The exit code is 1 where the fused model is not equal.
"""
_DTYPES = ("float32", "bfloat16", "float16")
_LENGTHS = "8,16,24,32,48,64,96,128"
_BATCHES = 4  # of texts from a file, at most
_SHOWN = 3  # gradients


def run(argv: Sequence[str]) -> int:
    """Run ``camtl fuse-check``."""
    parser = CommandParser(
        "fuse-check",
        _DESCRIPTION,
        (
            ("the packaged encoder, padding left out", "camtl fuse-check minilm --packed"),
            ("your texts, as they are batched", "camtl fuse-check DIR --text_file texts.txt --batch_size 32"),
            (
                "on a GPU, in bfloat16, all rows of one length",
                "camtl fuse-check bert-base-uncased --device cuda --dtype bfloat16 --lengths 128",
            ),
        ),
        "MODEL_OR_DIR [options]",
    )
    parser.add_argument("model", metavar="MODEL_OR_DIR", help="a model folder, a hub id, or minilm")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the model's parameters")
    parser.add_argument("--batch_size", type=positive, metavar="N", default=8, help="rows in a batch")
    parser.add_argument(
        "--lengths",
        metavar="a,b,c",
        help="tokens in the rows of random ids, in turn; a batch is padded to its longest "
        f"(default: {_LENGTHS}, as far as the model has positions)",
    )
    parser.add_argument(
        "--text_file", metavar="FILE", help=f"instead: a text a line, the first {_BATCHES} batches of them"
    )
    add_flag(parser, "packed", "leave padding out inside the encoder")
    parser.add_argument(
        "--seconds", type=_seconds, metavar="N", default=3.0, help="for each timing; 0: no timing"
    )
    args = parser.parse(argv)
    if args.text_file and args.lengths:
        raise UsageError("--lengths and --text_file: give one of them; the texts have lengths of their own")
    return _check(args)


def _seconds(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of seconds, 0 or more")
    return number


def _check(args: argparse.Namespace) -> int:
    import torch

    from camtl.bench.fused import deviations, paces
    from camtl.fusing import fuse, fuse_report

    device = _device(args.device)
    model, folder = _load(args.model, getattr(torch, args.dtype))
    batches = _batches(args, model, folder)
    model = model.to(device).eval()
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the report says it
        fused = fuse(copy.deepcopy(model), packed=args.packed)
        report = fuse_report(fused)
        _print_head(args, model, device, batches)
        print(report)
        print()
        found = deviations(model, fused, batches)
        equal = _print_deviations(found)
        if equal and args.seconds:
            print()
            _print_paces(paces(model, fused, batches, args.seconds), torch.get_num_threads(), device)
    return 0 if equal else 1


def _device(given: str | None) -> str:
    import torch

    there = torch.cuda.is_available()
    if given == "cuda" and not there:
        raise UsageError(f"--device cuda: there is no CUDA device here (torch {torch.__version__})")
    return given or ("cuda" if there else "cpu")


def _load(name: str, dtype: Any) -> tuple[Any, str]:
    """The encoder, and the folder or hub id that it came from."""
    from camtl.fusing import accepted_model_types
    from camtl.models.loading import read_encoder_config, resolve_encoder

    source = resolve_encoder(name)
    kind = read_encoder_config(source).get("model_type")
    accepted = accepted_model_types()
    if kind == "ca-mtl":
        raise UsageError(f"{name}: is a camtl model, which runs on the fused ops as it is")
    if kind not in accepted:
        raise UsageError(f"{name}: model_type is {kind!r}; accepted: {', '.join(accepted)}")
    from safetensors import SafetensorError
    from transformers import AutoModel

    with _quiet():
        try:
            model, found = AutoModel.from_pretrained(
                source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except (OSError, SafetensorError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(f"{name}: no weights could be read ({first})") from error
    if found["mismatched_keys"]:
        key, there, wanted = sorted(found["mismatched_keys"])[0]
        raise UsageError(
            f"{name}: the weights do not fit config.json, for instance {key} is {list(there)} instead of "
            f"{list(wanted)} ({len(found['mismatched_keys'])} in all)"
        )
    return model, source


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Hugging Face's report of heads that are left out, and its bars."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _batches(args: argparse.Namespace, model: Any, folder: str) -> list[dict[str, Tensor]]:
    config = model.config
    # RoBERTa's positions start behind that of padding
    offset = (config.pad_token_id or 0) + 1 if config.model_type in ("roberta", "xlm-roberta") else 0
    limit = config.max_position_embeddings - offset
    if args.text_file:
        return _texts(args, folder, limit)
    return [_random(args, config, limit)]


def _texts(args: argparse.Namespace, folder: str, limit: int) -> list[dict[str, Tensor]]:
    from camtl.models.loading import load_tokenizer

    with open(args.text_file, encoding="utf-8") as file:
        try:
            texts = [line.strip() for line in file if line.strip()]
        except UnicodeDecodeError as error:
            raise UsageError(f"--text_file {args.text_file}: is not UTF-8 text ({error.reason})") from None
    if not texts:
        raise UsageError(f"--text_file {args.text_file}: has no texts")
    tokenizer = load_tokenizer(folder)
    starts = range(0, min(len(texts), _BATCHES * args.batch_size), args.batch_size)
    groups = [texts[start : start + args.batch_size] for start in starts]
    options = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
    return [dict(tokenizer(group, **options)) for group in groups]


def _random(args: argparse.Namespace, config: Any, limit: int) -> dict[str, Tensor]:
    import torch

    lengths = _lengths(args.lengths, limit)
    lengths = [lengths[row % len(lengths)] for row in range(args.batch_size)]
    generator = torch.Generator().manual_seed(0)
    pad = config.pad_token_id or 0
    low = 2 if config.vocab_size > 4 else 0
    ids = torch.randint(low, config.vocab_size, (len(lengths), max(lengths)), generator=generator)
    ids = torch.where(ids == pad, (pad + 1) % config.vocab_size, ids)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.where(mask > 0, ids, pad), "attention_mask": mask}


def _lengths(given: str | None, limit: int) -> list[int]:
    if given is None:
        return [int(part) for part in _LENGTHS.split(",") if int(part) <= limit] or [limit]
    try:
        lengths = [int(part) for part in given.split(",") if part.strip()]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1 or max(lengths) > limit:
        raise UsageError(
            f"--lengths {given!r}: must be whole numbers from 1 to {limit}, the model's positions"
        )
    return lengths


# -- printing


def _print_head(args: argparse.Namespace, model: Any, device: str, batches: list[dict[str, Tensor]]) -> None:
    kind, parameters = model.config.model_type, sum(p.numel() for p in model.parameters())
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    every = sum(batch["attention_mask"].numel() for batch in batches)
    rows, longest = len(batches[0]["input_ids"]), max(b["input_ids"].shape[1] for b in batches)
    print(f"model    {args.model}: {kind}, {parameters / 1e6:.2f}M parameters, {args.dtype} on {device}")
    plural = "es" if len(batches) > 1 else ""
    print(
        f"input    {len(batches)} batch{plural} of {rows} rows, up to {longest} tokens, "
        f"{100 * real / every:.0f} % real\n"
    )


def _print_deviations(found: list[Deviation]) -> bool:
    """The outputs, the worst gradients and all that break the rule; whether none does."""
    from camtl.reports.tables import print_table

    outputs = [d for d in found if not d.result.startswith("gradient of ")]
    gradients = [d for d in found if d.result.startswith("gradient of ")]
    gradients.sort(key=lambda d: d.fused / d.allowed if d.allowed else d.fused, reverse=True)
    wrong = [d for d in found if not d.ok]
    shown = [*outputs, *gradients[:_SHOWN]]
    shown += [d for d in wrong if d not in shown]
    rows = [
        [d.result, f"{d.fused:.2e}", f"{d.unfused:.2e}", f"{d.allowed:.2e}", "yes" if d.ok else "NO"]
        for d in shown
    ]
    print_table(["error against float64", "fused", "unfused", "allowed", "equal"], rows, right=(1, 2, 3))
    print()
    if wrong:
        print(f"not equal: {len(wrong)} of {len(found)} results")
    else:
        print(
            f"equal: all {len(found)} results (of the gradients, those nearest to what is allowed are shown)"
        )
    return not wrong


def _print_paces(found: list[Pace], threads: int, device: str) -> None:
    from camtl.reports.tables import print_table

    rows = [[p.step, f"{p.before_ms:.2f}", f"{p.after_ms:.2f}", f"{p.ratio:.2f}x"] for p in found]
    print_table(["ms per batch", "before", "after", "before/after"], rows, right=(1, 2, 3))
    if device == "cpu":
        print(f"\nmedians of rounds in turns, {threads} thread{'s' if threads > 1 else ''}")
