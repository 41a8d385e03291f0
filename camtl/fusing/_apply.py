"""The functions: fuse, unfuse, report, and fusing whatever is made later."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from camtl.errors import UsageError
from camtl.fusing._attention import NAME
from camtl.fusing._family import family_of, is_fused, names, original_class
from camtl.fusing._report import Candidate, FuseReport, candidates, report
from camtl.fusing._state import Fusion, Mark, Options, SwappedConfig, drop_mark, put_mark

Model = TypeVar("Model", bound=nn.Module)

_NAMED = 4  # modules that one warning names


def fuse(
    model: Model,
    attention: bool = True,
    layer_norm: bool = True,
    gelu: bool = True,
    packed: bool = False,
    strict: bool = False,
) -> Model:
    """Let camtl's fused ops run inside a Hugging Face model, in place; :func:`unfuse` undoes it exactly.

    Parameters, state-dict keys, the model's class and what it returns stay; ``save_pretrained`` writes, and
    ``from_pretrained`` reads, a plain model. It can be copied, pickled, trained, compiled and wrapped (PEFT)
    as before. Outputs and gradients are those of the unfused model, but for rounding; dropout draws its masks
    from another generator, with the same probabilities. There are no second derivatives.

    Args:
        model: a model of BERT, RoBERTa, XLM-RoBERTa, ELECTRA or DistilBERT with any head, or a module that
            contains such models.
        attention: self-attention by ``camtl.ops.conditional_attention``, without a table.
        layer_norm: layer norms, with the bias, dropout and residual sum before them, by
            ``camtl.ops.conditional_layer_norm``.
        gelu: the bias and gelu of feed-forward layers by ``camtl.ops.bias_gelu``.
        packed: leave padding out between the encoder's first and last layer. Its output at padding is then 0
            (unfused: numbers that nothing should read). Needs ``attention``. It costs one read of the host a
            call. The padded form runs under compile, export and CUDA graph capture; where padding is on the
            left; where hidden states or attentions are asked for; in models for question answering, whose
            loss reads padding.
        strict: raise where something asked for cannot be fused, instead of warning and leaving it as it was;
            also later, when a call cannot be.

    Returns:
        ``model``. Fusing it again takes the new options.

    Raises:
        TypeError: ``model`` is no module, or contains no model of these families.
        UsageError: ``packed`` without ``attention``; under ``strict``, something that cannot be fused.
    """
    options = Options(attention, layer_norm, gelu, packed, strict)
    found = _candidates("fuse", model)
    if packed and not attention:
        raise UsageError("camtl.fuse: packed=True needs attention=True; got attention=False")
    wanted = [c for c in found if getattr(options, c.kind)]
    _tell([c for c in wanted if c.reason], strict)
    unfuse(model)
    fusion = Fusion(options)
    attentions: set[nn.Module] = set()
    for c in wanted:
        if c.reason:
            continue
        put_mark(c.module, Mark(c.name, fusion))
        if c.swap is not None:
            c.module.__class__ = c.swap.fused
        else:
            attentions.add(c.module)
    for config in _configs(model, attentions):
        _give(model, config, fusion.swap_config(config, NAME))
    return model


def unfuse(model: Model) -> Model:
    """Undo :func:`fuse`, in place: every class and the config are again those before it.

    What was set on the config in the meantime stays, but for the attention. An unfused model is left alone.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"camtl.unfuse: model must be a torch.nn.Module; got {type(model).__name__}")
    configs: dict[int, SwappedConfig] = {}
    for module in model.modules():
        mark = drop_mark(module)
        if mark is not None:
            configs.update((id(c.copy), c) for c in mark.fusion.configs)
        if is_fused(type(module)):
            module.__class__ = original_class(module)
    for swapped in configs.values():
        _give(model, swapped.copy, swapped.restored())
    return model


def fuse_report(model: nn.Module) -> FuseReport:
    """What of a model is fused now, and why the rest is not; ``print`` it, or read its ``rows``.

    Raises:
        TypeError: ``model`` is no module, or contains no model of the families that :func:`fuse` takes.
    """
    _candidates("fuse_report", model)
    return report(model)


def _configs(model: nn.Module, attentions: set[nn.Module]) -> list[Any]:
    """The configs that ``attentions`` read, and those by which the models around them make their masks.

    Mostly they are one object; an ``EncoderDecoderModel`` gives its two models configs of their own.
    """
    found: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is None or family_of(original_class(module)) is None:
            continue
        if any(child in attentions for child in module.modules()):
            found[id(config)] = config
    return list(found.values())


def _candidates(function: str, model: Any) -> list[Candidate]:
    accepted = f"a Hugging Face model (torch.nn.Module) of one of {names()}"
    if not isinstance(model, nn.Module):
        raise TypeError(f"camtl.{function}: model must be {accepted}; got {type(model).__name__}")
    found = list(candidates(model))
    if not found:
        raise TypeError(f"camtl.{function}: model must be {accepted}; got {type(model).__name__}")
    return found


def _tell(left_out: list[Candidate], strict: bool) -> None:
    """One warning per reason with the modules it holds for, or (strict) an error."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for c in left_out:
        reasons.setdefault((c.kind, c.reason), []).append(c.name or type(c.module).__name__)
    for (kind, reason), modules in reasons.items():
        more = f" and {len(modules) - _NAMED} more" if len(modules) > _NAMED else ""
        text = f"{kind} of {', '.join(modules[:_NAMED])}{more}: {reason}"
        if strict:
            raise UsageError(f"camtl.fuse(strict=True): {text}")
        warnings.warn(f"camtl.fuse: {text}; left as it was", RuntimeWarning, stacklevel=3)


def _give(model: nn.Module, old: Any, new: Any) -> None:
    """Every module of ``model`` that holds the config ``old`` gets ``new``."""
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = new


class Applied:
    """What :func:`apply_camtl_kernels_to_bert` did: ``remove()``, or the end of a ``with`` block, ends it."""

    def __init__(self, pretrained: type[nn.Module], options: dict[str, bool]) -> None:
        self._class = pretrained
        before: Callable[..., None] = pretrained.post_init  # type: ignore[attr-defined]

        @functools.wraps(before)
        def post_init(model: nn.Module) -> None:
            before(model)
            if self.active:
                fuse(model, **options)

        self.active = True
        self._own = pretrained.__dict__.get("post_init")
        self._patch = post_init
        pretrained.post_init = post_init  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Models made from now on are not fused; those made before stay as they are."""
        self.active = False
        if self._class.__dict__.get("post_init") is not self._patch:
            return  # another was applied since: it goes on, this one does nothing in it
        if self._own is None:
            del self._class.post_init  # type: ignore[attr-defined]
        else:
            self._class.post_init = self._own  # type: ignore[attr-defined]

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def apply_camtl_kernels_to_bert(
    *,
    attention: bool = True,
    layer_norm: bool = True,
    gelu: bool = True,
    packed: bool = False,
    strict: bool = False,
) -> Applied:
    """Fuse every BERT model that is made later, by its class or ``from_pretrained``, as :func:`fuse` does.

    Call it before the models are made; those that exist stay as they are.

    Returns:
        What ends it: ``.remove()``, or the end of a ``with`` block. Applied again, the last options count
        until it is removed.
    """
    from camtl.fusing.bert import FAMILY

    options = Options(attention, layer_norm, gelu, packed, strict)
    if packed and not attention:
        raise UsageError("camtl.apply_camtl_kernels_to_bert: packed=True needs attention=True")
    return Applied(FAMILY.pretrained, vars(options))
