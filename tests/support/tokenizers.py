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
