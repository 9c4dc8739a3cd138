"""What the commands share: how options are said and parsed, what a command needs, and how it ends.

Options are said once, as the fields of a frozen settings class: name, default, help text. `add_options` makes arguments
of them, `settings_of` the settings of what was given; what was not given is left to the class. A field that is itself a
settings class stands for the options of that one.

A user's error is printed without a traceback and ends with 2 (a failed verification with 1), Ctrl-C with 130, SIGTERM
with 143, SIGHUP with 129.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .errors import InputError, LoraDropError

# Of the extra `export`, by import name, less what only GGUF files need
EXPORT_PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnx_graphsurgeon",
    "polygraphy",
    "ml_dtypes",
    "rich",
)


class Parser(argparse.ArgumentParser):
    """An argparse parser that complains in the project's three-part form."""

    def error(self, message: str) -> NoReturn:
        raise InputError(
            "The command line is not understood.",
            note=message[:1].upper() + message[1:] + ".",
            hint=f"See {self.prog} --help.",
        )


Settings = TypeVar("Settings")

_OPTION = "option"  # key of a field's metadata


@dataclasses.dataclass(frozen=True)
class _Option:
    """What a field says beside its type and default; see `option`."""

    help: str
    flag: str | None
    metavar: str | None
    choices: tuple[Any, ...] | None
    parse: Callable[[str], Any] | None
    repeat: bool
    group: str | None
    nargs: str | None
    const: Any


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    flag: str | None = None,
    metavar: str | None = None,
    choices: Sequence[Any] | None = None,
    parse: Callable[[str], Any] | None = None,
    repeat: bool = False,
    group: str | None = None,
    nargs: str | None = None,
    const: Any = None,
) -> Any:
    """A field of a settings class that is also an option of its command.

    The field's type chooses how text is read: str, int, float, Path, `tuple[int, ...]` and `tuple[str, ...]` (with
    commas between), bool (a flag that turns the default around), each also with `| None`.

    Args:
        default: without one the option is required.
        help: for `--help`; says the default where that helps.
        flag: `--name-of-the-field` when None.
        parse: reads the text instead.
        repeat: the option may be given several times; the field is a tuple of what was given.
        group: title of the group that `--help` shows it in.
        nargs, const: as argparse has them.
    """
    known = None if choices is None else tuple(choices)
    said = _Option(help, flag, metavar, known, parse, repeat, group, nargs, const)
    return dataclasses.field(default=default, metadata={_OPTION: said})


def numbers(text: str) -> tuple[int, ...]:
    """`1,3,5` as whole numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,3,5") from None


def names(text: str) -> tuple[str, ...]:
    """`one,two` as words."""
    return tuple(part for part in text.split(",") if part)


def _without_none(annotation: Any) -> Any:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _reader(annotation: Any, repeat: bool) -> Callable[[str], Any]:
    """What reads an option's text, by its field's type."""
    annotation = _without_none(annotation)
    if typing.get_origin(annotation) in (tuple, Sequence):
        item = typing.get_args(annotation)[0]
        if not repeat:
            return numbers if item is int else names
        annotation = item
    assert annotation in (str, int, float, Path), annotation
    return typing.cast("Callable[[str], Any]", annotation)


def _flag(field: dataclasses.Field[Any]) -> str:
    return field.metadata[_OPTION].flag or f"--{field.name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, settings: type[Any]) -> None:
    """Add an argument for every field of a settings class that `option` made; what is not given stays unset."""
    types_of = typing.get_type_hints(settings)
    groups: dict[str, Any] = {group.title: group for group in parser._action_groups if group.title}
    for field in dataclasses.fields(settings):
        said: _Option | None = field.metadata.get(_OPTION)
        if said is None:
            if dataclasses.is_dataclass(types_of[field.name]):
                add_options(parser, types_of[field.name])
            continue
        place: Any = parser
        if said.group is not None:
            if said.group not in groups:
                groups[said.group] = parser.add_argument_group(said.group)
            place = groups[said.group]
        arguments: dict[str, Any] = {"dest": field.name, "help": said.help, "default": argparse.SUPPRESS}
        if _without_none(types_of[field.name]) is bool:
            place.add_argument(_flag(field), action="store_const", const=not field.default, **arguments)
            continue
        arguments |= {"type": said.parse or _reader(types_of[field.name], said.repeat), "metavar": said.metavar}
        arguments |= {"choices": said.choices, "required": field.default is dataclasses.MISSING}
        if said.repeat:
            arguments["action"] = "append"
        if said.nargs is not None:
            arguments |= {"nargs": said.nargs, "const": said.const}
        place.add_argument(_flag(field), **arguments)


def settings_of(settings: type[Settings], arguments: argparse.Namespace) -> Settings:
    """The settings that were given on the command line; the class checks them and adds its defaults."""
    types_of = typing.get_type_hints(settings)
    given = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]  # a dataclass, which TypeVar cannot say
        if _OPTION not in field.metadata:
            if dataclasses.is_dataclass(types_of[field.name]):
                given[field.name] = settings_of(types_of[field.name], arguments)
        elif hasattr(arguments, field.name):
            value = getattr(arguments, field.name)
            given[field.name] = tuple(value) if field.metadata[_OPTION].repeat else value
    return settings(**given)


def given_flags(settings: type[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Flag → value of those options of a settings class that were given, also where the value is the default."""
    return {
        _flag(field): getattr(arguments, field.name)
        for field in dataclasses.fields(settings)
        if _OPTION in field.metadata and hasattr(arguments, field.name)
    }


def check_known(what: str, chosen: Any, known: Sequence[Any], flag: str = "") -> None:
    """Refuse an option's value that is not among those known; None is always.

    Args:
        what: is chosen, for the message: `form of attention`.
        flag: the option, which the hint then names.

    Raises:
        InputError: it is not known.
    """
    if chosen is not None and chosen not in known:
        *others, last = map(str, known)
        listed = f"known are {', '.join(others)} and {last}" if others else f"known is {last}"
        raise InputError(
            f"Unknown {what}.",
            note=f"{chosen!r} was given, {listed}.",
            hint=f"Use {flag} {known[0]}." if flag else f"Use {known[0]}.",
        )


def require_export_packages(reason: str) -> None:
    """Refuse at once, not after minutes of work, where a package of the exporter is missing. Imports none of them.

    Raises:
        InputError: one is not installed; `reason` says who needs it.
    """
    for name in EXPORT_PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                "The exporter's packages are not installed.",
                note=f"{name} is missing; {reason}.",
                hint="pip install 'lora-drop-export[export]'",
            )


class _Ended(SystemExit):
    """A signal told the command to end."""


def _end_behind(error: BaseException | None) -> BaseException | None:
    """The Ctrl-C or signal that a library made an error of its own of, as an import of C code does."""
    while error is not None and not isinstance(error, KeyboardInterrupt | _Ended):
        error = error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind like Ctrl-C, so that what is half done is removed; the exit codes are the shell's.

    Those that something else handles, or that are ignored as by `nohup`, are left alone.
    """

    def end(number: int, _: object) -> None:
        raise _Ended(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [signal.Signals[name] for name in names]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        ours = []  # where Python lets nobody handle signals
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    except Exception as error:
        cause = _end_behind(error)
        if cause is None:
            raise
        raise cause from None
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def run_command(command: Callable[[Sequence[str]], None], arguments: Sequence[str] | None) -> int:
    """Run a command's body and return its exit code."""
    try:
        with _ended_by_signals():
            command(sys.argv[1:] if arguments is None else arguments)
    except LoraDropError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        return 141
    return 0
