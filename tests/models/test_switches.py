"""Every switch does what its formula says, trains every parameter, and leaves no unused ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from camtl.models.configuration import CHOICES
from camtl.nn import ConditionalLayerNorm, ConditionalSelfAttention
from camtl.ops import reference

SWITCHED = [{name: value} for name, values in sorted(CHOICES.items()) for value in values] + [
    {"block_width": 5},
    {"block_width": 1, "attention_film": "entry"},
    {"attention_bias": "full", "attention_film": "entry"},
    {"attention_bias": "none", "alignment": "none", "norm_condition": "none", "bottleneck": "none"},
    {"attention_bias": "none", "norm_condition": "none", "bottleneck": "none"},
    {"alignment": "none", "attention_bias": "none", "norm_condition": "none"},
    {"preset": "ca-mtl-large", "bottleneck_output": "residual", "bottleneck_activation": "gelu"},
    {"preset": "ca-mtl-base", "norm_condition": "none"},
    {
        "preset": "ca-mtl-base",
        "norm_condition": "weight_and_bias",
        "alignment": "matrix",
        "attention_film": "entry",
    },
]


@pytest.mark.parametrize("switches", SWITCHED, ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()))
@pytest.mark.parametrize("layers", [3, 4])
def test_every_parameter_is_trained(make_model, make_batch, switches, layers):
    model = make_model(num_hidden_layers=layers, **switches).double().train()
    batch = make_batch()
    out = model(**batch)
    assert out.loss.isfinite()
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} is unused"
        assert parameter.grad.isfinite().all(), name
    silent = {n for n, p in model.named_parameters() if not p.grad.any()}
    assert silent == set()


def _bottleneck(module, x, z):
    gamma, beta = F.linear(module.emb_transf(z), *module.hidden_modulation.gb_weights.parameters()).chunk(
        2, -1
    )
    h = module.down_proj_layer((1 + gamma)[:, None] * x + beta[:, None])
    return module.up_proj_layer(F.gelu(h) if module.activation == "gelu" else h)


def _taps(model, *modules):
    """Inputs and outputs of modules in the next forward, by position."""
    seen = [{} for _ in modules]
    for k, module in enumerate(modules):
        module.register_forward_hook(lambda _m, args, out, k=k: seen[k].update(args=args, out=out))
    return seen


def _conditions(model, ids):
    z = model.bert.task_type_embeddings.weight
    return z[ids], model.bert.encoder.task_transformation(z)[ids]


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("output", ["path", "residual"])
def test_top_bottleneck(make_model, make_batch, output, activation):
    fields = {"bottleneck_output": output, "bottleneck_activation": activation, "packed": False}
    model = make_model(preset="ca-mtl-base", **fields).double()
    top = model.bert.encoder.layer[-1]
    sublayers = _taps(model, top.attention.output, top.output, top)
    batch = make_batch()
    out = model(**batch, output_hidden_states=True)
    a, o, last = sublayers[0]["out"], sublayers[1]["out"], sublayers[2]["out"][0]
    _, z = _conditions(model, batch["task_ids"])
    inner = _bottleneck(top.adapter.bottleneck, o, z)
    if output == "residual":
        want = o + inner
    else:
        norm = top.adapter.condlayernorm
        gamma, beta = norm.ln_weight_modulation.gb_weights(z).chunk(2, -1)
        weight = (1 + gamma) * norm.weight + beta
        want = F.layer_norm(inner + a, (32,), eps=1e-12) * weight[:, None] + norm.bias
    torch.testing.assert_close(last, want)
    torch.testing.assert_close(out.hidden_states[-1], want)


@pytest.mark.parametrize("output", ["path", "residual"])
def test_bottlenecks_in_all_layers(make_model, make_batch, output):
    model = make_model(preset="ca-mtl-large", bottleneck_output=output, packed=False).double()
    batch = make_batch()
    labels = batch.pop("labels")
    out = model.bert(**batch, output_hidden_states=True)
    assert labels is not None
    _, z = _conditions(model, batch["task_ids"])
    f = torch.zeros_like(out.hidden_states[0])
    for k, module in enumerate(model.bert.encoder.adapter_layer):
        f = _bottleneck(module, out.hidden_states[k + 1] + f, z)
    want = f if output == "path" else out.hidden_states[-1] + f
    torch.testing.assert_close(out.last_hidden_state, want)


@pytest.mark.parametrize("kind", ["film", "matrix", "none"])
def test_alignment(make_model, make_batch, kind):
    model = make_model(alignment=kind, packed=False).double()
    batch = make_batch()
    embedded = _taps(model, model.bert.embeddings)[0]
    out = model(**batch, output_hidden_states=True)
    x, aligned = embedded["out"], out.hidden_states[0]
    if kind == "none":
        assert torch.equal(x, aligned)
        return
    z, _ = _conditions(model, batch["task_ids"])  # z, not z'
    module = model.bert.conditional_alignment
    gamma, beta = module.gb_weights(z).chunk(2, -1)
    if kind == "film":
        want = (1 + gamma)[:, None] * x + beta[:, None]
    else:
        per_task = module.matrix * (1 + gamma)[:, None] + beta[:, None]
        want = torch.einsum("bsd,bde->bse", x, per_task)
    torch.testing.assert_close(aligned, want)


def _norms(model):
    return [(layer.attention.output.LayerNorm, layer.output.LayerNorm) for layer in model.bert.encoder.layer]


@pytest.mark.parametrize("layers", [4, 5])
def test_where_the_conditional_parts_are(make_model, layers):
    model = make_model(num_hidden_layers=layers)
    upper = (layers + 1) // 2
    for k, norms in enumerate(_norms(model)):
        assert all(isinstance(norm, ConditionalLayerNorm) == (k >= upper) for norm in norms)
    biased = [layer.attention.self.block_width is not None for layer in model.bert.encoder.layer]
    assert biased == [True] * layers
    model = make_model(num_hidden_layers=layers, attention_bias_layers="upper", norm_condition="none")
    biased = [layer.attention.self.block_width is not None for layer in model.bert.encoder.layer]
    assert biased == [k >= upper for k in range(layers)]
    assert not any(isinstance(m, ConditionalLayerNorm) for m in model.modules())
    adapters = [layer.adapter is not None for layer in model.bert.encoder.layer]
    assert adapters == [False] * (layers - 1) + [True]


@pytest.mark.parametrize(("bias", "width"), [("block_diagonal", 5), ("full", None)])
def test_entry_film_is_the_formula(bias, width):
    """M[i, j] = (1 + gamma[i mod w, c]) * A[i, c] + beta[i mod w, c] with c = j mod w, inside the blocks."""
    L, w = 12, width or 12
    assert bias == "full" or w == 5
    module = ConditionalSelfAttention(16, 2, L, w, film="entry").double()
    with torch.no_grad():
        module.random_weight_matrix.normal_()
    z = torch.randn(3, 16, dtype=torch.float64)
    table, gamma, beta = module.bias_arguments(module.cond_block_diag_attn.gb_weights(z))
    assert gamma is None
    assert beta is None
    got = reference._attention_bias(table, None, None, torch.arange(3), L)[:, 0]
    g, b = (part.view(3, w, w) for part in module.cond_block_diag_attn.gb_weights(z).chunk(2, -1))
    A = module.random_weight_matrix
    for t in range(3):
        for i in range(L):
            for j in range(L):
                c = j % w
                want = (
                    (1 + g[t, i % w, c]) * A[i, c] + b[t, i % w, c] if i // w == j // w else torch.zeros(())
                )
                assert float(got[t, i, j].detach()) == pytest.approx(float(want.detach()), abs=1e-12)


def test_attention_bias_changes_the_output_only_when_it_is_not_zero(make_model, make_batch):
    model = make_model(randomise=False, generator_init="zeros")
    off = make_model(randomise=False, generator_init="zeros", attention_bias="none")
    off.load_state_dict(model.state_dict(), strict=False)
    batch = make_batch()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, off(**batch).logits)
        for layer in model.bert.encoder.layer:
            layer.attention.self.random_weight_matrix.normal_()
        assert not torch.allclose(model(**batch).pooled_output, off(**batch).pooled_output, atol=1e-4)
