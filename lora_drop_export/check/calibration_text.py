"""The text that weights are rounded on, in a model's tokens, cut into windows."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.errors import BundleError, InputError, counted
from lora_drop_runtime.files import read_bounded, refuse_rows
from lora_drop_runtime.text import TextCodec

CALIBRATION_TEXT = "calibration.txt"
WINDOWS, WINDOW = 32, 512  # at most, and tokens of each
LEAST_TOKENS = 2048  # of a text
LEAST_KINDS = 16  # of tokens in it, which any prose or code has in a line or two
HELD_BACK = 8  # windows at most that nothing is rounded on
MOST_BYTES = 1 << 30


def _too_short(file: Path | None, found: str) -> InputError:
    return InputError(
        "The calibration text is too short.",
        note=f"{file or 'The bundled one'} has {found}; needed are {LEAST_TOKENS} tokens.",
        hint=f"Give a longer one; up to {WINDOWS * WINDOW} tokens are used.",
    )


def read_calibration_text(file: Path) -> str:
    """The text, without a byte order mark.

    Raises:
        InputError: it cannot be read as UTF-8, has rows, more than a GiB, or less than a byte for each token.
    """
    refuse_rows(file)
    try:
        data = read_bounded(file, MOST_BYTES)
        text = data.decode("utf-8-sig")
    except (BundleError, UnicodeDecodeError) as error:
        raise InputError(
            "The calibration text cannot be read.",
            note=error.note if isinstance(error, BundleError) else f"{file}: {error}.",
            hint="Give a UTF-8 text file.",
        ) from None
    if len(data) < LEAST_TOKENS:
        raise _too_short(file, counted(len(data), "byte"))
    return text


def _all_windows(root: Path, vocab_size: int, window: int, file: Path | None) -> npt.NDArray[np.int64] | None:
    """A text, the bundled one when None, as int64 [all windows, tokens]; None without a tokenizer."""
    text = (
        resources.files(__package__).joinpath(CALIBRATION_TEXT).read_text(encoding="utf-8")
        if file is None
        else read_calibration_text(file)
    )
    if not (root / "tokenizer" / "tokenizer.json").is_file():
        if file is not None:
            raise InputError(
                "The model has no tokenizer.",
                note=f"{file} has to become tokens.",
                hint="Put the tokenizer's files beside the weights.",
            )
        return None
    tokens = TextCodec.open(root / "tokenizer").encode(text)
    tokens = tokens[tokens < vocab_size]
    if len(tokens) < LEAST_TOKENS:
        raise _too_short(file, counted(len(tokens), "token"))
    kinds = len(np.unique(tokens))
    if kinds < LEAST_KINDS:
        raise InputError(
            "The calibration text says too little.",
            note=f"{file or 'The bundled one'} has {len(tokens)} tokens of {kinds} kinds; needed are {LEAST_KINDS}.",
            hint="Give a text such as the model is to read and write.",
        )
    count = len(tokens) // window
    return tokens[: count * window].reshape(count, window)


def _spread(count: int, most: int) -> npt.NDArray[np.int64]:
    """Of `count` windows the places of at most `most`, spread evenly."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)


def calibration_windows(
    root: Path, vocab_size: int, context: int, file: Path | None
) -> tuple[npt.NDArray[np.int64], str]:
    """Windows of a text, spread evenly over it, and what they are of, in words.

    Args:
        root: of the bundle, whose tokenizer is there already; without one they are random ids.
        context: tokens that the model can see.
        file: the text; the bundled one when None.

    Returns:
        int64 [N, S], N ≤ 32 and S = 512 unless the context is shorter.

    Raises:
        InputError: the text cannot be read, is too short, or there is no tokenizer for it.
    """
    window = min(WINDOW, context)
    rows = _all_windows(root, vocab_size, window, file)
    if rows is None:
        ids = np.random.default_rng(0).integers(0, vocab_size, (WINDOWS, window))
        return ids, "random tokens, the model brings no tokenizer"
    return rows[_spread(len(rows), WINDOWS)], f"the text {file}" if file else "the bundled text"


def held_back_windows(root: Path, vocab_size: int, context: int, file: Path | None) -> npt.NDArray[np.int64]:
    """Windows of the same text that `calibration_windows` leaves out, spread evenly: int64 [N, S], N ≤ 8.

    Raises:
        InputError: as there; it leaves no window, or there is no tokenizer.
    """
    window = min(WINDOW, context)
    rows = _all_windows(root, vocab_size, window, file)
    if rows is None:
        raise InputError(
            "The model has no tokenizer.",
            note="The perplexity of each form of the weights is that of a text.",
            hint="Put the tokenizer's files beside the weights, or give --block-size as a number.",
        )
    rest = np.delete(rows, _spread(len(rows), WINDOWS), axis=0)
    if not len(rest):
        raise InputError(
            "The calibration text is too short.",
            note=f"{file or 'The bundled one'} has {len(rows)} windows of {window} of the model's tokens; {WINDOWS} "
            "are kept for rounding by a text, and the perplexity of each form of the weights is that of others.",
            hint=f"Give one of {(WINDOWS + 1) * window} tokens at least; {(WINDOWS + HELD_BACK) * window} are used.",
        )
    return rest[_spread(len(rest), HELD_BACK)]
