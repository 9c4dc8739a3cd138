"""Which tokenizers a checkpoint is seen to have: those that transformers reads, whatever their files are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lora_drop_runtime.errors import InputError, ModelError
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lora_drop_export.checkpoint import open as opening


def byte_level(directory: Path) -> Tokenizer:
    """A tokenizer of GPT-2's kind, as vocab.json and merges.txt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(["a banana and an ant"] * 9, trainer)
    tokenizer.model.save(str(directory))
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return tokenizer


def test_a_vocabulary_and_merges_alone(tmp_path: Path) -> None:
    ours = byte_level(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "merges.txt", "vocab.json"]
    found = opening.read_tokenizer(tmp_path, False)
    assert found("a banana")["input_ids"] == ours.encode("a banana").ids


def test_a_directory_without_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert opening.read_tokenizer(tmp_path, False) is None


def test_the_chat_template_of_a_processor(tmp_path: Path) -> None:
    """The file that many checkpoints of models that see have; the tokenizer's own goes before it."""
    byte_level(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}!"}))
    found = opening.read_tokenizer(tmp_path, False)
    assert found.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"
    (tmp_path / "chat_template.jinja").write_text("own")
    assert opening.read_tokenizer(tmp_path, False).chat_template == "own"
    (tmp_path / "chat_template.jinja").unlink()
    for damaged in ("{", "{}"):
        (tmp_path / "chat_template.json").write_text(damaged)
        with pytest.raises((InputError, ModelError), match="cannot be read"):
            opening.read_tokenizer(tmp_path, False)


def test_a_package_that_a_model_file_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers says that the file cannot be parsed."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    monkeypatch.setattr(opening, "find_spec", lambda _: None)
    with pytest.raises(ModelError) as refused:
        opening.read_tokenizer(tmp_path, False)
    assert "pip install sentencepiece" in refused.value.hint
