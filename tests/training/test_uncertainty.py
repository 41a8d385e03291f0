"""MT-Uncertainty against a computation by hand from the model's own outputs."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from camtl.data import MultiTaskCollator
from camtl.errors import UsageError
from camtl.models import CaMtlConfig, CaMtlForMultiTask
from camtl.training import UncertaintySelector
from camtl.training.uncertainty import packed_part, select_rows, trim_padding

B, T = 6, 3


class Spy:
    """Keeps, for each step, the candidates, the weights they were scored with, and the rows trained on."""

    def __init__(self, trainer: Any) -> None:
        self.candidates: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.selected: list[dict[str, torch.Tensor]] = []
        step, compute = trainer.training_step, trainer.compute_loss

        def training_step(model: Any, inputs: Any, *args: Any) -> torch.Tensor:
            self.candidates.append({k: copy.deepcopy(v) for k, v in inputs.items()})
            self.weights.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
            return step(model, inputs, *args)

        def compute_loss(model: Any, inputs: Any, **kwargs: Any) -> Any:
            self.selected.append({k: copy.deepcopy(v) for k, v in inputs.items()})
            assert model.training
            return compute(model, inputs, **kwargs)

        trainer.training_step = training_step
        trainer.compute_loss = compute_loss


def entropies(model: Any, batch: dict[str, torch.Tensor]) -> list[float]:
    """-sum p ln p / (ln C + 1e-5) from logits, in plain Python; 0 for the regression task."""
    model.eval()
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k not in ("labels", "lengths")}).logits.double()
    values = []
    for row, task in zip(logits, batch["task_ids"].tolist(), strict=True):
        classes = model.config.task_info[task]["num_labels"]
        p = torch.softmax(row[:classes], 0).tolist()
        entropy = -sum(q * math.log(q) for q in p)
        values.append(0.0 if classes == 1 else entropy / (math.log(classes) + 1e-5))
    return values


def by_hand(scores: list[float], tasks: list[int], reserve: dict[int, int]) -> list[int]:
    """Reserved tasks' first candidates, then the best of the rest; descending scores, ties by position."""
    chosen: list[int] = []
    for task, places in reserve.items():
        chosen += [i for i, t in enumerate(tasks) if t == task][:places]
    rest = sorted((i for i in range(len(scores)) if i not in chosen), key=lambda i: (-scores[i], i))
    chosen += rest[: B - len(chosen)]
    return sorted(chosen, key=lambda i: (-scores[i], i))


def same_rows(
    selected: dict[str, torch.Tensor], candidates: dict[str, torch.Tensor], rows: list[int]
) -> None:
    assert torch.equal(selected["task_ids"], candidates["task_ids"][rows])
    assert torch.equal(selected["labels"], candidates["labels"][rows])
    if "cu_seqlens" in selected:
        for name in ("input_ids", "token_type_ids"):
            pieces, all_pieces = (
                torch.tensor_split(b[name], b["cu_seqlens"][1:-1].long()) for b in (selected, candidates)
            )
            for piece, row in zip(pieces, rows, strict=True):
                assert torch.equal(piece, all_pieces[row])
        assert selected["max_seqlen"] == max(len(piece) for piece in pieces)
        assert "lengths" not in selected
        return
    width = selected["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(selected[name], candidates[name][rows][:, :width])
        assert not candidates["attention_mask"][rows][:, width:].any()
    assert selected["attention_mask"][:, -1].any()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("score", ["paper", "reference"])
@pytest.mark.parametrize("places", ["reserve", "borrow:relation"])
def test_selects_what_a_computation_by_hand_selects(make_trainer, make_model, score, places, packed):
    trainer = make_trainer(
        model=make_model(packed=packed),
        sampler="uncertainty",
        score=score,
        regression_places=places,
        max_steps=4,
        learning_rate=0.05,
    )
    spy = Spy(trainer)
    trainer.train()
    fresh = make_model(seed=99)
    assert len(spy.selected) == 4
    for candidates, weights, selected in zip(spy.candidates, spy.weights, spy.selected, strict=True):
        tasks = candidates["task_ids"].tolist()
        assert tasks == [0] * B + [1] * B + [2] * B
        fresh.load_state_dict(weights)
        scores = entropies(fresh, candidates)
        if score == "reference":
            mean = [sum(s for s, t in zip(scores, tasks, strict=True) if t == task) / B for task in range(T)]
            scores = [s * mean[t] / max(mean) for s, t in zip(scores, tasks, strict=True)]
        if places == "reserve":
            rows = by_hand(scores, tasks, {2: B // T})
        else:
            scores[2 * B :] = scores[B : 2 * B]
            rows = by_hand(scores, tasks, {})
        same_rows(selected, candidates, rows)
    changed = [not torch.equal(a["bert.pooler.dense.weight"], b["bert.pooler.dense.weight"]) for a, b in
               zip(spy.weights[1:-1], spy.weights[2:], strict=True)]  # fmt: skip
    assert all(changed)  # scored with the weights of the step, not with those of the start


def test_shares_and_min_share(make_trainer):
    trainer = make_trainer(sampler="uncertainty", min_share=1 / 3, max_steps=5, logging_steps=2)
    spy = Spy(trainer)
    result = trainer.train()
    for batch in spy.selected:
        assert torch.bincount(batch["task_ids"], minlength=T).tolist() == [2, 2, 2]
    assert trainer.selection_shares() == {"tone": 1 / 3, "relation": 1 / 3, "closeness": 1 / 3}
    assert result.metrics["train_data_share"] == pytest.approx(B / (T * B))
    assert 0.0 < result.metrics["train_scoring_time_share"] < 1.0
    logged = [entry for entry in trainer.state.log_history if "train_share_tone" in entry]
    assert all(entry["train_share_tone"] == pytest.approx(1 / 3) for entry in logged)


def test_candidates_per_task_and_small_tasks(make_trainer, data):
    trainer = make_trainer(sampler="uncertainty", candidates_per_task=20, max_steps=2)
    spy = Spy(trainer)
    result = trainer.train()
    counts = torch.bincount(spy.candidates[0]["task_ids"]).tolist()
    assert counts == [20, 20, 17]  # the third task has no more
    assert spy.selected[0]["task_ids"].numel() == B
    assert result.metrics["train_data_share"] == pytest.approx(B / 57)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_scoring_in_chunks_selects_the_same(make_trainer, make_model, packed):
    runs = []
    for chunk in (None, 4):
        model = make_model(packed=packed)
        trainer = make_trainer(model=model, sampler="uncertainty", score_batch_size=chunk, max_steps=1)
        spy = Spy(trainer)
        trainer.train()
        runs.append(spy.selected[0])
    assert torch.equal(runs[0]["input_ids"], runs[1]["input_ids"])


def test_scoring_leaves_random_numbers_alone_and_dropout_uses_them(make_trainer, make_model):
    model = make_model()
    info = model.config.task_info
    batch = {
        "input_ids": torch.randint(5, 40, (6, 8)),
        "attention_mask": torch.ones(6, 8, dtype=torch.long),
        "token_type_ids": torch.zeros(6, 8, dtype=torch.long),
        "task_ids": torch.tensor([0, 0, 1, 1, 2, 2]),
    }
    plain = UncertaintySelector(info, 3)
    state = torch.random.get_rng_state()
    first = plain.entropy(model, batch)
    assert torch.equal(first, plain.entropy(model, batch))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not model.training
    assert first[4:].tolist() == [0.0, 0.0]
    noisy = UncertaintySelector(info, 3, score_dropout=True)
    second = noisy.entropy(model, batch)
    assert not torch.equal(second, noisy.entropy(model, batch))
    assert model.training
    assert not first.requires_grad


def test_regression_task_without_a_place_is_reported(caplog, make_model):
    UncertaintySelector(make_model().config.task_info, 2)
    assert "closeness" in caplog.text
    assert "batch size of at least 3" in caplog.text


@pytest.mark.parametrize(
    ("rows", "share", "places"),
    [(32, 0.03, 1), (32, 0.04, 2), (30, 0.1, 3), (30, 0.1000001, 4), (30, 0.0, 0)],
)
def test_a_share_is_rounded_up(rows, share, places):
    info = [{"name": name, "loss": "ce"} for name in "abc"]
    assert UncertaintySelector(info, rows, min_share=share).reserve == ([places] * 3 if places else None)


def test_a_share_that_a_batch_has_no_room_for():
    info = [{"name": name, "loss": "ce"} for name in "abcd"]
    with pytest.raises(UsageError, match=r"it must be at most 0\.2$"):
        UncertaintySelector(info, 5, min_share=0.25)
    with pytest.raises(UsageError, match="a batch needs 4 rows for that"):
        UncertaintySelector(info, 3, min_share=0.1)


def test_trimming_keeps_every_real_token():
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    batch = {
        "input_ids": torch.arange(15).view(3, 5),
        "attention_mask": mask,
        "task_ids": torch.tensor([0, 1, 2]),
    }
    trimmed = trim_padding(dict(batch))
    assert trimmed["input_ids"].tolist() == [[0, 1, 2], [5, 6, 7], [10, 11, 12]]
    assert trimmed["task_ids"].tolist() == [0, 1, 2]
    rows = select_rows(batch, torch.tensor([2, 0]))
    assert rows["input_ids"].tolist() == [[10, 11], [0, 1]]
    assert rows["task_ids"].tolist() == [2, 0]


def packed_batch() -> dict[str, Any]:
    return {
        "input_ids": torch.arange(10, 20),
        "token_type_ids": torch.arange(10) % 2,
        "cu_seqlens": torch.tensor([0, 4, 5, 5, 10], dtype=torch.int32),
        "max_seqlen": 5,
        "task_ids": torch.tensor([0, 1, 2, 0]),
        "labels": torch.tensor([0.0, 1.0, 2.0, 3.0]),
        "lengths": (4, 1, 0, 5),
    }


def test_rows_of_a_packed_batch():
    rows = select_rows(packed_batch(), torch.tensor([1, 0]))
    assert rows["input_ids"].tolist() == [14, 10, 11, 12, 13]
    assert rows["cu_seqlens"].tolist() == [0, 1, 5]
    assert rows["max_seqlen"] == 4
    assert rows["task_ids"].tolist() == [1, 0]
    assert rows["labels"].tolist() == [1.0, 0.0]
    part = packed_part(packed_batch(), packed_batch()["lengths"], 1, 4)
    assert part["input_ids"].tolist() == [14, 15, 16, 17, 18, 19]
    assert part["cu_seqlens"].tolist() == [0, 1, 1, 6]
    assert (part["max_seqlen"], part["task_ids"].tolist()) == (5, [1, 2, 0])


def with_tokens(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with marks and labels of its tokens, each a number of its own."""
    ids = batch["input_ids"]
    return {**batch, "token_marks": ids % 2, "token_labels": ids - 10}


def test_rows_take_marks_and_labels_of_their_tokens_along():
    rows = select_rows(with_tokens(packed_batch()), torch.tensor([1, 0]))
    assert rows["input_ids"].tolist() == [14, 10, 11, 12, 13]
    assert rows["token_marks"].tolist() == [0, 0, 1, 0, 1]
    assert rows["token_labels"].tolist() == [4, 0, 1, 2, 3]
    batch = with_tokens(packed_batch())
    part = packed_part(batch, batch["lengths"], 1, 4)
    assert part["token_marks"].tolist() == [0, 1, 0, 1, 0, 1]
    assert part["token_labels"].tolist() == [4, 5, 6, 7, 8, 9]
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
    padded = {
        "input_ids": torch.arange(12).view(3, 4),
        "attention_mask": mask,
        "token_marks": mask * 2,
        "token_labels": torch.arange(12).view(3, 4) - 5,
        "task_ids": torch.tensor([0, 1, 2]),
        "labels": torch.zeros(3, 4),  # [B, C], not a number for every token
    }
    rows = select_rows(padded, torch.tensor([2, 0]))
    assert rows["token_marks"].tolist() == [[2, 0], [2, 2]]
    assert rows["token_labels"].tolist() == [[3, 4], [-5, -4]]
    assert rows["labels"].shape == (2, 4)


KINDS = [
    {"name": "pair", "num_labels": 2},
    {"name": "tags", "num_labels": 3, "reads": "tokens"},
    {"name": "words", "num_labels": 2, "reads": "spans"},
    {"name": "answer", "num_labels": 2, "reads": "positions"},
]


@pytest.fixture
def kinds_model() -> CaMtlForMultiTask:
    torch.manual_seed(0)
    config = CaMtlConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=24, max_seq_length=16, tasks=KINDS,
    )  # fmt: skip
    model = CaMtlForMultiTask(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def mixture() -> list[dict[str, Any]]:
    """Three rows of each of the four kinds, as the collator takes them."""
    generator = torch.Generator().manual_seed(2)
    features = []
    for i in range(12):
        task, size = i // 3, 3 + i % 5
        row: dict[str, Any] = {"task_id": task, "labels": float(i % 2)}
        row["input_ids"] = torch.randint(1, 60, (size,), generator=generator).tolist()
        if task:
            row["token_marks"] = [1, 1, *torch.randint(0, 2, (size - 2,), generator=generator).tolist()]
        if task in (1, 3):
            del row["labels"]
            row["token_labels"] = torch.randint(0, 3, (size,), generator=generator).tolist()
        features.append(row)
    return features


@pytest.mark.parametrize("chunk", [None, 5], ids=["at once", "in chunks"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_selection_of_a_mixture(kinds_model, packed, chunk):
    """The rows chosen are those of largest entropy, whole: each alone has the loss it had among all."""
    features = mixture()
    batch = MultiTaskCollator(0, packed=packed)(features)
    batch["lengths"] = tuple(len(f["input_ids"]) for f in features)
    if not packed:
        del batch["lengths"]
    selector = UncertaintySelector(kinds_model.config.task_info, 5, score_batch_size=chunk)
    scores = []
    kinds_model.eval()
    for feature in features:
        scores.append(kinds_model(**MultiTaskCollator(0)([feature])).entropy.item())
    rows = sorted(range(12), key=lambda i: -scores[i])[:5]
    assert len({features[i]["task_id"] for i in rows}) > 2
    given: list[set[str]] = []
    hook = kinds_model.register_forward_pre_hook(
        lambda _, __, inputs: given.append(set(inputs)), with_kwargs=True
    )
    torch.testing.assert_close(selector.entropy(kinds_model, batch), torch.tensor(scores))
    hook.remove()
    assert len(given) == (1 if chunk is None else 3)
    assert all("token_marks" in names and not names & {"labels", "token_labels"} for names in given)
    chosen = selector.select(kinds_model, batch)
    assert chosen["task_ids"].tolist() == [features[i]["task_id"] for i in rows]
    want = kinds_model(**MultiTaskCollator(0)([features[i] for i in rows]))
    got = kinds_model(**chosen)
    torch.testing.assert_close(got.loss_per_task, want.loss_per_task)
    torch.testing.assert_close(got.token_logits, want.token_logits)
    torch.testing.assert_close(got.loss, want.loss)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_selection_of_a_mixture_asks_another_device_nothing(kinds_model, packed):
    features = mixture()
    batch = MultiTaskCollator(0, packed=packed)(features)
    there = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    if packed:
        there["lengths"] = tuple(len(f["input_ids"]) for f in features)
    model = kinds_model.to("meta")
    chosen = UncertaintySelector(model.config.task_info, 5, score_batch_size=5).select(model, there)
    assert chosen["token_marks"].shape == chosen["token_labels"].shape == chosen["input_ids"].shape
    model.train()
    model(**chosen).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_step_with_selection_asks_another_device_nothing(make_model):
    """Meta tensors have no values: whatever reads one raises. Scoring, choice and training step."""
    model = make_model(packed=True).to("meta")
    selector = UncertaintySelector(model.config.task_info, batch_size=3, score_batch_size=3)
    there = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in packed_batch().items()}
    chosen = selector.select(model, there)
    assert chosen["input_ids"].shape == (64,)  # the ten tokens of the three longest rows, and room
    assert chosen["max_seqlen"] == 5
    model.train()
    model(**chosen).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        int(chosen["cu_seqlens"][-1])  # as it would be seen
