"""Tasks that read tokens, positions or spans come and go, are saved, loaded, counted and described."""

from __future__ import annotations

import pytest
import torch

from camtl.errors import UsageError
from camtl.models import CaMtlConfig, CaMtlForMultiTask, CaMtlModel
from camtl.models.task_info import normalise_tasks

from .token_batches import ALL, ANSWER, CHOICE, POOLED, TAGS, WORDS, step


@pytest.mark.parametrize(
    ("base", "info"),
    [
        ([POOLED], TAGS),
        ([POOLED], WORDS),
        ([TAGS], POOLED),
        ([TAGS], WORDS),
        ([WORDS, CHOICE], ANSWER),
        ([WORDS, CHOICE], WORDS),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "+".join(i["name"] for i in value),
)
def test_add_and_remove(make_model, mixed, tmp_path, base, info):
    info = {**info, "name": "new"}
    model = make_model(tasks=base, num_hidden_layers=2).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    infos = [*base, info]
    tasks = [b % len(base) for b in range(8)]
    batch = mixed(tasks=tuple(tasks), infos=infos)
    names = ("loss", "loss_per_task", "logits", "token_logits", "entropy")
    with torch.no_grad():
        want = model(**batch)
    number = model.add_task(info)
    assert number == len(base)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float64
        if name in before:
            assert torch.equal(tensor[: len(before[name])], before[name]), name
        elif name.endswith("bias"):
            assert not tensor.any()
        else:
            assert 0.01 < tensor.std() < 0.04, name
    out = model(**batch)
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(out.entropy, want.entropy)
    torch.testing.assert_close(out.loss_per_task[: len(base)], want.loss_per_task)
    own = mixed(tasks=(number,) * 8, infos=infos)
    _, gradients = step(model, own)
    head = "token_heads" if info.get("reads") in ("tokens", "positions") else "heads"
    assert gradients[f"{head}.weight"][-info["num_labels"] :].any()
    assert ("span_pooler.weight" in gradients) == any(i.get("reads") == "spans" for i in infos)

    model.save_pretrained(tmp_path)
    back = CaMtlForMultiTask.from_pretrained(tmp_path, dtype=torch.float64)
    assert back.config.task_info == model.config.task_info
    assert back.state_dict().keys() == model.state_dict().keys()
    for name in names:
        if want.get(name) is not None:
            torch.testing.assert_close(back(**batch)[name], model(**batch)[name], rtol=0, atol=0)

    model.remove_task("new")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    with torch.no_grad():
        again = model(**batch)
    for name in names:
        if want.get(name) is not None:
            torch.testing.assert_close(again[name], want[name], rtol=0, atol=0)


def test_removing_from_the_middle(make_model, mixed):
    model = make_model(tasks=ALL)
    batch = mixed(tasks=(3, 0, 2, 3, 5, 0, 2, 3))
    want = model(**batch)
    for name in ("pair", "score"):
        model.remove_task(name)
    ids = torch.tensor([0, 9, 1, 2, 9, 3])[batch["task_ids"]]
    got = model(**{**batch, "task_ids": ids})
    torch.testing.assert_close(got.loss_per_task, want.loss_per_task[[0, 2, 3, 5]])
    torch.testing.assert_close(got.token_logits, want.token_logits)
    torch.testing.assert_close(got.entropy, want.entropy)
    model.remove_task("words")
    assert model.heads is None
    assert model.span_pooler is None
    for name in ("answer", "choice"):
        model.remove_task(name)
    assert model.token_heads.weight.shape == (5, 32)
    model.add_task({**POOLED, "name": "again"})
    model.remove_task("tags")
    assert model.token_heads is None
    assert {n for n in model.state_dict() if not n.startswith("bert.")} == {"heads.weight", "heads.bias"}


def test_new_modules_follow_the_model(make_model):
    model = make_model(tasks=[POOLED]).to(torch.bfloat16).train()
    for info in (TAGS, WORDS):
        model.add_task(info)
    for module in (model.token_heads, model.span_pooler):
        assert module.training
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_names_counts_and_freezing(make_model):
    model = make_model(tasks=ALL, freeze="half", randomise=False)
    heads = {name: p for name, p in model.named_parameters() if not name.startswith("bert.")}
    assert {name: list(p.shape) for name, p in heads.items()} == {
        "heads.weight": [6, 32],
        "heads.bias": [6],
        "span_pooler.weight": [32, 96],
        "span_pooler.bias": [32],
        "token_heads.weight": [8, 32],
        "token_heads.bias": [8],
    }
    assert all(p.requires_grad for p in heads.values())
    for name, p in heads.items():
        assert model.no_weight_decay(name) == name.endswith(".bias")
        assert (0.01 < p.std() < 0.03) if name.endswith("weight") else not p.any()
    assert not heads.keys() & {name for name, _ in model.conditional_parameters()}
    counts = model.parameter_counts()
    size = sum(p.numel() for p in heads.values())
    assert counts["groups"]["decoders"] == size
    assert counts["encoder"] == counts["total"] - size == sum(p.numel() for p in model.bert.parameters())
    assert "other" not in counts["groups"]


def test_the_encoder_alone_leaves_heads_of_all_kinds_out(make_model, tmp_path):
    model = make_model(tasks=ALL)
    model.save_pretrained(tmp_path)
    encoder = CaMtlModel.from_pretrained(tmp_path)
    theirs = {f"bert.{name}": p for name, p in encoder.named_parameters()}
    own = {name: p for name, p in model.named_parameters() if name.startswith("bert.")}
    assert theirs.keys() == own.keys()
    assert all(torch.equal(p, theirs[name]) for name, p in own.items())


def test_an_encoder_checkpoint_gets_new_heads(make_bert, tmp_path):
    make_bert().save_pretrained(tmp_path)
    model = CaMtlForMultiTask.from_pretrained(tmp_path, tasks=ALL, max_seq_length=16)
    assert 0.01 < model.token_heads.weight.std() < 0.03
    assert 0.01 < model.span_pooler.weight.std() < 0.03
    assert not model.token_heads.bias.any()


def test_the_released_format_has_no_such_heads(make_model):
    model = make_model(preset="ca-mtl-base", tasks=[POOLED, TAGS, WORDS])
    with pytest.raises(UsageError, match="'tags' reads tokens, 'words' reads spans"):
        model.to_reference()
    for name in ("tags", "words"):
        model.remove_task(name)
    state = model.to_reference()
    with pytest.raises(UsageError, match="'pair' reads spans"):
        CaMtlForMultiTask.from_reference(
            state, config={"num_attention_heads": 4}, tasks=[{**POOLED, "reads": "spans"}]
        )


# -- task_info
def test_what_tasks_read_is_checked(make_config):
    bare = {"name": "c", "num_labels": 1, "reads": "positions"}
    infos = normalise_tasks([TAGS, POOLED, CHOICE, bare], None)
    assert [info["reads"] for info in infos] == ["tokens", "pooled", "positions", "positions"]
    assert [info["loss"] for info in infos] == ["ce"] * 4
    assert infos[3]["type"] == "classification"
    for changes, words in (
        ({"reads": "letters"}, "reads 'letters'.*pooled, spans, tokens, positions"),
        ({"loss": "bce"}, "loss is 'bce'; accepted: ce, as it reads tokens"),
        ({"loss": "mse", "num_labels": 1}, "loss is 'mse'; accepted: ce"),
        ({"reads": "positions", "num_labels": 32}, r"num_labels is 32; accepted: 1\.\.31"),
    ):
        with pytest.raises(UsageError, match=f"task 'tags': {words}"):
            normalise_tasks([{**TAGS, **changes}], None)
    config = make_config(tasks=[TAGS, POOLED])
    stored = config.to_dict()
    for info in stored["task_info"]:
        info.pop("reads")  # as of a model from before
    assert [info["reads"] for info in CaMtlConfig.from_dict(stored).task_info] == ["pooled"] * 2


def test_other_reads_than_the_folders_are_refused(make_model, tmp_path):
    make_model(tasks=[TAGS, POOLED]).save_pretrained(tmp_path)
    assert CaMtlForMultiTask.from_pretrained(tmp_path, tasks=[TAGS, POOLED]).config.tasks == ["tags", "pair"]
    with pytest.raises(UsageError, match="'tags' has reads='tokens', but 'positions' was given"):
        CaMtlForMultiTask.from_pretrained(tmp_path, tasks=[{**TAGS, "reads": "positions"}, POOLED])
