"""The sample text in a model's tokens, cut into the prompts and forced tokens that checks run on."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import Limits
from lora_drop_runtime.text import TextCodec

PROMPT_TOKENS = (24, 17)  # a ragged batch
SAMPLE_TEXT = "sample.txt"
PERPLEXITY_TOKENS = 1024  # at most, of the sample text


def sample_ids(root: Path, vocab_size: int) -> npt.NDArray[np.int64] | None:
    """The sample text in the model's tokens; None without a tokenizer."""
    if not (root / "tokenizer" / "tokenizer.json").is_file():
        return None
    text = resources.files(__package__).joinpath(SAMPLE_TEXT).read_text(encoding="utf-8")
    ids = TextCodec.open(root / "tokenizer").encode(text)
    return ids[ids < vocab_size]


def steps_that_fit(limits: Limits, k: int) -> int:
    """Decode steps of two whole cycles and one more, or as many as follow a prompt of one token."""
    return min(max(2 * (k + 1), 4) + 1, limits.max_seq_len - 2)


def sample_feeds(bundle: Bundle, steps: int) -> list[dict[str, Any]]:
    """Prompts and forced tokens: a sample text in the model's tokens, or random ids without a tokenizer."""
    limits, vocab_size = bundle.manifest.limits, bundle.manifest.model.vocab_size
    room = min(limits.max_prompt_len, limits.max_seq_len - steps - 1)
    lengths = np.array([min(n, room) for n in PROMPT_TOKENS[: limits.max_batch]], np.int64)
    needed = (int(lengths.max()) + steps) * len(lengths)
    sample = sample_ids(bundle.root, vocab_size)
    if sample is not None:
        ids = np.resize(sample, needed)
    else:
        ids = np.random.default_rng(0).integers(0, vocab_size, needed)
    rows = ids.reshape(len(lengths), -1)  # [B, prompt + steps]
    prompt = int(lengths.max())
    first = {"token_ids": np.ascontiguousarray(rows[:, :prompt]), "lengths": lengths}
    rest = [
        {"token_ids": np.ascontiguousarray(rows[:, prompt + j : prompt + j + 1]), "lengths": lengths}
        for j in range(steps)
    ]
    return [first, *rest]
