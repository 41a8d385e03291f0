"""Group D: the multi-task model: losses, entropies, gradients, freezing, and training steps of the released
optimiser.
"""

from __future__ import annotations

import math

import torch

from camtl.models import CaMtlForMultiTask
from camtl.models.reference_format import reference_name, split_heads

GROUP = "D_full_model"


def _tasks(config) -> list[dict]:
    return [
        {"name": name, "num_labels": count, "type": "regression" if count == 1 else "classification"}
        for name, count in zip(config["tasks"], config["num_labels"], strict=True)
    ]


def _load(case, dtype, **switches) -> CaMtlForMultiTask:
    config = case.config
    recorded = {
        **{k: v for k, v in config.items() if k not in ("tasks", "num_labels", "variant")},
        "packed": False,
    }
    model = CaMtlForMultiTask.from_reference(
        case.under("param.", dtype),
        variant=config["variant"],
        config={**recorded, **switches},
        tasks=_tasks(config),
    )
    assert next(model.parameters()).dtype == dtype
    return model


def _reference_gradients(model, variant) -> dict[str, torch.Tensor]:
    depth = model.config.num_hidden_layers
    found = {
        reference_name(n, num_hidden_layers=depth, variant=variant): p.grad
        for n, p in model.named_parameters()
        if not n.startswith("heads.")
    }
    found.update(split_heads(model.heads.weight.grad, model.heads.bias.grad, model.heads.sizes))
    return found


def _outputs(model, out, task_ids) -> dict[str, torch.Tensor]:
    """What the released model returns, from ours."""
    config = model.config
    last = int(task_ids.max())
    sizes = model.heads.sizes
    means = torch.stack([out.entropy[task_ids == t].mean() for t in task_ids.tolist()])
    found = {
        "logits": out.logits[task_ids == last][:, : sizes[last]],
        "batch_entropy_per_task": out.entropy,
        "batch_entropy_mean_per_task": means,
        "max_mean_batch_entropy": means.max(),
        "aux.sequence_output": out.hidden_states[-1],
        "aux.pooled_output": out.pooled_output,
    }
    if out.loss is not None:
        found["loss"] = out.loss
    for t in range(config.num_tasks):
        if (task_ids == t).any():
            found[f"aux.task{t}.logits"] = out.logits[task_ids == t][:, : sizes[t]]
            found[f"aux.task{t}.entropy"] = out.entropy[task_ids == t]
            if out.loss is not None:
                found[f"aux.task{t}.loss"] = out.loss_per_task[t]
    return found


def _check_batch(case, tag, dtype, name) -> None:
    model = _load(case, dtype)
    sequence = []
    model.bert.register_forward_hook(lambda _m, _i, out: sequence.append(out.last_hidden_state))
    batch = case.under(f"in.{name}.", dtype)
    ids, labels = batch.pop("task_id"), batch.pop("labels")
    out = model(**batch, task_ids=ids, labels=labels, output_hidden_states=True)
    found = _outputs(model, out, ids)
    found["aux.sequence_output"] = sequence[0]
    prefix = f"out.{name}."
    recorded = [key for key in case.under(f"{tag}.{prefix}") if key != "loss_grouped_per_task"]
    case.check_all(prefix, found, tag, names=recorded)
    case.check(f"{prefix}loss_grouped_per_task", out.loss_per_task, tag, single=True)

    with torch.no_grad():  # without labels: the same, less the losses
        silent = model(**batch, task_ids=ids)
    assert silent.loss is None
    assert silent.loss_per_task is None
    torch.testing.assert_close(silent.logits, out.logits)
    torch.testing.assert_close(silent.entropy, out.entropy)

    out.loss.backward()
    gradients = _reference_gradients(model, case.config["variant"])
    assert all(g is not None for g in gradients.values())
    for absent in case.manifest.get("no_grad_params", {}).get(name, []):
        assert not gradients[absent].any(), f"{absent} has a gradient"
    count = case.check_all(f"grad.{name}.", gradients, tag)
    if tag == "f64" and name == "mixed":
        assert count == len(gradients)


def _check_freezing(case) -> None:
    depth, variant = case.config["num_hidden_layers"], case.config["variant"]
    for layers, expected in case.manifest.get("freeze", {}).items():
        model = _load(case, torch.float32, freeze=layers, freeze_conditional="reference")
        frozen = {
            reference_name(n, num_hidden_layers=depth, variant=variant)
            for n in model.freeze_report()["frozen"]
        }
        assert frozen == set(expected["frozen"]), layers
        assert model.freeze_report()["trainable"] == expected["n_trainable"], layers
        trains = _load(case, torch.float32, freeze=layers, freeze_conditional="train")
        assert all(p.requires_grad for _, p in trains.conditional_parameters())
        assert {n for n in frozen if "gb_weights" not in n} == {
            reference_name(n, num_hidden_layers=depth, variant=variant)
            for n in trains.freeze_report()["frozen"]
        }


class OldAdamW:
    """The AdamW of the library the released code was written for: decay after the step, eps not
    bias-corrected.
    """

    def __init__(self, model, config) -> None:
        self.model, self.config, self.variant = model, config, config["variant"]
        self.depth = model.config.num_hidden_layers
        self.state: dict[str, list] = {}

    def slices(self):
        """``(released name, parameter, gradient)``, views; stacked heads appear as separate decoders."""
        for name, p in self.model.named_parameters():
            if not name.startswith("heads.") and p.grad is not None:
                yield reference_name(name, num_hidden_layers=self.depth, variant=self.variant), p.data, p.grad
        heads = self.model.heads
        values = split_heads(heads.weight.data, heads.bias.data, heads.sizes)
        gradients = split_heads(heads.weight.grad, heads.bias.grad, heads.sizes)
        for name, value in values.items():
            if gradients[name].any():  # an absent task's decoder has no gradient there, and is left alone
                yield name, value, gradients[name]

    def learning_rate(self, step: int) -> float:
        c = self.config
        warmup = c["warmup_proportion"] * c["steps"]
        factor = (
            step / max(1.0, warmup)
            if step < warmup
            else max(0.0, (c["steps"] - step) / max(1.0, c["steps"] - warmup))
        )
        return c["learning_rate"] * factor

    def clip(self) -> float:
        found = list(self.slices())
        norm = math.sqrt(sum(float(g.square().sum()) for _, _, g in found))
        scale = self.config["max_grad_norm"] / (norm + 1e-6)
        if scale < 1:
            for _, _, g in found:
                g.mul_(scale)
        return norm

    def step(self, number: int) -> None:
        c = self.config
        lr, (b1, b2) = self.learning_rate(number), c["betas"]
        for name, p, g in self.slices():
            t, m, v = self.state.setdefault(name, [0, torch.zeros_like(p), torch.zeros_like(p)])
            t += 1
            m.mul_(b1).add_(g, alpha=1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            self.state[name][0] = t
            size = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
            p.addcdiv_(m, v.sqrt().add_(c["adam_epsilon"]), value=-size)
            if not self.model.no_weight_decay(name):
                p.add_(p, alpha=-lr * c["weight_decay"])


def _check_training(case) -> None:
    config, depth = case.config, case.config["num_hidden_layers"]
    model = _load(
        case, torch.float64, freeze=config.get("freeze_encoder_layers"), freeze_conditional="reference"
    )
    expected = set(case.manifest["no_weight_decay"])
    everything = model.to_reference()
    by_rule = {name for name in everything if model.no_weight_decay(name)}
    frozen = {
        reference_name(n, num_hidden_layers=depth, variant=config["variant"])
        for n in model.freeze_report()["frozen"]
    }
    assert by_rule - frozen <= expected <= by_rule
    optimiser = OldAdamW(model, config)
    losses, norms, rates = [], [], []
    for number in range(config["steps"]):
        batch = case.under(f"in.step{number}.", torch.float64)
        ids = batch.pop("task_id")
        model.zero_grad(set_to_none=True)
        loss = model(**batch, task_ids=ids).loss
        loss.backward()
        losses.append(loss.detach())
        norms.append(optimiser.clip())
        rates.append(optimiser.learning_rate(number))
        optimiser.step(number)
    case.check("out.losses", torch.stack(losses), "f64")
    case.check("out.grad_norm_before_clip", torch.tensor(norms, dtype=torch.float64), "f64")
    case.check("out.lr_used", torch.tensor(rates, dtype=torch.float64), "f64")
    final = case.check_all("final.", model.to_reference(), "f64")
    assert final == len(everything)


def test_full_model(case):
    if case.name.startswith("train_"):
        _check_training(case)
        return
    batches = sorted({name.split(".")[1] for name in case.tensors if name.startswith("in.")})
    assert batches
    for tag, dtype in case.precisions():
        for name in batches:
            if case.under(f"{tag}.out.{name}."):
                _check_batch(case, tag, dtype, name)
    _check_freezing(case)
    if "n_params" in case.manifest:
        assert (
            sum(t.numel() for t in _load(case, torch.float32).to_reference().values())
            == case.manifest["n_params"]
        )


def test_state_dict_round_trip(case):
    """from_reference and to_reference are exact inverses."""
    recorded = case.under("param.")
    back = _load(case, torch.float32).to_reference()
    assert back.keys() == recorded.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in recorded.items())
