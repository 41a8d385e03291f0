"""One hypernetwork: all of a model's modulation tables, in one matrix product a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from camtl._tensors import without_autocast
from camtl.nn.bottleneck import ConditionalBottleneck
from camtl.nn.film import FiLMLinear


class _Snapshot:
    """What a parameter looked like when tables were made from it.

    The detached alias shares storage and version counter with the parameter and keeps the storage alive, so
    an equal address means the same memory, and an equal version means nobody wrote to it through the
    parameter.
    """

    __slots__ = ("alias", "version")

    def __init__(self, parameter: Tensor) -> None:
        self.alias = parameter.detach()
        self.version = parameter._version

    def matches(self, parameter: Tensor) -> bool:
        return (
            self.version == parameter._version
            and self.alias.data_ptr() == parameter.data_ptr()
            and self.alias.dtype == parameter.dtype
            and self.alias.device == parameter.device
            and self.alias.shape == parameter.shape
        )


class HyperNetwork(nn.Module):
    """Turns task embeddings into tables. It owns no parameters: the generators stay in the modules they
    serve.

    All generators that read ``z' = transformation(z)`` are concatenated and evaluated for all T tasks in one
    GEMM; the alignment, which reads ``z``, is one more; the bottlenecks' ``emb_transf`` and generators are
    two batched products.

    In eval mode under ``no_grad`` the tables are kept until a source parameter changes (in-place writes,
    loading, ``.to``, a new task) or training mode is entered. Writes through ``parameter.data`` are
    the one change that PyTorch does not count: call :meth:`clear_cache` after those. Nothing is kept under
    ``torch.compile``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cache: tuple[list[_Snapshot], Any, dict[str, Tensor]] | None = None

    def clear_cache(self) -> None:
        """Forget the kept tables."""
        self._cache = None

    def train(self, mode: bool = True) -> HyperNetwork:
        """As ``nn.Module.train``; entering training mode drops the kept tables."""
        if mode:
            self.clear_cache()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.clear_cache()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.clear_cache()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def forward(
        self,
        z: Tensor,
        generators: Mapping[str, FiLMLinear],
        *,
        transformation: nn.Linear | None = None,
        alignment: FiLMLinear | None = None,
        bottlenecks: Sequence[ConditionalBottleneck] = (),
    ) -> dict[str, Tensor]:
        """All tables for the task embeddings ``z`` ``[T, C]``.

        Returns ``{name: [T, out]}`` for every generator, plus ``"alignment"`` ``[T, 2 * D]`` and
        ``"bottleneck.k"`` ``[T, 2 * D]``, in the weights' dtype (autocast does not apply: the product is tiny
        and feeds everything).
        """
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled():
            if not torch.compiler.is_compiling():
                self.clear_cache()
            return self._tables(z, generators, transformation, alignment, bottlenecks)
        sources: list[Tensor] = [z]
        for module in (transformation, alignment, *generators.values()):
            if module is not None:
                sources += [module.weight, module.bias]
        for bottleneck in bottlenecks:
            sources += list(bottleneck.emb_transf.parameters()) + list(
                bottleneck.hidden_modulation.parameters()
            )
        if any(s.is_meta or s.is_inference() or type(s) not in (Tensor, nn.Parameter) for s in sources):
            return self._tables(z, generators, transformation, alignment, bottlenecks)
        layout = (tuple(generators), len(bottlenecks))
        if self._cache is not None:
            snapshots, kept_layout, tables = self._cache
            if (
                kept_layout == layout
                and len(snapshots) == len(sources)
                and all(snapshot.matches(s) for snapshot, s in zip(snapshots, sources, strict=True))
            ):
                return tables
        # tensors made in inference mode may not meet autograd later, and what is kept may
        with torch.inference_mode(False), torch.no_grad():
            tables = self._tables(z, generators, transformation, alignment, bottlenecks)
            self._cache = ([_Snapshot(s) for s in sources], layout, tables)
        return tables

    def _tables(
        self,
        z: Tensor,
        generators: Mapping[str, FiLMLinear],
        transformation: nn.Linear | None,
        alignment: FiLMLinear | None,
        bottlenecks: Sequence[ConditionalBottleneck],
    ) -> dict[str, Tensor]:
        tables: dict[str, Tensor] = {}
        with without_autocast(z.device):
            if alignment is not None:
                tables["alignment"] = F.linear(z, alignment.weight, alignment.bias)
            if not generators and not bottlenecks:
                return tables
            condition = (
                z if transformation is None else F.linear(z, transformation.weight, transformation.bias)
            )
            if generators:
                weight = torch.cat([g.weight for g in generators.values()])
                bias = torch.cat([g.bias for g in generators.values()])
                rows = F.linear(condition, weight, bias)
                sizes = [g.out_features for g in generators.values()]
                tables.update(zip(generators, rows.split(sizes, dim=-1), strict=True))
            if bottlenecks:
                transformed = _batched_linear(condition, [b.emb_transf for b in bottlenecks])
                rows = _batched_linear(transformed, [b.hidden_modulation.gb_weights for b in bottlenecks])
                tables.update({f"bottleneck.{k}": row for k, row in enumerate(rows.unbind(0))})
        return tables


def _batched_linear(x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """``x`` ``[T, C]`` or ``[K, T, C]`` through K linear layers of one shape: ``[K, T, out]`` in one batched
    product.
    """
    weight = torch.stack([layer.weight for layer in layers])
    bias = torch.stack([layer.bias for layer in layers])
    if x.dim() == 2:
        x = x.expand(len(layers), *x.shape)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
