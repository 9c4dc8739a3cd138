"""Tokenizers for tiny models."""

from __future__ import annotations

from pathlib import Path


def character_tokenizer(root: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, []))
    tokenizer.decoder = decoders.Fuse()
    (root / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(root / "tokenizer/tokenizer.json"))


def with_tokenizer(name: str, directory: Path) -> Path:
    """The tiny model of a family, saved with a tokenizer that knows t0 … t130."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.support.models import FAMILIES

    FAMILIES[name]().save_pretrained(directory)
    vocabulary = {f"t{n}": n for n in range(131)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(directory)
    return directory
