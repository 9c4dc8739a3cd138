"""How a task wants its texts written: lm-eval's `generation_kwargs` as sampling options.

until, max_gen_toks                 where a text ends
do_sample                           draws; without it the likeliest token is taken, whatever the temperature says
temperature, top_p, top_k, min_p    of the drawing
repetition_, presence_penalty,
frequency_penalty                   of either
seed                                in the place of the evaluation's own
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_drop_runtime import bounds
from lora_drop_runtime.decoding.sampling import SamplingOptions
from lora_drop_runtime.errors import InputError

MAX_NEW_TOKENS = 256  # where a task does not say, as in lm-eval
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_DRAWING = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # and where they are off
_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_KNOWN = (*_LENGTHS, "until", "do_sample", "temperature", *_DRAWING, *_PENALTIES, "seed")


@dataclass(frozen=True)
class Generation:
    """What `generation_kwargs` say; `sampling` has no seed yet."""

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: SamplingOptions
    seed: int | None

    @property
    def draws(self) -> bool:
        return self.sampling.temperature > 0

    def seeded(self, seed: int, *what: str | int) -> SamplingOptions:
        """The options with a seed that belongs to an item and a repeat of it; the task's own stands in for `seed`."""
        if not self.draws:
            return self.sampling
        name = " ".join(map(str, (self.seed if self.seed is not None else seed, *what)))
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
        return dataclasses.replace(self.sampling, seed=number)


def generation_of(options: Mapping[str, Any]) -> Generation:
    """lm-eval's options of a request.

    Raises:
        InputError: one that is not offered, or a value out of range.
    """
    unknown = [name for name in options if name not in _KNOWN]
    if unknown:
        raise InputError(
            "A task wants its texts written in a way that is not offered.",
            note=f"Its generation_kwargs have {', '.join(map(str, unknown))}; known are {', '.join(_KNOWN)}.",
            hint="Override them in a YAML file of your own (--include-path), or leave the task out.",
        )
    until = options.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(text for text in until if text)
    new_tokens = next((options[name] for name in _LENGTHS if options.get(name) is not None), MAX_NEW_TOKENS)
    if isinstance(new_tokens, float | str) and str(new_tokens).removesuffix(".0").isdecimal():
        new_tokens = int(float(new_tokens))
    new_tokens = bounds.TOKENS.whole("A task's max_gen_toks", new_tokens)
    temperature = options.get("temperature")
    draws = options.get("do_sample")
    if draws is None:
        draws = bool(temperature)
    if not draws:
        temperature = 0.0
    elif temperature is None:
        temperature = 1.0
    known = {**_DRAWING, **_PENALTIES} if draws else _PENALTIES
    given: dict[str, Any] = {name: off if options.get(name) is None else options[name] for name, off in known.items()}
    sampling = SamplingOptions(temperature=temperature, **given)
    return Generation(until, new_tokens, sampling, options.get("seed"))
