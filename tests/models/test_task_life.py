from __future__ import annotations

import pytest
import torch

from camtl.errors import UsageError
from camtl.models import CaMtlForMultiTask

OFF = {"attention_bias": "none", "alignment": "none", "norm_condition": "none", "bottleneck": "none"}


@pytest.mark.parametrize("switches", [{}, {"preset": "ca-mtl-large"}, OFF], ids=["ca-mtl", "large", "plain"])
def test_adding_a_task_leaves_the_others_alone(make_model, make_batch, tmp_path, switches):
    model = make_model(**switches)
    batch = make_batch()
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        before = model(**batch)
        number = model.add_task({"name": "new", "num_labels": 2, "labels": ["a", "b"]})
        assert number == 3
        after = model(**batch)
    for (
        name,
        tensor,
    ) in model.state_dict().items():  # bitwise; outputs to rounding, as the products are wider now
        assert torch.equal(tensor[: len(weights[name])], weights[name]), name
    torch.testing.assert_close(before.logits, after.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(before.loss, after.loss, rtol=1e-5, atol=1e-6)
    assert model.config.tasks == ["zeta", "alpha", "mid", "new"]
    ids = torch.full((5,), 3)
    loss = model(**{**batch, "task_ids": ids, "labels": torch.ones(5)}).loss
    loss.backward()
    assert model.heads.weight.grad[-2:].any()
    assert not model.heads.weight.grad[:-2].any()
    if not switches or "preset" in switches:
        assert model.bert.task_type_embeddings.weight.shape[0] == 4
        assert model.bert.task_type_embeddings.weight.grad[3].any()
    model.save_pretrained(tmp_path)
    back = CaMtlForMultiTask.from_pretrained(tmp_path)
    assert torch.equal(back(**batch).logits, after.logits)


def test_removing_a_task_leaves_the_others_alone(make_model, make_batch):
    model = make_model()
    batch = make_batch(tasks=(2, 0, 2, 0, 0))
    with torch.no_grad():
        before = model(**batch)
        model.remove_task("alpha")
        ids = torch.where(batch["task_ids"] == 2, 1, 0)
        after = model(**{**batch, "task_ids": ids})
    torch.testing.assert_close(before.logits, after.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(before.loss, after.loss, rtol=1e-5, atol=1e-6)
    assert model.config.tasks == ["zeta", "mid"]
    assert model.heads.sizes == (2, 3)
    assert model.heads.weight.shape == (5, 32)


def test_add_then_remove_is_the_identity(make_model):
    model = make_model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    info = model.config.task_info
    model.add_task({"name": "new", "num_labels": 5})
    model.set_active_task("new")
    model.remove_task("new")
    assert model.active_task is None
    assert model.config.task_info == info
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_label_scale_follows_the_tasks(make_model, make_batch):
    model = make_model()
    model.add_task({"name": "stars", "num_labels": 1, "label_mean": 3.0, "label_std": 2.0})
    assert model.label_mean.tolist() == [0.0, 0.0, 0.0, 3.0]
    batch = make_batch(tasks=(3,) * 5)
    labels = torch.linspace(1, 5, 5)
    out = model(**{**batch, "labels": labels})
    torch.testing.assert_close(out.loss, ((labels - 3) / 2 - out.logits[:, 0]).square().mean())
    model.remove_task("stars")
    assert not model.scales_labels


def test_bad_requests(make_model):
    model = make_model()
    with pytest.raises(UsageError, match=r"'zeta'.*already"):
        model.add_task({"name": "zeta", "num_labels": 2})
    with pytest.raises(UsageError, match="num_labels"):
        model.add_task({"name": "new"})
    with pytest.raises(UsageError, match=r"'nope'.*zeta, alpha, mid"):
        model.remove_task("nope")
    with pytest.raises(UsageError, match="'nope'"):
        model.set_active_task("nope")
    model.remove_task("zeta")
    model.remove_task("alpha")
    with pytest.raises(UsageError, match="only task"):
        model.remove_task("mid")


def test_a_model_needs_tasks(make_model):
    with pytest.raises(UsageError, match="at least one"):
        make_model(tasks=[])


def test_frozen_rows_stay_frozen(make_model):
    model = make_model()
    model.bert.task_type_embeddings.weight.requires_grad_(False)
    model.add_task({"name": "new", "num_labels": 2})
    assert not model.bert.task_type_embeddings.weight.requires_grad
    assert model.heads.weight.requires_grad


def test_models_of_one_config_have_task_lists_of_their_own(make_config):
    config = make_config()
    one, other = CaMtlForMultiTask(config), CaMtlForMultiTask(config)
    one.add_task({"name": "new", "num_labels": 2})
    one.config.task_info[1]["label_mean"] = 3.0
    assert one.bert.config is one.config
    assert other.config.tasks == config.tasks == ["zeta", "alpha", "mid"]
    assert other.config.task_info[1]["label_mean"] is None
