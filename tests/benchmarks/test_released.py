"""The model and ops as the released code has them, against its recorded numbers: a fair baseline."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from camtl.benchmarks.baselines import released as ops
from camtl.benchmarks.model.released import Bert, Layer, Released, SelfAttention, Sizes

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("recorded_cases", ROOT / "tests" / "oracle" / "conftest.py")
recorded = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recorded)


def stems(group, *parts):
    found = [s for s in recorded.recorded_files() if s.startswith(f"{group}/")]
    return [s for s in found if not parts or s.split("/")[1].startswith(parts)]


def sizes(config, **more) -> Sizes:
    known = {f.name for f in fields(Sizes)}
    return Sizes(**{k: v for k, v in config.items() if k in known} | more)


def load(module, case, dtype):
    module = module.to(dtype).eval()
    module.load_state_dict(case.under("param.", dtype), strict=True)
    return module


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- the whole model


def gradients(model):
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def outputs(found, sequence, pooled):
    return {
        "loss": found.loss,
        "batch_entropy_per_task": found.entropy,
        "batch_entropy_mean_per_task": found.mean_entropy,
        "max_mean_batch_entropy": torch.tensor(found.largest, dtype=found.entropy.dtype),
        "logits": found.logits,
        "aux.sequence_output": sequence,
        "aux.pooled_output": pooled,
    }


@pytest.mark.parametrize("stem", stems("D_full_model", "base", "large"))
def test_losses_entropies_and_gradients_are_the_recorded_ones(stem):
    case = recorded.Case(stem)
    batches = sorted({name.split(".")[1] for name in case.tensors if name.startswith("in.")})
    checked = 0
    for tag, dtype in case.precisions():
        for name in batches:
            if not case.under(f"{tag}.out.{name}."):
                continue
            model = load(Released(sizes(case.config)), case, dtype)
            seen = []
            model.bert.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
            batch = case.under(f"in.{name}.", dtype)
            found = model(**{("task_ids" if k == "task_id" else k): v for k, v in batch.items()})
            got = outputs(found, *seen[0])
            checked += case.check_all(f"out.{name}.", got, tag, names=got)
            case.check(f"out.{name}.loss_grouped_per_task", found.per_task, tag, single=True)
            found.loss.backward()
            checked += case.check_all(f"grad.{name}.", gradients(model), tag)
    assert checked > 100


class OldAdamW:
    """The recorded optimizer: decay after the step, eps without bias correction; decoders of absent tasks are
    left alone.
    """

    def __init__(self, model, case):
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.config, self.plain = case.config, set(case.manifest["no_weight_decay"])
        self.state = {}

    def step(self, number):
        c = self.config
        warmup = c["warmup_proportion"] * c["steps"]
        late = max(0.0, (c["steps"] - number) / max(1.0, c["steps"] - warmup))
        lr = c["learning_rate"] * (number / max(1.0, warmup) if number < warmup else late)
        live = {n: p for n, p in self.parameters.items() if p.grad is not None}
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in live.values()))
        clip = min(1.0, c["max_grad_norm"] / (norm + 1e-6))
        b1, b2 = c["betas"]
        for name, p in live.items():
            g = p.grad * clip
            t, m, v = self.state.setdefault(name, [0, torch.zeros_like(p), torch.zeros_like(p)])
            self.state[name][0] = t = t + 1
            m.mul_(b1).add_(g, alpha=1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            size = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
            with torch.no_grad():
                p.addcdiv_(m, v.sqrt().add_(c["adam_epsilon"]), value=-size)
                if name not in self.plain:
                    p.mul_(1 - lr * c["weight_decay"])
        return norm, lr


def training_cases():
    found = stems("D_full_model", "train_base", "train_large")
    # the baseline does not freeze
    return [s for s in found if not recorded.Case(s).config.get("freeze_encoder_layers")]


@pytest.mark.parametrize("stem", training_cases())
def test_training_arrives_at_the_recorded_weights(stem):
    case = recorded.Case(stem)
    model = load(Released(sizes(case.config)), case, torch.float64)
    optimizer, seen = OldAdamW(model, case), []
    for number in range(case.config["steps"]):
        batch = case.under(f"in.step{number}.", torch.float64)
        model.zero_grad(set_to_none=True)
        loss = model(**{("task_ids" if k == "task_id" else k): v for k, v in batch.items()}).loss
        loss.backward()
        seen.append((float(loss.detach()), *optimizer.step(number)))
    for name, values in zip(
        ("losses", "grad_norm_before_clip", "lr_used"), zip(*seen, strict=True), strict=True
    ):
        case.check(f"out.{name}", torch.tensor(values, dtype=torch.float64), "f64")
    assert case.check_all("final.", dict(model.named_parameters()), "f64") == len(optimizer.parameters)


# -- its parts


@pytest.mark.parametrize("stem", stems("C_encoders", "base", "large"))
def test_an_encoder_gives_the_recorded_outputs(stem):
    case = recorded.Case(stem)
    for tag, dtype in case.precisions():
        model = load(Bert(sizes(case.config, num_labels=[2] * case.config["num_tasks"])), case, dtype)
        batch = case.under("in.", dtype)
        words = batch["input_ids"], batch["attention_mask"], batch["token_type_ids"], batch["task_id"]
        sequence, pooled = model(*words)
        case.check("out.sequence_output", sequence, tag)
        case.check("out.pooled_output", pooled, tag)
        if "batch2.input_ids" in batch:
            ids = batch["batch2.input_ids"]
            sequence, _ = model(ids, torch.ones_like(ids), torch.zeros_like(ids), batch["batch2.task_id"])
            case.check("out.batch2.sequence_output", sequence, tag)


@pytest.mark.parametrize("stem", stems("B_layers"))
def test_a_layer_gives_the_recorded_output(stem):
    case = recorded.Case(stem)
    config = case.config
    variant, kind = config["module"].split("_")
    depth, index = 4, {"lower": 0, "upper": 2, "top": 3}[kind]
    given = sizes(
        config, variant=variant, num_labels=[2], num_hidden_layers=depth, num_attention_heads=config["heads"]
    )
    for tag, dtype in case.precisions():
        layer = load(Layer(given, index), case, dtype)
        inputs = case.leaves("in.", dtype)
        y = layer(
            inputs["hidden_states"], inputs["task_embedding"], inputs["task_id"], inputs["padding_mask"]
        )
        case.check("out.y", y, tag)
        (y * case.under("cot.", dtype)["y"]).sum().backward()
        assert case.check_gradients(tag, inputs, dict(layer.named_parameters())) > 0


@pytest.mark.parametrize("stem", stems("B_self_attention"))
def test_attention_gives_the_recorded_context(stem):
    case = recorded.Case(stem)
    given = sizes(
        case.config,
        variant="base",
        num_labels=[2],
        num_hidden_layers=1,
        num_attention_heads=case.config["heads"],
        intermediate_size=1,
    )
    for tag, dtype in case.precisions():
        module = load(SelfAttention(given), case, dtype)
        inputs = case.leaves("in.", dtype)
        context, probs = module(inputs["hidden_states"], inputs["task_embedding"], inputs["padding_mask"])
        case.check_all("out.", {"context": context, "probs": probs}, tag)
        cot = case.under("cot.", dtype)
        ((context * cot["context"]).sum() + (probs * cot["probs"]).sum()).backward()
        assert case.check_gradients(tag, inputs, dict(module.named_parameters())) > 0


@pytest.mark.parametrize("stem", stems("A_modules", "cbda"))
def test_the_bias_is_the_recorded_one(stem):
    case = recorded.Case(stem)
    for tag, dtype in case.precisions():
        inputs, p = case.under("in.", dtype), case.under("param.", dtype)
        generated = F.linear(inputs["x_cond"], p["gb_weights.weight"], p["gb_weights.bias"])
        case.check("out.bias", ops.attention_bias(inputs["A"], *generated.chunk(2, -1)), tag)


@pytest.mark.parametrize("stem", stems("E_mt_uncertainty"))
def test_a_choice_is_the_recorded_one(stem):
    case = recorded.Case(stem)
    if "tasks" not in case.config:
        for tag, dtype in case.precisions():
            for name, logits in case.under("in.", dtype).items():
                case.check(f"out.{name.removesuffix('.logits')}.entropy", ops.normalised_entropy(logits), tag)
        return
    tasks, counts = case.config["tasks"], case.config["num_labels"]
    both = {"sts-b", "mrpc"} <= set(tasks)
    borrow = [tasks.index("mrpc") if t == "sts-b" and both else -1 for t in tasks]
    for tag, dtype in case.precisions():
        table = case.tensors["in.logits_table"].to(dtype)
        for step in range(case.config["steps"]):
            out = f"out.step{step}."
            candidates, ids = (case.tensors[f"{out}{n}"] for n in ("candidates", "candidate_task_id"))
            rows = zip(table[candidates], ids.tolist(), strict=True)
            entropy = torch.stack([ops.normalised_entropy(row[None, : counts[t]])[0] for row, t in rows])
            case.check(f"{out}entropy", entropy, tag)
            chosen, scores = ops.select_uncertain(entropy, ids, case.config["train_batch_size"], borrow)
            case.check(f"{out}score", scores, tag)
            case.check(f"{out}selected_scores", scores[chosen], tag)
            if not case.manifest[f"{tag}.tie_at_boundary"][step]:
                assert set(chosen.tolist()) == set(case.tensors[f"{tag}.{out}selected_position"].tolist())
