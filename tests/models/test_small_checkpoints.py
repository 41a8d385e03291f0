from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertTokenizer, ElectraConfig, ElectraModel

from camtl._io import read_json
from camtl.errors import UsageError
from camtl.models import CaMtlConfig, CaMtlForMultiTask, CaMtlModel
from camtl.models.freezing import is_conditional
from camtl.models.small_checkpoints import ADAPTER_FILE, read_base, save_small, weights_hash

from .conftest import SIZES

TASKS = [{"name": "z", "num_labels": 2, "labels": ["n", "y"]}, {"name": "a", "num_labels": 3}]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "good", "bad"]


@pytest.fixture
def base(make_bert, tmp_path):
    folder = tmp_path / "base"
    make_bert().save_pretrained(folder)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(folder)
    return folder


def train(model, amount=0.1):
    """Move every trainable parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * amount)
    return model


def make(base, **switches):
    fields = {"tasks": TASKS, "max_seq_length": 16, **switches}
    return train(CaMtlForMultiTask.from_pretrained(base, **fields))


def assert_same_weights(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name], tensor), name


@pytest.mark.parametrize("preset", ["ca-mtl", "ca-mtl-base", "ca-mtl-large"])
@pytest.mark.parametrize("freeze", [None, "0-1", "half"])
def test_what_is_left_out_comes_back(base, tmp_path, make_batch, preset, freeze):
    model = make(base, preset=preset, freeze=freeze)
    model.save_pretrained(tmp_path / "small", adapter_only=True)
    back = CaMtlForMultiTask.from_pretrained(tmp_path / "small")
    assert_same_weights(model, back)
    assert not back.training
    want = {**model.config.to_diff_dict(), "architectures": ["CaMtlForMultiTask"]}
    assert back.config.to_diff_dict() == want
    assert [n for n, p in back.named_parameters() if not p.requires_grad] == [
        n for n, p in model.named_parameters() if not p.requires_grad
    ]
    batch = make_batch(tasks=(0, 1, 0, 1, 0))
    batch["labels"] = torch.ones(5)
    assert torch.equal(back(**batch).logits, model(**batch).logits)


def test_only_what_differs_is_written(base, tmp_path):
    model = make(base, freeze="0-2")
    written = save_small(model, tmp_path / "small")
    names = set(load_file(tmp_path / "small" / ADAPTER_FILE))
    assert names == set(written.names)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert names == model.state_dict().keys() - frozen
    assert {n for n in model.state_dict() if is_conditional(n) or n.startswith("heads.")} <= names
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [ADAPTER_FILE, "config.json"]
    size = (tmp_path / "small" / ADAPTER_FILE).stat().st_size
    assert 0 <= size - written.nbytes < 12_000  # the header
    full = sum(t.numel() * 4 for t in model.state_dict().values())
    assert written.full_nbytes == full
    left = sum(p.numel() * 4 for n, p in model.named_parameters() if n in frozen)
    assert written.nbytes == full - left
    assert f"{written.nbytes / full:.1%}" in str(written)


def test_one_number_of_the_encoder_is_a_difference(base, tmp_path):
    model = CaMtlForMultiTask.from_pretrained(base, tasks=TASKS, max_seq_length=16)
    model.save_pretrained(tmp_path / "none", adapter_only=True)
    with torch.no_grad():
        model.bert.encoder.layer[2].attention.self.key.bias[3] += 1e-4
    model.save_pretrained(tmp_path / "one", adapter_only=True)
    none, one = (set(load_file(tmp_path / name / ADAPTER_FILE)) for name in ("none", "one"))
    assert one - none == {"bert.encoder.layer.2.attention.self.key.bias"}
    assert not none - one
    assert_same_weights(model, CaMtlForMultiTask.from_pretrained(tmp_path / "one"))


def test_minus_zero_is_another_number(base, tmp_path):
    weights = load_file(base / "model.safetensors")
    weights["pooler.dense.bias"].zero_()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    model = CaMtlForMultiTask.from_pretrained(base, tasks=TASKS, max_seq_length=16)
    with torch.no_grad():
        model.bert.pooler.dense.bias[5] = -0.0
    model.save_pretrained(tmp_path / "small", adapter_only=True)
    back = CaMtlForMultiTask.from_pretrained(tmp_path / "small")
    assert back.bert.pooler.dense.bias.signbit().nonzero().tolist() == [[5]]


def test_the_place_inside_a_repository_is_kept(base, tmp_path):
    (tmp_path / "repository").mkdir()
    base.rename(tmp_path / "repository" / "encoder")
    model = make(tmp_path / "repository", subfolder="encoder", freeze="0-1")
    model.tokenizer = BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    model.save_pretrained(tmp_path / "small", adapter_only=True)
    entry = read_json(tmp_path / "small" / "config.json")["base_encoder"]
    assert (entry["name"], entry["subfolder"]) == (str(tmp_path / "repository"), "encoder")
    assert len(load_file(tmp_path / "small" / ADAPTER_FILE)) < len(model.state_dict())
    back = CaMtlForMultiTask.from_pretrained(tmp_path / "small")
    assert_same_weights(model, back)
    assert back.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    # a small folder may itself be inside another
    (tmp_path / "shelf").mkdir()
    (tmp_path / "small").rename(tmp_path / "shelf" / "one")
    assert_same_weights(model, CaMtlForMultiTask.from_pretrained(tmp_path / "shelf", subfolder="one"))


def test_the_config_names_the_base(base, tmp_path):
    make(base).save_pretrained(tmp_path / "small", adapter_only=True)
    entry = read_json(tmp_path / "small" / "config.json")["base_encoder"]
    assert entry == {
        "name": str(base),
        "family": "bert",
        "sha256": weights_hash(read_base(str(base), "bert")),
    }
    back = CaMtlForMultiTask.from_pretrained(tmp_path / "small")
    assert back.config.base_encoder == {"name": str(base), "family": "bert"}
    assert back.config.name_or_path == str(tmp_path / "small")


def test_a_whole_model_knows_its_base_too(base, tmp_path):
    model = make(base, freeze="0-1")
    model.save_pretrained(tmp_path / "full")
    full = CaMtlForMultiTask.from_pretrained(tmp_path / "full")
    full.save_pretrained(tmp_path / "small", adapter_only=True)
    assert "bert.embeddings.word_embeddings.weight" not in load_file(tmp_path / "small" / ADAPTER_FILE)
    back = CaMtlForMultiTask.from_pretrained(tmp_path / "small")
    back.save_pretrained(tmp_path / "again")
    assert "sha256" not in read_json(tmp_path / "again" / "config.json")["base_encoder"]
    again = CaMtlForMultiTask.from_pretrained(tmp_path / "again")
    assert_same_weights(model, again)


def test_an_alias_stays_an_alias(base, tmp_path, monkeypatch):
    from camtl.models import loading

    monkeypatch.setitem(loading.ALIASES, "tiny", ("no_such_package", "model", str(base)))
    model = make("tiny", freeze="0-1")
    model.save_pretrained(tmp_path / "small", adapter_only=True)
    entry = read_json(tmp_path / "small" / "config.json")["base_encoder"]
    assert (entry["name"], entry["resolved"]) == ("tiny", str(base))
    assert_same_weights(model, CaMtlForMultiTask.from_pretrained(tmp_path / "small"))
    monkeypatch.delitem(loading.ALIASES, "tiny")  # elsewhere the alias may be unknown
    assert_same_weights(model, CaMtlForMultiTask.from_pretrained(tmp_path / "small"))


def test_a_base_with_another_head_or_other_names_is_the_same(make_bert, tmp_path):
    source = make_bert(BertForMaskedLM)
    source.save_pretrained(tmp_path / "mlm")
    source.bert.save_pretrained(tmp_path / "plain")
    model = make(tmp_path / "mlm", freeze="0-1")
    model.save_pretrained(tmp_path / "small", adapter_only=True)
    names = set(load_file(tmp_path / "small" / ADAPTER_FILE))
    assert "bert.pooler.dense.weight" in names  # the base has none
    torch.manual_seed(9)
    assert_same_weights(model, CaMtlForMultiTask.from_pretrained(tmp_path / "small"))
    back = CaMtlForMultiTask.from_pretrained(tmp_path / "small", base_model=tmp_path / "plain")
    assert_same_weights(model, back)
    assert back.config.base_encoder["name"] == str(tmp_path / "plain")


def test_other_families(tmp_path):
    torch.manual_seed(3)
    ElectraModel(ElectraConfig(**SIZES, embedding_size=16)).save_pretrained(tmp_path / "electra")
    model = make(tmp_path / "electra", freeze="0-1")
    model.save_pretrained(tmp_path / "small", adapter_only=True)
    assert read_json(tmp_path / "small" / "config.json")["base_encoder"]["family"] == "electra"
    assert_same_weights(model, CaMtlForMultiTask.from_pretrained(tmp_path / "small"))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_base_in_16_bit(make_bert, tmp_path, stored):
    make_bert().to(stored).save_pretrained(tmp_path / "base")
    model = make(tmp_path / "base", freeze="0-1", dtype=torch.float32)
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "small", adapter_only=True)
    assert "bert.embeddings.word_embeddings.weight" not in load_file(tmp_path / "small" / ADAPTER_FILE)
    assert_same_weights(model, CaMtlForMultiTask.from_pretrained(tmp_path / "small"))
    config = CaMtlConfig.from_pretrained(tmp_path / "small")
    config.dtype = None  # it may not say; then it is that of the small file, not of the base
    assert CaMtlForMultiTask.from_pretrained(tmp_path / "small", config=config).dtype == torch.float32
    half = CaMtlForMultiTask.from_pretrained(tmp_path / "small", dtype=stored)
    assert half.dtype == stored
    assert torch.equal(half.heads.weight, model.heads.weight.to(stored))


def test_the_encoder_alone_and_the_loading_info(base, tmp_path):
    model = make(base)
    model.save_pretrained(tmp_path / "small", adapter_only=True)
    encoder, info = CaMtlModel.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert_same_weights(model.bert, encoder)
    assert not info["missing_keys"]
    with pytest.raises(UsageError, match="CaMtlModel has no tasks"):
        encoder.save_pretrained(tmp_path / "no", adapter_only=True)


def test_tasks_come_and_go_after_loading(base, tmp_path):
    model = make(base, freeze="0-1")
    model.add_task({"name": "new", "num_labels": 4})
    model.save_pretrained(tmp_path / "small", adapter_only=True)
    back = CaMtlForMultiTask.from_pretrained(tmp_path / "small")
    assert back.config.tasks == ["z", "a", "new"]
    assert_same_weights(model, back)
    with pytest.raises(UsageError, match="this model's tasks are"):
        CaMtlForMultiTask.from_pretrained(tmp_path / "small", tasks=["z"])
    assert CaMtlForMultiTask.from_pretrained(tmp_path / "small", freeze=None).config.freeze is None


def test_a_larger_vocabulary(base, tmp_path):
    model = make(base, freeze="0-1")
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "small", adapter_only=True)
    back = CaMtlForMultiTask.from_pretrained(tmp_path / "small")
    assert back.config.vocab_size == 70
    assert_same_weights(model, back)


def test_one_folder_for_one_after_the_other(base, tmp_path):
    folder = tmp_path / "model"
    small = make(base)
    small.save_pretrained(folder, adapter_only=True)
    # a model of the same config is another model, and its folder is whole
    whole = train(CaMtlForMultiTask(CaMtlConfig.from_pretrained(folder)))
    whole.save_pretrained(folder)
    assert not (folder / ADAPTER_FILE).exists()
    assert_same_weights(whole, CaMtlForMultiTask.from_pretrained(folder))


def test_a_config_of_ones_own(base, tmp_path):
    model = make(base)
    model.save_pretrained(tmp_path / "small", adapter_only=True)
    config = CaMtlConfig.from_pretrained(tmp_path / "small")
    config.base_encoder, config.hidden_dropout_prob = None, 0.3
    back = CaMtlForMultiTask.from_pretrained(tmp_path / "small", config=config)
    assert_same_weights(model, back)
    assert back.config.hidden_dropout_prob == 0.3
    assert back.config.base_encoder["name"] == str(base)
    assert config.base_encoder is None
    plain = CaMtlForMultiTask.from_pretrained(base, config=config)
    assert plain.config.base_encoder["name"] == str(base)
    assert config.base_encoder is None


# -- the tokenizer --
def test_the_tokenizer_of_the_base_is_not_written_again(base, tmp_path):
    model = make(base)
    want = model.predict(["the cat sat", "bad"], task="z")  # truncation and padding were used once
    model.save_pretrained(tmp_path / "small", adapter_only=True)
    assert not (tmp_path / "small" / "tokenizer.json").exists()
    back = CaMtlForMultiTask.from_pretrained(tmp_path / "small")
    assert back.predict(["the cat sat", "bad"], task="z") == want


def test_another_tokenizer_is_written(base, tmp_path):
    model = make(base)
    (tmp_path / "other.txt").write_text("\n".join([*WORDS[:5], *reversed(WORDS[5:])]))
    model.tokenizer = BertTokenizer(vocab=str(tmp_path / "other.txt"))
    model.save_pretrained(tmp_path / "small", adapter_only=True)
    back = CaMtlForMultiTask.from_pretrained(tmp_path / "small")
    assert back.tokenizer.get_vocab() == model.tokenizer.get_vocab() != make(base).tokenizer.get_vocab()


# -- what cannot be --
def test_a_base_that_is_another(base, make_bert, tmp_path):
    model = make(base)
    model.save_pretrained(tmp_path / "small", adapter_only=True)
    torch.manual_seed(99)
    make_bert().save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError) as caught:
        CaMtlForMultiTask.from_pretrained(tmp_path / "small", base_model=str(tmp_path / "other"))
    message = str(caught.value)
    assert str(base) in message
    assert str(tmp_path / "other") in message
    for name in (base, tmp_path / "other"):
        assert weights_hash(read_base(str(name), "bert"))[:12] in message
    assert "\n" not in message
    # the base itself changed since
    weights = load_file(base / "model.safetensors")
    weights["pooler.dense.bias"][0] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="was made for the base encoder"):
        CaMtlForMultiTask.from_pretrained(tmp_path / "small")


def test_a_base_of_another_family_or_none(base, tmp_path):
    make(base).save_pretrained(tmp_path / "small", adapter_only=True)
    ElectraModel(ElectraConfig(**SIZES, embedding_size=16)).save_pretrained(tmp_path / "electra")
    for other, words in (
        (tmp_path / "electra", "family 'electra', but 'bert' is needed"),
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "small", "a model of camtl, not a plain encoder"),
    ):
        with pytest.raises(UsageError, match=words):
            CaMtlForMultiTask.from_pretrained(tmp_path / "small", base_model=str(other))
    base.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"base encoder cannot be used.*base_model="):
        CaMtlForMultiTask.from_pretrained(tmp_path / "small")
    CaMtlForMultiTask.from_pretrained(tmp_path / "small", base_model=tmp_path / "moved")


def test_a_model_whose_base_is_not_known(make_model, base, tmp_path):
    model = make_model(tasks=TASKS)
    with pytest.raises(UsageError, match="base encoder of this model is not known"):
        model.save_pretrained(tmp_path / "small", adapter_only=True)
    assert not (tmp_path / "small").exists()
    assert "base_encoder" not in model.config.to_diff_dict()
    model.save_pretrained(tmp_path / "small", adapter_only=True, base_model=str(base))
    assert_same_weights(model, CaMtlForMultiTask.from_pretrained(tmp_path / "small"))


def test_arguments_that_do_not_go_together(base, tmp_path):
    model = make(base)
    with pytest.raises(UsageError, match="max_shard_size: not accepted"):
        model.save_pretrained(tmp_path / "small", adapter_only=True, max_shard_size="1GB")
    with pytest.raises(UsageError, match="base_model is for adapter_only"):
        model.save_pretrained(tmp_path / "small", base_model="x")
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(UsageError, match="holds a whole model"):
        model.save_pretrained(tmp_path / "full", adapter_only=True)
    for folder in (tmp_path / "full", base):
        with pytest.raises(UsageError, match="not saved with adapter_only"):
            CaMtlForMultiTask.from_pretrained(folder, base_model=str(base))
    with pytest.raises(UsageError, match="is a file"):
        model.save_pretrained(base / "config.json", adapter_only=True)
    model.save_pretrained(tmp_path / "rank1", adapter_only=True, is_main_process=False)
    assert not (tmp_path / "rank1").exists()


def test_damaged_and_mixed_folders(base, tmp_path):
    folder = tmp_path / "small"
    make(base).save_pretrained(folder, adapter_only=True)
    weights = load_file(folder / ADAPTER_FILE)
    whole = (folder / ADAPTER_FILE).read_bytes()
    config = (folder / "config.json").read_text()

    save_file({k: v for k, v in weights.items() if k != "heads.bias"}, folder / ADAPTER_FILE)
    with pytest.raises(UsageError, match=r"does not fit config.json \(missing: \['heads.bias'\]"):
        CaMtlForMultiTask.from_pretrained(folder)
    save_file({**weights, "heads.bias": torch.zeros(2)}, folder / ADAPTER_FILE)
    with pytest.raises(UsageError, match=r"of other shape: \['heads.bias'\]"):
        CaMtlForMultiTask.from_pretrained(folder)
    save_file(weights, folder / ADAPTER_FILE, {"base": "0" * 64})
    with pytest.raises(UsageError, match="are of two models"):
        CaMtlForMultiTask.from_pretrained(folder)
    (folder / ADAPTER_FILE).write_bytes(whole[:-10])
    with pytest.raises(UsageError, match="damaged or was not copied whole"):
        CaMtlForMultiTask.from_pretrained(folder)
    (folder / ADAPTER_FILE).unlink()
    with pytest.raises(UsageError, match=f"{ADAPTER_FILE} is missing"):
        CaMtlForMultiTask.from_pretrained(folder)
    (folder / ADAPTER_FILE).write_bytes(whole)
    broken = json.loads(config)
    del broken["base_encoder"]["family"]
    (folder / "config.json").write_text(json.dumps(broken))
    with pytest.raises(UsageError, match="no whole base_encoder"):
        CaMtlForMultiTask.from_pretrained(folder)


def test_a_failure_leaves_what_was_there(base, tmp_path, monkeypatch):
    model = make(base)
    model.save_pretrained(tmp_path / "small", adapter_only=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        train(model).save_pretrained(tmp_path / "small", adapter_only=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()} == before


# -- the hash --
def test_the_hash_is_of_names_dtypes_shapes_and_bytes():
    state = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}
    want = weights_hash(state)
    assert weights_hash(dict(reversed(state.items()))) == want
    assert weights_hash({**state, "b": state["b"].t().contiguous().t()}) == want
    others = [
        {**state, "b": state["b"].view(3, 2)},
        {**state, "b": state["b"] + 1},
        {**state, "b": state["b"].double()},
        {"c": state["b"], "a": state["a"]},
        {"b": state["b"]},
    ]
    hashes = {want, *map(weights_hash, others)}
    assert len(hashes) == 1 + len(others)
    # a constant: files written today are to be read by later versions
    assert weights_hash({"x": torch.tensor([1.0, 2.0])})[:16] == "8f80bf5ac9551543"


def test_saving_draws_no_random_numbers_and_says_what_was_written(make_bert, tmp_path, caplog):
    make_bert(BertForMaskedLM).save_pretrained(tmp_path / "base")  # it has no pooler
    model = make(tmp_path / "base")
    state = torch.random.get_rng_state()
    with caplog.at_level(logging.INFO, logger="camtl"):
        model.save_pretrained(tmp_path / "small", adapter_only=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert "of the full model's" in caplog.text


def test_a_base_below_the_working_directory_is_found_from_another(base, tmp_path, monkeypatch, make_batch):
    monkeypatch.chdir(base.parent)
    model = make("base", freeze="0-1")
    model.save_pretrained("small", adapter_only=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    back = CaMtlForMultiTask.from_pretrained(tmp_path / "small")
    assert_same_weights(model, back)
    assert back.tokenizer("the cat")["input_ids"] == [2, 5, 6, 3]
    back.save_pretrained(tmp_path / "again", adapter_only=True)  # and saved from there
    assert_same_weights(model, CaMtlForMultiTask.from_pretrained(tmp_path / "again"))
    # moved away it is told by the name it was given
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"its base encoder cannot be used.*base.*base_model="):
        CaMtlForMultiTask.from_pretrained(tmp_path / "small")
    moved = CaMtlForMultiTask.from_pretrained(tmp_path / "small", base_model=tmp_path / "moved")
    assert_same_weights(model, moved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"num_hidden_layers": SIZES["num_hidden_layers"] + 1},
            r"its encoder\.layer\.\d\..* which the model lacks",
        ),
        ({"intermediate_size": 40}, r"its .*intermediate.* that of the model \("),
    ],
    ids=["a layer too many", "another width"],
)
def test_a_base_of_another_shape_is_refused(base, make_bert, tmp_path, change, words):
    model = make(base)
    make_bert(**change).save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match=f"is not the encoder that this model was made from: {words}"):
        model.save_pretrained(tmp_path / "small", adapter_only=True, base_model=tmp_path / "other")
    assert not (tmp_path / "small").exists()
