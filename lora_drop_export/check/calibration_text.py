"""The text that weights are rounded on, in a model's tokens, cut into windows."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.errors import BundleError, InputError
from lora_drop_runtime.files import read_bounded
from lora_drop_runtime.text import TextCodec

CALIBRATION_TEXT = "calibration.txt"
WINDOWS, WINDOW = 32, 512  # at most, and tokens of each
LEAST_TOKENS = 2048  # of a text
MOST_BYTES = 1 << 30


def read_calibration_text(file: Path) -> str:
    """Raises InputError where it cannot be read as UTF-8, or has more than a GiB."""
    try:
        return read_bounded(file, MOST_BYTES).decode("utf-8")
    except (BundleError, UnicodeDecodeError) as error:
        raise InputError(
            "The calibration text cannot be read.",
            note=error.note if isinstance(error, BundleError) else f"{file}: {error}.",
            hint="Give a UTF-8 text file.",
        ) from None


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
        ids = np.random.default_rng(0).integers(0, vocab_size, (WINDOWS, window))
        return ids, "random tokens, the model brings no tokenizer"
    tokens = TextCodec.open(root / "tokenizer").encode(text)
    tokens = tokens[tokens < vocab_size]
    if len(tokens) < LEAST_TOKENS:
        raise InputError(
            "The calibration text is too short.",
            note=f"{file or 'The bundled one'} has {len(tokens)} of the model's tokens; needed are {LEAST_TOKENS}.",
            hint=f"Give a longer one; up to {WINDOWS * WINDOW} tokens are used.",
        )
    count = len(tokens) // window
    rows = tokens[: count * window].reshape(count, window)
    chosen = np.linspace(0, count - 1, min(WINDOWS, count)).round().astype(np.int64)
    return rows[chosen], f"the text {file}" if file else "the bundled text"
