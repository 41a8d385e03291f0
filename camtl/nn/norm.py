"""Layer norms that take the whole sublayer end in one pass: ``CLN(dropout(x + x_bias) + residual)``."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from camtl import ops
from camtl.nn.film import FiLM, FiLMLinear, row_per_sequence


class NormTables(NamedTuple):
    """Tables of one conditional norm: ``gamma``, ``beta`` ``[T, D]`` on its weight, ``shift`` ``[T, D]`` on
    its bias.
    """

    gamma: Tensor
    beta: Tensor
    shift: Tensor | None = None


class FusedLayerNorm(nn.LayerNorm):
    """An ordinary layer norm with bias, dropout and residual in the same pass. Parameters: ``weight``,
    ``bias`` ``[D]``.
    """

    def __init__(self, size: int, eps: float = 1e-12) -> None:
        super().__init__(size, eps=eps)

    def forward(
        self,
        x: Tensor,
        *,
        x_bias: Tensor | None = None,
        residual: Tensor | None = None,
        dropout_p: float = 0.0,
        cu_seqlens: Tensor | None = None,
        tables: NormTables | None = None,
        task_ids: Tensor | None = None,
    ) -> Tensor:
        """``LN(dropout(x + x_bias) + residual)`` for ``x`` ``[B, S, D]`` or ``[N, D]``; shape and dtype of
        ``x`` back.

        ``residual`` may be float32 beside a 16-bit ``x``. ``cu_seqlens`` ``[B+1]`` of packed ``x``: rows
        behind the last sequence give 0. ``tables`` and ``task_ids`` turn it into a conditional norm
        (:class:`ConditionalLayerNorm` fills them).
        """
        gamma, beta, shift = tables if tables is not None else (None, None, None)
        return ops.conditional_layer_norm(
            x,
            self.weight,
            self.bias,
            gamma,
            beta,
            task_ids if tables is not None else None,
            bias_shift=shift,
            x_bias=x_bias,
            residual=residual,
            dropout_p=dropout_p,
            eps=self.eps,
            cu_seqlens=cu_seqlens,
        )


class ConditionalLayerNorm(FusedLayerNorm):
    """``LN(x) * ((1 + gamma_t) * weight + beta_t) + bias`` (the paper's conditional layer norm, CLN).

    Parameters: ``weight``, ``bias`` ``[D]`` and the generator ``ln_weight_modulation.gb_weights`` (C to 2 *
    D). ``shift_bias=True`` modulates the bias too (``+ shift_t``, the form of the paper's text), with one
    more generator ``ln_bias_modulation`` (C to D).
    """

    def __init__(
        self, size: int, condition_size: int | None = None, *, eps: float = 1e-12, shift_bias: bool = False
    ) -> None:
        super().__init__(size, eps=eps)
        condition_size = size if condition_size is None else condition_size
        self.ln_weight_modulation = FiLM(condition_size, size)
        self.ln_bias_modulation = FiLMLinear(condition_size, size) if shift_bias else None

    def generators(self) -> dict[str, FiLMLinear]:
        """The generators that a hypernetwork evaluates for this norm, by short name."""
        found = {"weight": self.ln_weight_modulation.gb_weights}
        if self.ln_bias_modulation is not None:
            found["shift"] = self.ln_bias_modulation
        return found

    def tables(self, z: Tensor) -> NormTables:
        """``z`` ``[T, C]`` to this norm's tables ``[T, D]``."""
        gamma, beta = self.ln_weight_modulation.tables(z)
        return NormTables(
            gamma, beta, None if self.ln_bias_modulation is None else self.ln_bias_modulation(z)
        )

    def forward(
        self,
        x: Tensor,
        z: Tensor | None = None,
        task_ids: Tensor | None = None,
        *,
        tables: NormTables | None = None,
        x_bias: Tensor | None = None,
        residual: Tensor | None = None,
        dropout_p: float = 0.0,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """``CLN(dropout(x + x_bias) + residual)``, see the class.

        Give the condition ``z`` ``[T, C]`` or ready ``tables``; ``task_ids`` ``[B]`` picks the row of each
        sequence (each row of a 2-D ``x`` without ``cu_seqlens``); without it ``z`` must have one row per
        sequence.
        """
        if tables is None:
            if z is None:
                raise ValueError("ConditionalLayerNorm needs a condition z [T, C] or tables; none was given")
            tables = self.tables(z)
        return super().forward(
            x,
            x_bias=x_bias,
            residual=residual,
            dropout_p=dropout_p,
            cu_seqlens=cu_seqlens,
            tables=tables,
            task_ids=row_per_sequence(tables.gamma, task_ids),
        )
