"""What fusing leaves on a model beside the changed classes, and how a module says that it falls back."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from camtl.errors import UsageError

_ATTRIBUTE = "_camtl"  # on every module that was touched; plain Python, so no state dict has it


@dataclass(frozen=True)
class Options:
    """The switches of :func:`camtl.fuse`."""

    attention: bool = True
    layer_norm: bool = True
    gelu: bool = True
    packed: bool = False
    strict: bool = False


@dataclass
class SwappedConfig:
    """A model's own config and the copy that it reads while its attention is fused.

    Models made from one config object share it. With a copy, fusing one of them leaves the others alone.
    """

    original: Any
    copy: Any
    values: dict[str, Any]  # of the copy when it was made

    def restored(self) -> Any:
        """The original, with what was set on the copy in the meantime, but for the attention."""
        for name, value in vars(self.copy).items():
            if name != "_attn_implementation_internal" and value is not self.values.get(name, self):
                vars(self.original)[name] = value
        return self.original


@dataclass
class Fusion:
    """One call of :func:`camtl.fuse`: shared by all modules that it touched, copied and pickled with them."""

    options: Options
    configs: list[SwappedConfig] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)

    def swap_config(self, config: Any, attention: str) -> Any:
        """A copy of ``config`` that names ``attention``."""
        own = copy.copy(config)
        own._attn_implementation_internal = attention
        self.configs.append(SwappedConfig(config, own, dict(vars(own))))
        return own


@dataclass
class Mark:
    """What a touched module knows: its name in the model that was fused, and the call."""

    name: str
    fusion: Fusion


def put_mark(module: nn.Module, mark: Mark) -> None:
    """Remember ``mark`` on ``module``."""
    setattr(module, _ATTRIBUTE, mark)


def mark_of(module: nn.Module) -> Mark | None:
    """The mark of ``module``; None if it was not touched."""
    found: Mark | None = module.__dict__.get(_ATTRIBUTE)
    return found


def drop_mark(module: nn.Module) -> Mark | None:
    """Remove the mark of ``module`` and return it."""
    found: Mark | None = module.__dict__.pop(_ATTRIBUTE, None)
    return found


def fall_back(module: nn.Module, reason: str, instead: str = "computed unfused") -> None:
    """``module`` cannot compute a call as asked for: one warning per model and reason; strict: an error.

    ``reason`` must not depend on the batch, or every batch would warn. Raises UsageError under ``strict``.
    """
    mark = mark_of(module)
    name = type(module).__name__ if mark is None else mark.name or type(module).__name__
    if mark is not None and mark.fusion.options.strict:
        raise UsageError(f"camtl.fuse(strict=True): {name}: {reason}")
    if torch.compiler.is_compiling():
        return
    warned = module.__dict__.setdefault("_camtl_warned", set()) if mark is None else mark.fusion.warned
    if reason not in warned:
        warned.add(reason)
        warnings.warn(f"camtl.fuse: {name}: {reason}; {instead}", RuntimeWarning, stacklevel=3)
