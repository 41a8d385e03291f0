"""What of a model is fused, and why the rest is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from camtl.fusing._attention import NAME
from camtl.fusing._family import LAYER_NORM, Family, Swap, family_of, is_fused, original_class
from camtl.fusing._modules import FusedLayerNorm, is_plain_linear
from camtl.fusing._packing import PackedEncoder, attention_config
from camtl.fusing._state import Options, mark_of

KINDS = ("attention", "layer_norm", "gelu", "packed")
NOT_FUSED = "not fused: camtl.fuse(model) does it"


@dataclass(frozen=True)
class Row:
    """One module that can be fused.

    Args:
        module: its name in the model.
        kind: ``attention``, ``layer_norm``, ``gelu`` or ``packed``.
        replaced: whether it is fused.
        detail: what runs in its place, or why it is as it was.
    """

    module: str
    kind: str
    replaced: bool
    detail: str


@dataclass(frozen=True)
class FuseReport:
    """All rows of a model; ``str()`` of it is a table, in which like modules of all layers share a line."""

    rows: tuple[Row, ...]

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """By kind: how many modules are replaced, of how many."""
        found = {}
        for kind in KINDS:
            done = [row.replaced for row in self.rows if row.kind == kind]
            found[kind] = (sum(done), len(done))
        return found

    def lines(self) -> list[tuple[str, str, str, str]]:
        """The table: module, kind, yes or no, detail."""
        found: dict[tuple[str, str, bool, str], list[str]] = {}
        for row in self.rows:
            pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", row.module)
            found.setdefault((pattern, row.kind, row.replaced, row.detail), []).append(row.module)
        return [
            (f"{pattern} ({len(like)})" if len(like) > 1 else like[0], kind, "yes" if done else "no", detail)
            for (pattern, kind, done, detail), like in found.items()
        ]

    def __str__(self) -> str:
        table = [("module", "kind", "fused", "how, or why not"), *self.lines()]
        widths = [max(len(line[i]) for line in table) for i in range(3)]
        text = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[3]])  # noqa: B905
            for line in table
        ]
        text.insert(1, "  ".join("-" * width for width in (*widths, len(table[0][3]))))
        totals = ", ".join(f"{kind} {done} of {of}" for kind, (done, of) in self.counts.items())
        return "\n".join([*text, "", f"fused: {totals}"])


@dataclass(frozen=True)
class Candidate:
    """A module that can be fused, or why it cannot."""

    name: str
    module: nn.Module
    kind: str
    reason: str  # why it cannot; "": it can
    swap: Swap | None  # None: its attention, by its config


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every module of ``model`` that one of the switches is about, in the order of the model."""
    covered: set[int] = set()  # norms that the module around them computes
    span_loss: set[int] = set()  # encoders of models whose loss reads padding
    known = False
    for name, module in model.named_modules():
        kind = original_class(module)
        family = family_of(kind)
        if family is None:
            continue
        known = True
        if isinstance(module, family.reads_padding):
            span_loss |= {id(child) for child in module.modules()}
        attention: tuple[type[nn.Module], ...] = (*family.self_attention, *family.cross_attention)
        if isinstance(module, attention):
            yield Candidate(name, module, "attention", _attention_reason(module, kind, family), None)
        for base, swap in family.swaps.items():
            if not isinstance(module, base):
                continue
            reason = "" if kind is base else f"{kind.__name__} is not {base.__name__} itself"
            reason = reason or _own_forward(module) or swap.reason(module)
            if swap.kind == "packed":
                reason = reason or _packing_reason(module, id(module) in span_loss)
            if not reason:
                covered |= {id(getattr(module, norm)) for norm in swap.norms}
            yield Candidate(name, module, swap.kind, reason, swap)
    if not known:
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and id(module) not in covered and _ours(model, name):
            reason = _own_forward(module) or LAYER_NORM.reason(module)
            yield Candidate(name, module, "layer_norm", reason, LAYER_NORM)


def _ours(model: nn.Module, name: str) -> bool:
    """Whether the module of that name is in a model, or part of one, of a family that we know."""
    parts = name.split(".")
    return any(
        family_of(original_class(model.get_submodule(".".join(parts[:k])))) is not None
        for k in range(len(parts))
    )


def _own_forward(module: nn.Module) -> str:
    return "its forward was replaced on the instance" if "forward" in module.__dict__ else ""


def _attention_reason(module: nn.Module, kind: type[nn.Module], family: Family) -> str:
    if isinstance(module, family.cross_attention):
        return "cross-attention"
    if not any(kind.forward is base.forward for base in family.self_attention):
        return f"{kind.__name__} has a forward of its own"
    config = module.__dict__["config"]
    return "decoder mode: attention is causal" if getattr(config, "is_decoder", False) else ""


def _packing_reason(encoder: nn.Module, reads_padding: bool) -> str:
    config = attention_config(encoder)
    if config is None:
        return "it has no attention"
    if getattr(config, "is_decoder", False):
        return "decoder mode"
    if reads_padding:
        return "the loss of a span head reads padding; fuse its base model alone to pack it all the same"
    return ""


def is_replaced(candidate: Candidate) -> bool:
    """Whether the module is fused now."""
    if candidate.swap is None:
        return not candidate.reason and _attention_name(candidate.module) == NAME
    return is_fused(type(candidate.module)) and (
        not isinstance(candidate.module, PackedEncoder) or _attention_name(candidate.module) == NAME
    )


def _attention_name(module: nn.Module) -> str | None:
    found: str | None = getattr(attention_config(module), "_attn_implementation", None)
    return found


def report(model: nn.Module) -> FuseReport:
    """The report of a model as it is now."""
    options: Options | None = None
    for module in model.modules():
        mark = mark_of(module)
        if mark is not None:
            options = mark.fusion.options
            break
    rows = []
    for c in candidates(model):
        done = is_replaced(c)
        if done:
            detail = _what(c)
        elif c.reason:
            detail = c.reason
        elif options is None:
            detail = NOT_FUSED
        elif not getattr(options, c.kind):
            detail = f"switched off ({c.kind}=False)"
        elif c.swap is None or c.kind == "packed":
            detail = f"its config now names the attention {_attention_name(c.module)!r}"
        else:
            detail = "it came after camtl.fuse: call it again"
        rows.append(Row(c.name, c.kind, done, detail))
    return FuseReport(tuple(rows))


def _what(candidate: Candidate) -> str:
    module, swap = candidate.module, candidate.swap
    if swap is None:
        return "softmax(q k^T) v in one pass"
    if isinstance(module, FusedLayerNorm):
        return swap.what
    dense = getattr(module, "dense", None)
    if isinstance(dense, nn.Module) and not is_plain_linear(dense):
        kind = type(dense).__name__
        if candidate.kind == "gelu":
            return f"as unfused: its dense layer is a {kind} (or has hooks)"
        return f"{swap.what}, but for the bias: its dense layer is a {kind} (or has hooks)"
    return swap.what
