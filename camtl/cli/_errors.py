"""From an exception to the one line a person reads, and the exit code."""

from __future__ import annotations

import errno

from camtl.errors import CamtlError

FAILURE = 1
_DISK_FULL = ("no space left on device", "disk quota exceeded", "file write failed", "failed writing file")


class InterruptedRunError(CamtlError):
    """Ctrl-C, with what is left of the run and how to go on."""


def describe(error: BaseException, trains: bool = False) -> tuple[str, int]:
    """Return (one line, exit code) for anything a command can raise; ``trains`` if it writes checkpoints."""
    message = _one_line(str(error))
    if _is_disk_full(error):
        where = getattr(error, "filename", None)
        place = f" while writing {where}" if where else ""
        intact = " (files are renamed only when whole, so the last checkpoint is intact)" if trains else ""
        return f"the disk is full{place}; free some space and start again{intact}: {message}", FAILURE
    if isinstance(error, CamtlError):
        return message, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", FAILURE
    if type(error).__name__ == "ValidationError" and hasattr(error, "errors"):
        return _validation(error), FAILURE
    if (
        type(error).__name__ in {"OutOfMemoryError", "AcceleratorError"}
        and "out of memory" in message.lower()
    ):
        return (
            "the GPU is out of memory; lower --per_device_train_batch_size (and raise "
            "--gradient_accumulation_steps), lower --max_seq_length, or add --gradient_checkpointing: "
            f"{message}"
        ), FAILURE
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename}: no such file or folder", FAILURE
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror or message}", FAILURE
    if isinstance(error, (ValueError, OSError)):
        return message or type(error).__name__, FAILURE
    return f"unexpected {type(error).__name__}: {message} (add --debug for the traceback)", FAILURE


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return True
    # safetensors and torch.save wrap the system's error in classes of their own; only the text is left.
    text = str(error).lower()
    return not isinstance(error, CamtlError) and any(phrase in text for phrase in _DISK_FULL)


def _validation(error: BaseException) -> str:
    parts = []
    for item in error.errors():  # type: ignore[attr-defined]
        place = ".".join(str(step) for step in item.get("loc", ()))
        parts.append(f"{place}: {item['msg']}" if place else str(item["msg"]))
    return _one_line("; ".join(parts))


def _one_line(text: str) -> str:
    return " ".join(text.split())
