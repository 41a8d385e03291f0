"""The conditional bottleneck (adapter): ``Up(act(Down(FiLM(x; transf(z')))))``, D to D // 3 to D."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from camtl import ops
from camtl.nn.film import FiLM, row_per_sequence


class UpProjection(nn.Linear):
    """The bottleneck's last map; a class of its own so that an initialiser can start it at zero."""


class ConditionalBottleneck(nn.Module):
    """Parameters: ``emb_transf`` (C to C), ``hidden_modulation.gb_weights``, ``down_proj_layer``,
    ``up_proj_layer``.

    The preset form has no activation, residual, norm or dropout inside.
    """

    def __init__(
        self,
        hidden_size: int,
        condition_size: int | None = None,
        *,
        inner_size: int | None = None,
        activation: Literal["none", "gelu"] = "none",
    ) -> None:
        super().__init__()
        condition_size = hidden_size if condition_size is None else condition_size
        inner_size = max(1, hidden_size // 3) if inner_size is None else inner_size
        self.activation = activation
        self.emb_transf = nn.Linear(condition_size, condition_size)
        self.hidden_modulation = FiLM(condition_size, hidden_size)
        self.down_proj_layer = nn.Linear(hidden_size, inner_size)
        self.up_proj_layer = UpProjection(inner_size, hidden_size)

    def tables(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` ``[T, C]`` to ``(gamma [T, D], beta [T, D])``."""
        return self.hidden_modulation.tables(self.emb_transf(z))

    def forward(
        self,
        x: Tensor,
        z: Tensor | None = None,
        task_ids: Tensor | None = None,
        *,
        generated: Tensor | None = None,
        residual: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """``x`` ``[B, S, D]`` or packed ``[N, D]``; same shape and dtype back, plus ``residual`` if given.

        Give the condition ``z`` ``[T, C]`` or the generator's output ``generated`` ``[T, 2 * D]``.
        """
        if generated is None:
            if z is None:
                raise ValueError(
                    "ConditionalBottleneck needs a condition z [T, C] or generated rows; none was given"
                )
            generated = self.hidden_modulation.gb_weights(self.emb_transf(z))
        gamma, beta = generated.chunk(2, dim=-1)
        return ops.conditional_bottleneck(
            x,
            gamma,
            beta,
            self.down_proj_layer.weight,
            self.down_proj_layer.bias,
            self.up_proj_layer.weight,
            self.up_proj_layer.bias,
            row_per_sequence(generated, task_ids),
            activation=self.activation,
            residual=residual,
            cu_seqlens=cu_seqlens,
        )
