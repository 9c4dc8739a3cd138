"""Tokenizers for tiny models."""

from __future__ import annotations

import json
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

    from tests.support.models import FAMILIES, MORE_FAMILIES

    (FAMILIES | MORE_FAMILIES)[name]().save_pretrained(directory)
    vocabulary = {f"t{n}": n for n in range(131)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(directory)
    return directory


MERGES = [
    '{"',
    '":',
    '":Ġ',
    ",Ġ",
    ',Ġ"',
    "ab",
    "tr",
    "tru",
    "true",
    "na",
    "nam",
    "name",
]  # tokens of several characters
END = "<end>"
MARKS = {  # of calls: is it special
    **dict.fromkeys(("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"), False),
    **dict.fromkeys(("[TOOL_CALLS]", "[ARGS]", "<|tool_call>", '<|"|>', "<tool_call|>"), True),
    **dict.fromkeys(("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"), True),
}


def byte_tokenizer(root: Path, *, merged: bool = False, calls: bool = False) -> int:
    """Tokens of bytes, as nearly all models have them: printable ASCII and the line's end, put into a bundle whose end
    token it becomes; returns its id.

    Args:
        merged: tokens of several characters, too.
        calls: tokens for the marks of tool calls.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from tests.support.bundles import record_again

    characters = ["Ġ", *map(chr, range(33, 127)), "Ċ"]
    known = [*characters, *(MERGES if merged else ())]
    # Each is made of the longest token that it begins with, and the rest
    halves = [
        max(((m[:i], m[i:]) for i in range(1, len(m)) if m[:i] in known and m[i:] in known), key=lambda h: len(h[0]))
        for m in known[len(characters) :]
    ]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(known)}, halves))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.add_tokens([AddedToken(mark, special=special) for mark, special in MARKS.items() if calls])
    (root / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(root / "tokenizer/tokenizer.json"))
    end = int(tokenizer.token_to_id(END))
    record_again(root)
    manifest = json.loads((root / MANIFEST_NAME).read_text())
    manifest["special_tokens"]["eos"] = [end]
    (root / MANIFEST_NAME).write_text(json.dumps(manifest))
    return end
