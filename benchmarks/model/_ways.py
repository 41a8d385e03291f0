"""Who takes part in model cases: our model on its backends, plain and released PyTorch, BERT."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from camtl import ops
from camtl.bench.case import Contender, Inputs, Step
from camtl.benchmarks._contenders import compiled, ours
from camtl.benchmarks.baselines import huggingface
from camtl.benchmarks.model._setup import TASKS, Setup, Tensors

CHECKED_ROWS = 8


@dataclass(frozen=True)
class Way:
    """A model, what its ops run on, the form of its batches, and whether it is compiled.

    Attributes:
        family: ``camtl``, ``released`` or ``bert``.
        backend: that our ops prefer.
        form: ``padded`` to the longest, ``packed``, or ``inside``: padded, and the model packs it itself.
        attention: of Hugging Face's BERT, ``sdpa`` or ``eager``.
        freeze: BERT's layers stay fixed where the setup says so.
    """

    name: str
    family: str = "camtl"
    backend: str | None = "reference"
    form: str = "padded"
    compiled: bool = False
    attention: str = "sdpa"
    freeze: bool = True
    absent: str = ""

    @property
    def kind(self) -> str:
        """For the record."""
        return "ours" if self.family == "camtl" and self.backend != "reference" else "baseline"

    @property
    def graph(self) -> bool:
        """Whether nothing waits for the host. Hugging Face looks at the mask where it is not compiled."""
        if self.family == "bert":
            return self.compiled
        return self.family == "camtl" and self.form != "inside"

    def inputs(self, setup: Setup, device: str) -> Tensors:
        """The batch that it takes."""
        if self.family == "bert":
            return setup.for_bert(device)
        if self.family == "released":
            return setup.padded(device, setup.S)
        return setup.packed(device) if self.form == "packed" else setup.padded(device)

    def build(self, setup: Setup, device: str, stirred: bool = False) -> nn.Module:
        """The model with the weights of seed 0, the same for ours and the released one; see :func:`stir`."""
        torch.manual_seed(0)
        with torch.device(device):  # drawing a large model's weights on a CPU takes longer than measuring it
            if self.family == "bert":
                return huggingface.bert(setup, self.attention, self.freeze)
            model = conditional(setup, packed=self.form == "inside")
            if stirred:
                stir(model)
            return released_form(setup, model) if self.family == "released" else model

    def prefers(self) -> contextlib.AbstractContextManager[Any]:
        """The backend, for the ops within; may be entered again and again, cheaper than a new one."""
        if self.backend is None:
            return contextlib.nullcontext()
        preference = ops.set_backend(self.backend)
        with preference:  # entered once, it is no longer the process's
            return preference


def conditional(setup: Setup, *, packed: bool = False) -> nn.Module:
    """CA-MTL with random weights, as the released code starts it; minilm is a small base."""
    from camtl.models import CaMtlConfig, CaMtlForMultiTask

    e = setup.sizes
    tasks = [
        {
            "name": f"{TASKS[t % len(TASKS)][0]}_{t}",
            "num_labels": n,
            "type": "regression" if n == 1 else "classification",
        }
        for t, n in enumerate(setup.num_labels)
    ]
    config = CaMtlConfig(
        preset=f"ca-mtl-{setup.variant}",
        tasks=tasks,
        max_seq_length=setup.S,
        packed=packed,
        freeze=setup.freeze,
        vocab_size=e.vocabulary,
        hidden_size=e.D,
        num_hidden_layers=e.layers,
        num_attention_heads=e.H,
        intermediate_size=e.inner,
    )
    return CaMtlForMultiTask(config)


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Make tables and attention matter: weights that keep the size of what they read. A fresh model's table
    is zero and its attention even, so that most of what a kernel can do wrong would not show.
    """
    for name, parameter in model.named_parameters():
        if "random_weight_matrix" in name or "task_type_embeddings" in name:
            parameter.normal_()
        elif parameter.dim() == 2 and "embeddings" not in name:
            parameter.normal_(0, (0.3 if "gb_weights" in name else 1.0) * parameter.shape[1] ** -0.5)


def released_form(setup: Setup, model: Any) -> nn.Module:
    """The same weights in the released model."""
    from camtl.benchmarks.model.released import Released, Sizes

    e = setup.sizes
    twin = Released(
        Sizes(setup.variant, setup.num_labels, e.D, e.layers, e.H, e.inner, setup.S, vocab_size=e.vocabulary)
    )
    twin.load_state_dict(model.to_reference())
    return twin


def casts(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Autocast, where products are not float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)


def forward_of(model: nn.Module, way: Way, smoke: bool) -> Callable[..., Any]:
    """The model as a function of a batch, compiled where the way is."""

    def run(batch: Tensors) -> Any:
        return model(**batch)

    return compiled(run, smoke) if way.compiled else run


def our_backends(device: str) -> dict[str, str]:
    """What models are timed on, with the reason why one is absent: those that have attention, and ``cuda``
    (which leaves attention to Triton).
    """
    found = ours("conditional_attention", device)
    if "cuda" in found:
        found["cuda"] = ours("film", device)["cuda"]
    return found


def of_ours(setup: Setup, device: str, trace: bool) -> list[Way]:
    """Our ways; where lengths differ each name says the form, ``padded`` or ``packed``."""
    found = []
    for on, absent in our_backends(device).items():
        for form in ("padded", "packed") if setup.glue else ("padded",):
            name = f"{on} {form}" if setup.glue else on
            found.append(Way(name, backend=on, form=form, absent=absent))
            if trace and on != "cuda":
                found.append(replace(found[-1], name=f"{name} compiled", compiled=True))
    return found


def plain(setup: Setup, trace: bool) -> list[Way]:
    """The same model in plain PyTorch, and the released one, which pads to the longest length there is."""
    form = " padded" if setup.glue else ""
    found = [Way(f"eager{form}"), Way("released", "released", None)]
    return [*found, *[Way(f"compile{form}", compiled=True)] * trace]


# -- the check


def results(way: Way, setup: Setup, device: str, dtype: torch.dtype, *, smoke: bool, trace: bool) -> Tensors:
    """Loss, entropies and the gradients of all parameters by their released names, in float32; no dropout."""
    model = way.build(setup, device, stirred=True).eval()
    run = forward_of(model, replace(way, compiled=way.compiled and trace), smoke)
    with way.prefers(), casts(device, dtype):
        out = run(way.inputs(setup, device))
    out.loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    if way.family == "camtl":
        from camtl.models.reference_format import to_reference_state

        layers = setup.sizes.layers
        gradients = to_reference_state(
            gradients, sizes=setup.num_labels, num_hidden_layers=layers, variant=setup.variant
        )
    found: Tensors = {"loss": out.loss, "entropy": out.entropy} | gradients
    return {name: x.detach().float() for name, x in found.items()}


def size_of(x: Tensor) -> float:
    """The Euclidean norm, summed in float64."""
    return float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64))


def too_far(got: Tensor, plain: Tensor, true: Tensor, factor: float, more: float) -> str:
    """ "" if ``got`` is off by at most ``factor`` times what ``plain`` is off, and ``more``."""
    error, allowed = size_of(got - true), factor * size_of(plain - true) + more
    if error <= allowed:
        return ""
    size = max(size_of(true), 1e-12)
    return f"off by {error / size:.3g} of its size, allowed {allowed / size:.3g}"


def check(way: Way, setup: Setup, device: str, *, smoke: bool, trace: bool) -> list[str]:
    """What is wrong with a way's loss, entropies and gradients on eight sequences, dropout off.

    The truth is plain PyTorch in float32. Allowed is twice the error that plain PyTorch has in the setup's
    dtype over all gradients, and four times its error in one parameter, whose rounding is a matter of luck.
    A compiled way is compiled for it once more; ``trace=False`` checks what it compiles instead.
    """
    if way.family == "bert":
        return []  # another model
    small = replace(setup, B=min(setup.B, CHECKED_ROWS), candidates=None)
    measure = functools.partial(results, setup=small, device=device, smoke=smoke, trace=trace)
    true = measure(Way("truth"), dtype=torch.float32)
    plain = true if setup.dtype == torch.float32 else measure(Way("plain"), dtype=setup.dtype)
    got = measure(way, dtype=setup.dtype)
    names = [name for name in true if name not in ("loss", "entropy")]

    def over_all(of: Callable[[str], Tensor]) -> Tensor:
        return torch.tensor([size_of(of(name)) for name in names], dtype=torch.float64)

    whole = size_of(over_all(lambda n: true[n]))
    least = 1e-7 if setup.dtype == torch.float32 else 1e-5  # what is 0 but for rounding is off by its size
    found = {
        name: too_far(got[name], plain[name], true[name], 2, 1e-3 * size_of(true[name]))
        for name in ("loss", "entropy")
    }
    for name in names:
        more = 2e-2 * size_of(true[name]) + least * whole
        found[name] = too_far(got[name], plain[name], true[name], 4, more)
    off = over_all(lambda n: got[n] - true[n]), over_all(lambda n: plain[n] - true[n])
    zero = torch.zeros(len(names), dtype=torch.float64)
    if too_far(*off, zero, 2, 1e-3 * whole):
        found["all gradients"] = f"off by {size_of(off[0]) / whole:.3g} of their size"
    return [f"{name}: {text}" for name, text in found.items() if text]


# -- from ways to contenders


def contender(
    way: Way,
    setup: Setup,
    device: str,
    make: Callable[[Way, Inputs], dict[str, Step]],
    kind: str | None = None,
) -> Contender:
    """A way as the runner takes it; ``kind`` where it is not the way's."""
    inputs = functools.partial(way.inputs, setup, device)
    return Contender(
        way.name, kind or way.kind, functools.partial(make, way), way.absent, inputs, graph=way.graph
    )
