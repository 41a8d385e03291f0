"""The models of a case: one for all contenders that train the same parameters, as long as one is in use."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import nn

from camtl.benchmarks.model._setup import Setup
from camtl.benchmarks.model._ways import Way


class Models:
    """Makes models and optimizers, and gives those that are in use to whoever needs the same.

    On a CPU all contenders are timed in turns, and ten models of their own would not fit. A model that nobody
    holds any more is forgotten.
    """

    def __init__(self, setup: Setup, device: str) -> None:
        self.setup, self.device = setup, device
        self._there: weakref.WeakValueDictionary[tuple[object, ...], nn.Module] = (
            weakref.WeakValueDictionary()
        )
        self._optimizers: weakref.WeakKeyDictionary[nn.Module, torch.optim.Optimizer] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, way: Way, ready: Callable[[nn.Module], nn.Module] = nn.Module.train) -> nn.Module:
        """The model of a way; ``ready`` takes a new one to the mode and the dtype of the case."""
        own = (way.attention, way.freeze) if way.family == "bert" else (way.form == "inside",)
        model = self._there.get((way.family, *own))
        if model is None:
            model = ready(way.build(self.setup, self.device))
            self._there[(way.family, *own)] = model
        return model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Fused AdamW over what is trained of a model; on a GPU it can be captured in a graph."""
        found = self._optimizers.get(model)
        if found is None:
            trained = [p for p in model.parameters() if p.requires_grad]
            found = torch.optim.AdamW(trained, lr=1e-5, fused=True, capturable=self.device == "cuda")
            self._optimizers[model] = found
        return found
