"""The requests that a benchmark runs: prompts of a length, and what fits into a bundle."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.text import TextCodec

from .result import Request
from .settings import BenchSettings

Ids = npt.NDArray[np.int64]
CONTEXTS = (128, 2048)
TEXT = (
    "The harbour town wakes before the sun does. Boats come in with the tide, gulls follow them, and the first "
    "crates of fish are on the quay while the lamps still burn. Mara keeps the ledger: how many crates, from "
    "which boat, at what price, and who is to be paid on Friday. She writes small and quickly, because the wind "
    "turns the pages. At seven the baker opens; at eight the school bell rings; by nine the market is so loud "
    "that nobody hears the sea. When the crates are sold she adds the columns twice, once from the top and once "
    "from the bottom, and only if both sums agree does she close the book. Her father taught her that. A mistake, "
    "he used to say, does not mind being found, but it minds being found by somebody else. In the afternoon the "
    "town is quiet again. Nets are mended, ropes are tarred, and children count the ships on the horizon, which "
    "are always fewer than they hoped. "
)


def prompts_of(bundle: Bundle, context: int, rows: int) -> Ids:
    """Prompts int64 [rows, context]: this module's text, again and again, from another place in each row.

    Without a tokenizer random ids, the same ones each time.
    """
    directory = bundle.root / "tokenizer"
    if (directory / "tokenizer.json").is_file():
        ids = TextCodec.open(directory).encode(TEXT)
    else:
        ids = np.random.default_rng(0).integers(0, bundle.manifest.model.vocab_size, 256)
    return np.stack([np.resize(np.roll(ids, -11 * row), context) for row in range(rows)]).astype(np.int64)


def _longest_prompt(bundles: Mapping[str, Bundle], new_tokens: int) -> int:
    """Tokens that all bundles take before `new_tokens` more; at least 1, which `requests_of` may refuse."""
    limits = [bundle.manifest.limits for bundle in bundles.values()]
    return max(1, min(min(one.max_prompt_len, one.max_seq_len - new_tokens) for one in limits))


def requests_of(bundles: Mapping[str, Bundle], settings: BenchSettings) -> list[Request]:
    """What every arm is asked: each batch with each context.

    Raises:
        InputError: more than a bundle allows.
    """
    contexts, new_tokens = settings.contexts, settings.new_tokens
    if contexts is None:
        longest = _longest_prompt(bundles, new_tokens)
        contexts = tuple(sorted({min(context, longest) for context in CONTEXTS}))
    requests = [Request(context, rows, new_tokens) for rows in settings.batches for context in contexts]
    for request in requests:
        for name, bundle in bundles.items():
            limits = bundle.manifest.limits
            for what, value, limit, flag in (
                ("prompts of", request.context, limits.max_prompt_len, "--max-prompt-len"),
                ("sequences of", request.context + new_tokens, limits.max_seq_len, "--max-seq-len"),
                ("batches of", request.rows, limits.max_batch, "--max-batch"),
            ):
                if value > limit:
                    raise InputError(
                        "The bundle does not allow what is to be measured.",
                        note=f"It takes {what} {value}, {name} allows {limit}.",
                        hint=f"Ask for less, or export with a larger {flag}.",
                    )
    return requests
