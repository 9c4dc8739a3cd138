"""Tokenizers for tiny models."""

from __future__ import annotations

from pathlib import Path

from lora_drop_runtime.bundle.manifest import MANIFEST_NAME


def character_tokenizer(root: Path) -> None:
    """A token for each character, put into a bundle or another directory."""
    from tokenizers import Tokenizer, decoders, models

    from tests.support.bundles import record_again

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, []))
    tokenizer.decoder = decoders.Fuse()
    (root / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(root / "tokenizer/tokenizer.json"))
    if (root / MANIFEST_NAME).is_file():
        record_again(root)


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
