"""Which rows of which tasks make the next batch: one interface, several answers.

``SAMPLERS`` maps the names to classes. :func:`get_sampler` also takes a class of your own or a function
``(sizes, epoch) -> weights``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

from camtl.data.samplers.adaptive import CHUNK, LossSampler, SequentialTaskStreams, UncertaintySampler
from camtl.data.samplers.base import MultiTaskBatchSampler, reference_epoch_batches
from camtl.data.samplers.streams import TaskStream
from camtl.data.samplers.weighted import (
    AnnealedSampler,
    CallableSampler,
    ProportionalSampler,
    RoundRobinSampler,
    SqrtSampler,
    TemperatureSampler,
    UniformSampler,
    WeightedSampler,
)
from camtl.errors import UsageError

SAMPLERS: dict[str, type[MultiTaskBatchSampler]] = {
    "proportional": ProportionalSampler,
    "sqrt": SqrtSampler,
    "temperature": TemperatureSampler,
    "annealed": AnnealedSampler,
    "uniform": UniformSampler,
    "round_robin": RoundRobinSampler,
    "loss": LossSampler,
    "uncertainty": UncertaintySampler,
}

#: Options that every sampler takes.
_COMMON = ("num_epochs", "epoch", "percent_of_max_data_size", "uniform_mt_sampling")
_WHOLE_NUMBERS = ("size_cap", "candidates_per_task")


def get_sampler(
    sampler: str | type[MultiTaskBatchSampler] | Callable[[list[int], int], Sequence[float]],
) -> Callable[..., MultiTaskBatchSampler]:
    """What makes a sampler when called with ``(dataset_sizes, batch_size, seed, **options)``.

    ``sampler`` is a name, a subclass of :class:`MultiTaskBatchSampler`, or a function that gives the task
    weights.
    """
    if isinstance(sampler, type):
        if issubclass(sampler, MultiTaskBatchSampler):
            return sampler
        raise UsageError(f"sampler class {sampler.__name__} must derive from MultiTaskBatchSampler")
    if callable(sampler):
        return partial(CallableSampler, function=sampler)
    if sampler not in SAMPLERS:
        close = get_close_matches(str(sampler), SAMPLERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise UsageError(f"unknown sampler {sampler!r}{hint} Known samplers: {', '.join(SAMPLERS)}")
    return SAMPLERS[sampler]


def make_sampler(
    sampler: str | type[MultiTaskBatchSampler] | Callable[[list[int], int], Sequence[float]],
    dataset_sizes: Sequence[int],
    batch_size: int,
    seed: int = 0,
    **options: Any,
) -> MultiTaskBatchSampler:
    """Make a sampler. Options that are None are dropped.

    Raises :class:`UsageError` for an option of another sampler or of none, and for one that is no number.
    """
    make = get_sampler(sampler)
    known: tuple[str, ...] = getattr(make, "options", ())
    specific = {name for cls in SAMPLERS.values() for name in cls.options}
    kept = {name: value for name, value in options.items() if value is not None}
    wrong = sorted(name for name in kept if name in specific and name not in known and name != "function")
    if wrong:
        owners = ", ".join(n for n, c in SAMPLERS.items() if any(name in c.options for name in wrong))
        raise UsageError(f"the option {', '.join(wrong)} is not for sampler {sampler!r} but for {owners}")
    if isinstance(sampler, str):
        unknown = [name for name in kept if name not in known and name not in _COMMON]
        if unknown:
            raise UsageError(
                f"sampler {sampler!r} has no option {', '.join(map(repr, unknown))}; "
                f"its options: {', '.join(known) or 'none'}"
            )
    for name in (name for name in kept if name in known and name in specific and name != "function"):
        whole, value = name in _WHOLE_NUMBERS, kept[name]
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            kind = "a whole number" if whole else "a number"
            raise UsageError(f"sampler option {name} is {value!r}; it must be {kind}")
    return make(dataset_sizes, batch_size, seed, **kept)


__all__ = [
    "CHUNK",
    "SAMPLERS",
    "AnnealedSampler",
    "CallableSampler",
    "LossSampler",
    "MultiTaskBatchSampler",
    "ProportionalSampler",
    "RoundRobinSampler",
    "SequentialTaskStreams",
    "SqrtSampler",
    "TaskStream",
    "TemperatureSampler",
    "UncertaintySampler",
    "UniformSampler",
    "WeightedSampler",
    "get_sampler",
    "make_sampler",
    "reference_epoch_batches",
]
