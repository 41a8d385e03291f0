"""Feature-wise linear modulation: ``y = (1 + gamma_t) * x + beta_t``, ``[gamma_t | beta_t] = G z_t + c``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from camtl import ops


class FiLMLinear(nn.Linear):
    """A generator: the linear map from a condition to a table row. Weight ``[out, C]``, bias ``[out]``.

    It is a class of its own, and a leaf, so that initialisers which dispatch on the module's class (Hugging
    Face's ``_init_weights`` among them) can tell generators from the encoder's ordinary linear layers.
    """


def row_per_sequence(z: Tensor, task_ids: Tensor | None) -> Tensor:
    """``task_ids`` as given; without them row b of the condition belongs to sequence b (``[0, 1, ...,
    B-1]``).
    """
    if task_ids is not None:
        return task_ids
    return torch.arange(z.shape[0], device=z.device)


def check_tables(module: str, gamma: Tensor | None, beta: Tensor | None) -> None:
    """Both tables or neither, else ValueError."""
    if (gamma is None) != (beta is None):
        given = "gamma" if beta is None else "beta"
        raise ValueError(f"{module} needs gamma and beta together, or neither; only {given} was given")


class FiLM(nn.Module):
    """Modulates every feature of ``x`` by a condition. Parameter: ``gb_weights`` (condition size C to 2 * D).

    ``layer_norm=True`` adds a plain LayerNorm (eps 1e-5) on the result; the models never use it.
    """

    def __init__(self, condition_size: int, feature_size: int, *, layer_norm: bool = False) -> None:
        super().__init__()
        self.feature_size = feature_size
        self.gb_weights = FiLMLinear(condition_size, 2 * feature_size)
        self.layer_norm = nn.LayerNorm(feature_size) if layer_norm else None

    def tables(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` ``[T, C]`` to ``(gamma [T, D], beta [T, D])``."""
        gamma, beta = self.gb_weights(z).chunk(2, dim=-1)
        return gamma, beta

    def forward(
        self,
        x: Tensor,
        z: Tensor | None = None,
        task_ids: Tensor | None = None,
        *,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Modulate ``x`` ``[B, S, D]`` (or packed ``[N, D]`` with ``cu_seqlens`` ``[B+1]``); same shape and
        dtype back.

        Give either the condition ``z`` ``[T, C]`` or ready tables ``gamma``, ``beta`` ``[T, D]``.
        ``task_ids`` ``[B]`` picks the row of each sequence; without it ``z`` must have one row per sequence.
        """
        check_tables("FiLM", gamma, beta)
        if gamma is None or beta is None:
            if z is None:
                raise ValueError(
                    "FiLM needs a condition z [T, C] or both tables gamma and beta [T, D]; none was given"
                )
            gamma, beta = self.tables(z)
        ids = row_per_sequence(gamma, task_ids)
        y = ops.film(x, gamma, beta, ids, cu_seqlens=cu_seqlens)
        return y if self.layer_norm is None else self.layer_norm(y)
