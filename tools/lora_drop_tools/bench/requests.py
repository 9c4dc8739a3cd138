"""The requests that a benchmark runs: prompts of a length, and what fits into a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.schedule import PeriodicSchedule
from lora_drop_runtime.text import TextCodec

from .result import Request

Ids = npt.NDArray[np.int64]
CONTEXTS = (128, 2048)
FEWEST_CYCLES = 2  # in a request, for each k
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


def longest_prompt(bundles: Mapping[str, Bundle], new_tokens: int) -> int:
    """Tokens that all bundles take before `new_tokens` more; at least 1, which `check` may refuse."""
    limits = [bundle.manifest.limits for bundle in bundles.values()]
    return max(1, min(min(one.max_prompt_len, one.max_seq_len - new_tokens) for one in limits))


def check(bundles: Mapping[str, Bundle], windows: Sequence[int], requests: Sequence[Request], repeats: int) -> None:
    """Refuse before any work what would fail or mean nothing after minutes.

    Raises:
        InputError: k, context, batch, new tokens or repeats out of range, or more than a bundle allows.
    """
    if repeats < 2:
        raise InputError(
            "There are too few repeats.",
            note=f"--repeats is {repeats}; the noise is what repeats differ by, so it takes 2.",
            hint="Use for example --repeats 5.",
        )
    for k in windows:
        PeriodicSchedule(k)
    for request in requests:
        if request.context < 1 or request.rows < 1:
            raise InputError(
                "A prompt length or batch is out of range.",
                note=f"{request.context} tokens in {request.rows} rows were asked for, the smallest is 1.",
                hint="Use for example --contexts 128,2048 --batches 1.",
            )
        longest = max(windows)
        needed = FEWEST_CYCLES * (longest + 1) + 1
        if request.new_tokens < needed:
            raise InputError(
                "There are too few new tokens to measure.",
                note=f"--new-tokens is {request.new_tokens}; {FEWEST_CYCLES} cycles of k = {longest} take {needed}.",
                hint=f"Use at least --new-tokens {needed}, or a smaller --k.",
            )
        for name, bundle in bundles.items():
            limits = bundle.manifest.limits
            total = request.context + request.new_tokens
            for what, value, limit, option in (
                ("prompts of", request.context, limits.max_prompt_len, "--max-prompt-len"),
                ("sequences of", total, limits.max_seq_len, "--max-seq-len"),
                ("batches of", request.rows, limits.max_batch, "--max-batch"),
            ):
                if value > limit:
                    raise InputError(
                        "The bundle does not allow what is to be measured.",
                        note=f"It takes {what} {value}, {name} allows {limit}.",
                        hint=f"Ask for less, or export with a larger {option}.",
                    )
