"""The errors a user can meet.

    LoraDropError
    ├── InputError        an option, prompt, file or request that cannot be served
    │   ├── PlanError     a drop list, ρ, k, surrogate or adapter that does not fit the model
    │   └── ModelError    a model with a feature the compiler does not support
    ├── BundleError       a bundle that is missing, damaged, of another format, or cannot run here
    │   └── NoDeviceError this machine lacks what would run it: nothing is wrong with the bundle
    └── VerificationError the compiled model and its reference disagree

Commands print the message without a traceback and exit with 2 (VerificationError: 1).
`assert` is for our own bugs.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

_MOST_BITS = 1024  # of a number that a message says: Python refuses to write the longest


def one_line(text: str) -> str:
    """A message or a name on one line: what a name may hold beside text, such as a line's end, is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class LoraDropError(Exception):
    """Base class.

    Args:
        fact: one sentence, what is wrong.
        note: both values, the one found and the one expected.
        hint: what to do about it.
    """

    exit_code = 2

    def __init__(self, fact: str, *, note: str = "", hint: str = "") -> None:
        fact, note, hint = one_line(fact), one_line(note), one_line(hint)
        self.fact, self.note, self.hint = fact, note, hint
        lines = [fact]
        if note:
            lines.append(f"Note: {note}")
        if hint:
            lines.append(f"Hint: {hint}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """From another process it comes as it is: by default its lines would be the fact, on one line."""
        return functools.partial(type(self), note=self.note, hint=self.hint), (self.fact,), self.__dict__


class InputError(LoraDropError):
    """An option, prompt, file or request that cannot be served."""


class PlanError(InputError):
    """A drop list, ratio, window, surrogate or adapter that does not fit the model."""


class ModelError(InputError):
    """A model with a feature the compiler does not support; the message names it."""


class BundleError(LoraDropError):
    """A bundle that is missing, damaged, of another format version, or cannot run here."""


class NoDeviceError(BundleError):
    """No driver, GPU, memory or provider here that would run it: nothing is wrong with the bundle."""


class VerificationError(LoraDropError):
    """The compiled model and its reference disagree."""

    exit_code = 1


class DraftsDoNotPay(UserWarning):
    """Under `k="auto"`: drafts cost more than they bring with this bundle, on this machine and text. No error."""


def wrong_type(what: str, value: object, needed: str, hint: str) -> InputError:
    """For an argument of the Python interface that is not of the type that it needs.

    Args:
        what: begins the sentence: `The number of new tokens`.
        needed: ends the note: `a whole number`.
    """
    try:
        shown = repr(value)
    except ValueError:  # a number in it is too long
        shown = "A value"
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    note = f"{shown} of type {type(value).__name__} was given, needed is {needed}."
    return InputError(f"{what} has the wrong type.", note=note, hint=hint)


def is_truth_value(value: Any) -> bool:
    """Python's or numpy's, which older versions of numpy take for a number."""
    return type(value).__name__ in ("bool", "bool_")


def whole_number(what: str, value: Any, hint: str) -> int:
    """An argument that has to be an int or a number of numpy's integers; a truth value is none.

    Raises:
        InputError: it is something else, or too long to be written; `what` begins the message.
    """
    if is_truth_value(value) or not hasattr(value, "__index__"):
        raise wrong_type(what, value, "a whole number", hint)
    try:
        number = operator.index(value)
    except TypeError:  # an array of several, or of another type
        raise wrong_type(what, value, "a whole number", hint) from None
    if (bits := number.bit_length()) > _MOST_BITS:
        raise InputError(f"{what} is out of range.", note=f"It has {bits} bits; the most are {_MOST_BITS}.", hint=hint)
    return number


def counted(number: int, what: str) -> str:
    """For a message: `1 token`, `2 tokens`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line and without a full stop, which some end with; the name of its
    class when it says nothing.
    """
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".") if lines else "") or type(error).__name__


def is_failure(error: BaseException) -> bool:
    """Whether a library has failed, and nobody ends the program: an Exception, or the panic of one written in Rust."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def lack_hint(error: BaseException) -> str | None:
    """What to do where an engine fails for what the system lacks; None where it fails for something else."""
    if any(word in str(error) for word in ("bad_alloc", "can't alloc", "Failed to allocate")):
        return "Free memory, or raise the limit on it (ulimit -v)."
    if any(words in str(error) for words in ("pthread_create failed", "Resource temporarily unavailable")):
        return "Ask for fewer threads, or raise the limit on them (ulimit -u, a container's limit on pids)."
    if "procfs" in str(error):  # ONNX Runtime asks /proc/self/fd for the path of a file of weights
        return "Mount /proc, without which ONNX Runtime opens no weights."
    return None


def engine_hint(error: BaseException) -> str:
    """What to do where an engine cannot load a graph, or cannot run a step."""
    return lack_hint(error) or "Check the bundle with: lora-drop inspect --check; or export the model again."
