"""Learning rates and weight decay of a model's three parts: encoder, conditional parameters, heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import torch

    from camtl.training.arguments import CaMtlTrainingArguments

ENCODER, CONDITIONAL, HEAD = "encoder", "conditional", "head"
_PARTS = (ENCODER, CONDITIONAL, HEAD)


def parameter_parts(model: nn.Module) -> dict[int, str]:
    """Map ``id(parameter)`` to ``"encoder"``, ``"conditional"`` or ``"head"``, for every parameter.

    Conditional parameters are those of ``model.conditional_parameters()``; heads are all others outside the
    encoder, whose names start with the model's ``base_model_prefix``.
    """
    conditional = {id(parameter) for _, parameter in model.conditional_parameters()}  # type: ignore[operator]
    prefix = f"{getattr(model, 'base_model_prefix', 'bert')}."
    parts = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in conditional:
            parts[id(parameter)] = CONDITIONAL
        else:
            parts[id(parameter)] = ENCODER if name.startswith(prefix) else HEAD
    return parts


def decay_names(model: nn.Module) -> list[str]:
    """Names of the parameters under weight decay: all but those that ``no_weight_decay(name)`` exempts."""
    rule = model.no_weight_decay
    return [name for name, _ in model.named_parameters() if not rule(name)]  # type: ignore[operator]


def split_groups(optimizer: torch.optim.Optimizer, model: nn.Module, args: CaMtlTrainingArguments) -> None:
    """Split every group of a fresh ``optimizer`` by part and give each part its learning rate, in place.

    Works on the groups after construction, so that it serves every optimizer that Hugging Face can build.
    Empty groups are dropped. Each group carries its part's name under ``"part"``. The first group is the
    encoder's, unless all of it is frozen; the learning rate that Hugging Face logs is the first group's.
    """
    parts = parameter_parts(model)
    rates = {
        ENCODER: args.learning_rate,
        CONDITIONAL: args.learning_rate
        if args.conditional_learning_rate is None
        else args.conditional_learning_rate,
        HEAD: args.learning_rate if args.head_learning_rate is None else args.head_learning_rate,
    }
    groups: list[dict[str, Any]] = []
    for part in _PARTS:
        for group in optimizer.param_groups:
            parameters = [p for p in group["params"] if parts.get(id(p), ENCODER) == part]
            if parameters:
                groups.append({**group, "params": parameters, "lr": rates[part], "part": part})
    optimizer.param_groups[:] = groups


def learning_rates(optimizer: Any) -> dict[str, float]:
    """Return the current learning rate of each part that has parameters in ``optimizer``."""
    return {group["part"]: float(group["lr"]) for group in optimizer.param_groups if "part" in group}
