from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from camtl.data import MultiTaskCollator, MultiTaskDataset
from camtl.data.collating import bucket
from camtl.errors import UsageError


def tokenised(*rows, labels=True):
    columns = {
        "input_ids": [list(row) for row in rows],
        "token_type_ids": [[0] * (len(row) - 1) + [1] for row in rows],
        "length": [len(row) for row in rows],
    }
    if labels:
        columns["labels"] = [float(row[0]) for row in rows]
    return Dataset.from_dict(columns)


A = tokenised((1, 2, 3), (4, 5))
B = tokenised((6,), (7, 8, 9, 10), (11, 12))


def test_rows_are_numbered_task_after_task():
    data = MultiTaskDataset({"a": A, "b": B})
    assert (data.task_names, data.sizes, data.offsets, len(data)) == (["a", "b"], [2, 3], [0, 2], 5)
    got = [(data[i]["task_id"], data[i]["input_ids"].tolist(), data[i]["labels"]) for i in range(5)]
    assert got == [
        (0, [1, 2, 3], 1.0),
        (0, [4, 5], 4.0),
        (1, [6], 6.0),
        (1, [7, 8, 9, 10], 7.0),
        (1, [11, 12], 11.0),
    ]
    for bad in (5, -1):
        with pytest.raises(IndexError):
            data[bad]


def test_the_task_order_can_be_given():
    data = MultiTaskDataset({"a": A, "b": B}, ["b", "a"])
    assert data.sizes == [3, 2]
    assert data[3]["input_ids"].tolist() == [1, 2, 3]
    assert data[3]["task_id"] == 1
    for order in (["a"], ["a", "c"], ["a", "b", "c"]):
        with pytest.raises(UsageError, match="does not fit"):
            MultiTaskDataset({"a": A, "b": B}, order)


def test_selected_rows():
    data = MultiTaskDataset({"b": B.select([2, 0])})
    assert [data[i]["input_ids"].tolist() for i in range(2)] == [[11, 12], [6]]


def test_raw_text_is_refused():
    with pytest.raises(UsageError, match=r"'a' is not tokenised.*text"):
        MultiTaskDataset({"a": Dataset.from_dict({"text": ["x"]})})


def test_a_batch():
    data = MultiTaskDataset({"a": A, "b": B})
    batch = MultiTaskCollator(pad_token_id=99)([data[i] for i in (2, 1, 4)])
    assert batch["input_ids"].tolist() == [[6, 99], [4, 5], [11, 12]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1], [1, 1]]
    assert batch["token_type_ids"].tolist() == [[1, 0], [0, 1], [0, 1]]
    assert batch["task_ids"].tolist() == [1, 0, 1]
    assert batch["labels"].tolist() == [6.0, 4.0, 11.0]
    kinds = {name: tensor.dtype for name, tensor in batch.items()}
    assert kinds.pop("labels") == torch.float32
    assert set(kinds.values()) == {torch.int64}


def test_padding_to_a_multiple():
    collate = MultiTaskCollator(0, pad_to_multiple_of=8)
    assert collate([{"input_ids": [1] * 9, "task_id": 0}])["input_ids"].shape == (1, 16)
    assert collate([{"input_ids": [1] * 8, "task_id": 0}])["input_ids"].shape == (1, 8)
    with pytest.raises(UsageError):
        MultiTaskCollator(0, pad_to_multiple_of=0)


def test_no_row_is_longer_than_batches_say():
    collate = MultiTaskCollator(0, packed=True, max_seqlen=3)
    rows = [{"input_ids": [1] * length, "task_id": 0} for length in (3, 4)]
    assert collate(rows[:1])["max_seqlen"] == 3
    with pytest.raises(UsageError, match="a row has 4 tokens, more than max_seqlen=3"):
        collate(rows)
    with pytest.raises(UsageError, match="max_seqlen must be at least 1, given 0"):
        MultiTaskCollator(0, packed=True, max_seqlen=0)


def test_plain_lists_without_types_or_labels():
    batch = MultiTaskCollator(0)(
        [{"input_ids": [1, 2], "task_id": 3}, {"input_ids": [4], "task_id": 0, "labels": 1}]
    )
    assert "labels" not in batch
    assert batch["token_type_ids"].tolist() == [[0, 0], [0, 0]]
    assert MultiTaskDataset({"u": tokenised((1,), labels=False)})[0].keys() == {
        "input_ids",
        "token_type_ids",
        "task_id",
    }


def test_with_a_torch_loader():
    data = MultiTaskDataset({"a": A, "b": B})
    loader = torch.utils.data.DataLoader(data, batch_sampler=[[0, 2], [4]], collate_fn=MultiTaskCollator(0))
    assert [batch["task_ids"].tolist() for batch in loader] == [[0, 1], [1]]


@pytest.mark.parametrize("step", [None, 8, bucket], ids=["exact", "multiple", "bucket"])
def test_packed_batches_hold_the_padded_ones_tokens(step):
    data = MultiTaskDataset({"a": A, "b": B})
    rows = [data[i] for i in (2, 1, 4)]
    padded = MultiTaskCollator(99)(rows)
    packed = MultiTaskCollator(99, step, packed=True)(rows)
    assert packed.keys() == {"input_ids", "token_type_ids", "cu_seqlens", "max_seqlen", "task_ids", "labels"}
    real = padded["attention_mask"].bool()
    tokens = int(real.sum())
    assert packed["cu_seqlens"].dtype == torch.int32
    assert packed["cu_seqlens"].tolist() == [0, *real.sum(1).cumsum(0).tolist()]
    assert packed["max_seqlen"] == real.shape[1]
    for name in ("input_ids", "token_type_ids"):
        assert packed[name].dtype == torch.int64
        assert torch.equal(packed[name][:tokens], padded[name][real])
    size = {None: tokens, 8: -(-tokens // 8) * 8, bucket: 64}[step]
    assert packed["input_ids"][tokens:].tolist() == [99] * (size - tokens)
    assert packed["token_type_ids"].shape == (size,)
    assert torch.equal(packed["task_ids"], padded["task_ids"])
    assert torch.equal(packed["labels"], padded["labels"])
    assert MultiTaskCollator(99, packed=True, max_seqlen=64)(rows)["max_seqlen"] == 64


def test_buckets_are_few_and_waste_little():
    sizes = [bucket(n) for n in range(1, 20_000)]
    assert all(b >= n for n, b in enumerate(sizes, 1))
    assert all(b <= max(64, 1.125 * n + 64) for n, b in enumerate(sizes, 1))
    assert len(set(sizes)) < 70
    assert {b % 64 for b in sizes} == {0}


# -- marks and labels of tokens
TAGGED = Dataset.from_dict(
    {
        "input_ids": [[1, 2, 3], [4, 5]],
        "token_type_ids": [[0, 0, 0], [0, 0]],
        "length": [3, 2],
        "token_marks": [[0, 1, 1], [1, 0]],
        "token_labels": [[-100, 4, 0], [2, -100]],
        "row": [7, 8],
        "token_begin": [[-1, 0, 1], [0, -1]],
        "token_end": [[-1, 0, 1], [0, -1]],
    }
)


def test_rows_with_marks_and_labels_of_tokens():
    data = MultiTaskDataset({"a": A, "tags": TAGGED.select([1, 0])})
    assert "token_marks" not in data[0]
    row = data[3]
    assert row.keys() == {"input_ids", "token_type_ids", "token_marks", "token_labels", "task_id"}
    assert (row["token_marks"].tolist(), row["token_marks"].dtype) == ([0, 1, 1], "int8")
    assert (row["token_labels"].tolist(), row["token_labels"].dtype) == ([-100, 4, 0], "int32")
    wrong = TAGGED.remove_columns("token_marks").add_column("token_marks", [[0, 1], [1, 0, 0]])
    with pytest.raises(UsageError, match="'tags': token_marks must have one entry for each of input_ids"):
        MultiTaskDataset({"tags": wrong})


def test_a_batch_has_them_if_any_row_does():
    data = MultiTaskDataset({"a": A, "tags": TAGGED})
    batch = MultiTaskCollator(99)([data[i] for i in (0, 3, 2)])
    assert batch["token_marks"].tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 1]]
    assert batch["token_labels"].tolist() == [[-100] * 3, [2, -100, -100], [-100, 4, 0]]
    assert batch["labels"].tolist() == [1.0, 0.0, 0.0]  # labels on their tokens are labels
    assert batch.keys() == {
        "input_ids", "attention_mask", "token_type_ids", "token_marks", "token_labels", "task_ids", "labels",
    }  # fmt: skip
    assert {t.dtype for name, t in batch.items() if name != "labels"} == {torch.int64}
    without = MultiTaskCollator(99)([data[0], data[1]])
    assert not without.keys() & {"token_marks", "token_labels"}


def test_rows_without_labels_keep_their_marks():
    unlabelled = MultiTaskDataset({"tags": TAGGED.remove_columns("token_labels")})
    batch = MultiTaskCollator(0)([unlabelled[0], unlabelled[1]])
    assert batch["token_marks"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert not batch.keys() & {"labels", "token_labels"}
    labelled = MultiTaskDataset({"tags": TAGGED})
    mixed = MultiTaskCollator(0)([unlabelled[0], labelled[1]])
    assert mixed["token_labels"].tolist() == [[-100] * 3, [2, -100, -100]]
    assert "labels" not in mixed


@pytest.mark.parametrize("step", [None, 8], ids=["exact", "multiple"])
def test_packed_marks_and_labels(step):
    data = MultiTaskDataset({"a": A, "tags": TAGGED})
    rows = [data[i] for i in (3, 0, 2)]
    padded, packed = MultiTaskCollator(99)(rows), MultiTaskCollator(99, step, packed=True)(rows)
    real = padded["attention_mask"].bool()
    for name, fill in (("token_marks", 0), ("token_labels", -100)):
        assert packed[name].dtype == torch.int64
        assert torch.equal(packed[name][:8], padded[name][real])
        assert packed[name].shape == packed["input_ids"].shape
        assert (packed[name][8:] == fill).all()
    assert torch.equal(packed["labels"], padded["labels"])


def test_rows_of_several_labels():
    topics = Dataset.from_dict(
        {
            "input_ids": [[1, 2], [3]],
            "token_type_ids": [[0, 0], [0]],
            "labels": [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]],
        }
    )
    data = MultiTaskDataset({"topics": topics.select([1, 0]), "a": A, "tags": TAGGED})
    for packed in (False, True):
        batch = MultiTaskCollator(0, packed=packed)([data[i] for i in (0, 3, 4, 1)])
        assert batch["labels"].dtype == torch.float32
        assert batch["labels"].tolist() == [[0, 1, 0], [4, 0, 0], [0, 0, 0], [1, 0, 1]]
    assert MultiTaskCollator(0)([data[3], data[4]])["labels"].shape == (2,)
