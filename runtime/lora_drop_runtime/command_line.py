"""What the commands share: how options are said and parsed, what a command needs, and how it ends.

Options are said once, as the fields of a frozen settings class: name, default, help text. `add_options` makes arguments
of them, `settings_of` the settings of what was given; what was not given is left to the class. A field that is itself a
settings class stands for the options of that one. `check_options` checks values, whether they were typed or come from
Python.

A user's error is printed without a traceback and ends with 2 (a failed verification with 1), Ctrl-C with 130, SIGTERM
with 143, SIGHUP with 129; on Windows Ctrl-Break, or a window that is closed, with 149.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import errno
import functools
import importlib.metadata
import importlib.util
import os
import re
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

from .bounds import Bounds
from .errors import InputError, LoraDropError, first_line
from .files import LACKING

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

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # argparse takes `-1e-3`, `-inf` and `-1,3` for options, and says that a value is missing
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Python 3.11 takes the value of `--option=--` for the end of the options, and makes an empty list of it."""
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        """What a command does not know is its own error, not that of the program above it: the hint names its help."""
        found, unknown = super().parse_known_args(*arguments, **options)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        raise InputError(
            "The command line is not understood.",
            note=message[:1].upper() + message[1:] + ".",
            hint=f"See {self.prog} --help.",
        )


def add_version(parser: argparse.ArgumentParser) -> None:
    """`--version`, which prints the package's and ends."""
    version = importlib.metadata.version("lora-drop-export")
    parser.add_argument("--version", action="version", version=f"{parser.prog} {version}", help="print the version")


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
    bounds: Bounds | None


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
    bounds: Bounds | None = None,
) -> Any:
    """A field of a settings class that is also an option of its command.

    The field's type chooses how text is read: str, int, float, Path, `tuple[int, ...]` and `tuple[str, ...]` (with
    commas between), bool (a flag that turns the default around), each also with `| None`, numbers also with a word in
    their place: `int | Literal["auto"]`.

    Args:
        default: without one the option is required.
        help: for `--help`; says the default where that helps.
        flag: `--name-of-the-field` when None.
        parse: reads the text instead.
        repeat: the option may be given several times; the field is a tuple of what was given.
        group: title of the group that `--help` shows it in.
        nargs, const: as argparse has them.
        bounds: of a number, or of each of several; `--help` says them.
    """
    known = None if choices is None else tuple(choices)
    said = _Option(help, flag, metavar, known, parse, repeat, group, nargs, const, bounds)
    return dataclasses.field(default=default, metadata={_OPTION: said})


def numbers(text: str, words: Sequence[str] = ()) -> tuple[Any, ...]:
    """`1,3,5` as whole numbers; `words` stay as they are."""
    try:
        return tuple(part if part in words else int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,3,5") from None


def names(text: str) -> tuple[str, ...]:
    """`one,two` as words."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of names such as one,two")
    return found


def given_path(text: str) -> Path:
    """A path; nothing is none. Shells leave the ~ of --out=~/bundle as it is, which would become a folder «~»."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a path")
    return Path(os.path.expanduser(text))  # and not Path.expanduser, to which ./~ is ~


def check_text(what: str, text: str) -> None:
    """Refuse what a terminal gave that is not UTF-8: it could neither be printed nor become tokens.

    Raises:
        InputError: it is not.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} is not UTF-8.",
            note=f"{text[error.start : error.end]!a} stands at place {error.start}.",
            hint="Set the terminal to UTF-8, or give a file where that is possible.",
        ) from None


# Of a settings class, by its fields' names
_types_of: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


def _parts(annotation: Any) -> tuple[Any, ...]:
    """Of a union, else the type itself."""
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    return typing.get_args(annotation) if union else (annotation,)


def _without_none(annotation: Any) -> Any:
    """The type of an option's values: not None, and no word that stands for a value."""
    kinds = (part for part in _parts(annotation) if typing.get_origin(part) is not typing.Literal)
    (annotation,) = (part for part in kinds if part is not type(None))
    return annotation


def _without_words(annotation: Any) -> Any:
    """The type of one of several values, which may be a union, less the words that stand for one."""
    kinds = [part for part in _parts(annotation) if typing.get_origin(part) is not typing.Literal]
    return kinds[0] if len(kinds) == 1 else annotation


def _words(annotation: Any) -> tuple[str, ...]:
    """Words that stand for a value: of `int | Literal["auto"]`, or of several such values."""
    if typing.get_origin(annotation) in (tuple, Sequence):
        annotation = typing.get_args(annotation)[0]
    literals = (part for part in _parts(annotation) if typing.get_origin(part) is typing.Literal)
    return tuple(word for part in literals for word in typing.get_args(part))


def _or_word(read: Callable[[str], Any], words: Sequence[str]) -> Callable[[str], Any]:
    """A reader that leaves some words as they are."""

    def read_or_word(text: str) -> Any:
        return text if text in words else read(text)

    read_or_word.__name__ = " or ".join((read.__name__, *words))  # which argparse says
    return read_or_word if words else read


def _reader(annotation: Any, repeat: bool) -> Callable[[str], Any]:
    """What reads an option's text, by its field's type."""
    words, annotation = _words(annotation), _without_none(annotation)
    if typing.get_origin(annotation) in (tuple, Sequence):
        item = _without_words(typing.get_args(annotation)[0])
        words = _words(annotation)
        if not repeat:
            return functools.partial(numbers, words=words) if item is int else names
        annotation = item
    assert annotation in (str, int, float, Path), annotation
    return given_path if annotation is Path else _or_word(typing.cast("Callable[[str], Any]", annotation), words)


def _flag(field: dataclasses.Field[Any]) -> str:
    return field.metadata[_OPTION].flag or f"--{field.name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, settings: type[Any]) -> None:
    """Add an argument for every field of a settings class that `option` made; what is not given stays unset."""
    types_of = _types_of(settings)
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
        text = said.help if said.bounds is None else f"{said.help} [{said.bounds}]"
        arguments: dict[str, Any] = {"dest": field.name, "help": text, "default": argparse.SUPPRESS}
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
    types_of = _types_of(settings)
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
            note=f"{chosen!r:.80} was given, {listed}.",
            hint=f"Use {flag} {known[0]}." if flag else f"Use {known[0]}.",
        )


def _wrong_type(flag: str, value: object, wanted: str) -> InputError:
    return InputError(
        f"{flag} has a value of the wrong type.",
        note=f"It is {value!r:.60}, of type {type(value).__name__}; needed is {wanted}.",
        hint="See what the settings class says of it.",
    )


def _checked(flag: str, value: Any, kind: Any, said: _Option) -> Any:
    """One value, of the type that its field has, within its bounds; the class itself checks choices."""
    if kind in (int, float) and said.choices is None:
        assert said.bounds is not None, f"{flag} has no bounds"
        return said.bounds.whole(flag, value) if kind is int else said.bounds.real(flag, value)
    if kind is Path:
        if not isinstance(value, str | os.PathLike):
            raise _wrong_type(flag, value, "a path")
        return Path(value)
    if not isinstance(value, kind):
        wanted = {str: "a text", bool: "True or False", int: "a whole number", int | str: "a whole number or a text"}
        raise _wrong_type(flag, value, wanted[kind])
    if kind is str:
        check_text(flag, value)
        if not value:
            raise InputError(f"{flag} is empty.", note="It is ''; needed is a text.", hint="Give one, or leave it out.")
    return value


def check_options(settings: Any) -> None:
    """Check types and bounds of the options of a settings object; what numpy made becomes Python's own.

    Call it first in `__post_init__`.

    Raises:
        InputError: a value of another type, out of bounds, or twice among several.
    """
    types_of = _types_of(type(settings))
    for field in dataclasses.fields(settings):
        said: _Option | None = field.metadata.get(_OPTION)
        value = getattr(settings, field.name)
        if said is None or (value is None and field.default is None):
            continue
        if isinstance(value, str) and value in _words(types_of[field.name]):
            continue
        kind, flag = _without_none(types_of[field.name]), _flag(field)
        if typing.get_origin(kind) in (tuple, Sequence):
            item, words = _without_words(typing.get_args(kind)[0]), _words(kind)
            if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
                raise _wrong_type(flag, value, "several values, such as a tuple")
            checked: Any = tuple(
                one if isinstance(one, str) and one in words else _checked(flag, one, item, said) for one in value
            )
            twice = [one for place, one in enumerate(checked) if one in checked[:place]]
            if twice and item is not float:  # weights may be alike
                raise InputError(
                    f"{flag} names a value twice.",
                    note=f"{', '.join(map(str, checked))}: {twice[0]} is there more than once.",
                    hint="Name each once.",
                )
        else:
            checked = _checked(flag, value, kind, said)
        object.__setattr__(settings, field.name, checked)


def refuse_unused(settings: Any, names: Sequence[str], because: str, hint: str) -> None:
    """Refuse options that were given and would change nothing.

    Args:
        names: of their fields.
        because: what takes their effect, such as `--temperature is 0`.
        hint: what would give it to them.

    Raises:
        InputError: one was given.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in names and value != field.default:
            said = ", ".join(map(str, value)) if isinstance(value, tuple) else value
            given = "It is given" if isinstance(value, bool) else f"It is {said}"
            raise InputError(
                f"{_flag(field)} would change nothing.",
                note=f"{given}, and {because}.",
                hint=f"Leave it out, or {hint}.",
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


# Of what the programs print; a terminal of ASCII or Latin-1 shows what is on the right
_LIKENESS = str.maketrans(
    {"█": "#", "·": ".", "░": "-", "─": "-", "–": "-", "—": "-", "…": "...", "×": "x", "ρ": "rho"}
)
_LIKENESS |= str.maketrans({"→": "->", "γ": "gamma", "∞": "inf", "«": '"', "»": '"', "“": '"', "”": '"', "µ": "u"})


def _likeness(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: what can be printed in the place of what cannot."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_LIKENESS)
    try:
        text.encode(error.encoding)
    except UnicodeEncodeError:
        text = text.encode("ascii", "backslashreplace").decode("ascii")
    return text, error.end


def _ready_streams() -> None:
    """Let standard output take any text, a line at a time, and nobody find a standard stream missing.

    So lines come when they are printed, in a pipe too, and stand in the order of both streams.
    A closed one becomes the null device, so that no file that is opened later gets its number. Of a pipe or a file
    Windows says a code page, which lacks most letters; it is UTF-8, as all files are.
    """
    codecs.register_error("likeness", _likeness)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 open as long as the process
        elif hasattr(stream, "reconfigure"):
            if sys.platform == "win32" and not stream.isatty() and "PYTHONIOENCODING" not in os.environ:
                stream.reconfigure(encoding="utf-8")
            if mode == "w":
                stream.reconfigure(errors="likeness", line_buffering=True)


def _reader_went(error: BaseException) -> bool:
    """Whether nobody reads our output any more, which Windows has no words of its own for."""
    if sys.platform == "win32" and isinstance(error, OSError) and error.errno == errno.EINVAL:
        try:
            sys.stdout.flush()
        except OSError:
            return True
    return isinstance(error, BrokenPipeError)


def _silence(stream: TextIO) -> None:
    """Send what a stream still holds to the null device: nobody can take it, and Python would try at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# What the system refuses for reasons that lie outside the program. A missing file is not among them: who reads one says
# which, so its absence here is a bug
_REFUSALS = {
    errno.ENOSPC: "Free some space, or choose another place.",
    errno.EDQUOT: "Free some space, or choose another place.",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or choose another place.",
    errno.EROFS: "Choose a place that can be written.",
    errno.EACCES: "Check the permissions of the file and of its directory.",
    errno.EPERM: "Check the permissions of the file and of its directory.",
    errno.EISDIR: "Give a file, not a directory.",
    errno.ENOTDIR: "Check the path: a part of it is no directory.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Check the path: its links lead in a circle.",
    **LACKING,
    errno.EIO: "Check the disk or the terminal.",
    errno.EBADF: "Check what standard input and output are connected to.",
    errno.ESTALE: "Check the network file system.",
}


def refusal_hint(error: OSError) -> str:
    """What to do about what the system refuses."""
    return _REFUSALS.get(error.errno or 0, "Choose another place.")


def _refused_by_the_system(error: OSError) -> InputError | None:
    """The error that a user gets for it; None where it is a bug of ours."""
    if error.errno not in _REFUSALS:
        return None
    what = error.filename if isinstance(error.filename, str | os.PathLike) else "standard input or output"
    note = f"{os.fspath(what)!s:.300}: {error.strerror}."
    return InputError("The system refuses to read or write.", note=note, hint=_REFUSALS[error.errno])


def no_temporary_directory(error: BaseException) -> bool:
    """Whether Python has found none: it tries a few, and full disks have no room for its four bytes."""
    return isinstance(error, FileNotFoundError) and str(error.strerror).startswith("No usable temporary directory")


def _no_working_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _as_ours(error: BaseException) -> LoraDropError | None:
    """An exception as the error that a user gets for it; None where it is a bug of ours."""
    if isinstance(error, MemoryError):
        return InputError(
            "There is too little memory.",
            note=f"{first_line(error)}.",
            hint="Ask for less, such as fewer tokens or a smaller batch, or close other programs.",
        )
    if no_temporary_directory(error):
        return InputError(
            "There is no room for temporary files.",
            note=f"{first_line(error)}.",
            hint="Free some space, or set TMPDIR to a directory that can be written.",
        )
    if isinstance(error, FileNotFoundError) and _no_working_directory():
        return InputError(
            "The current directory does not exist any more.",
            note="It was removed, and a path begins there.",
            hint="Change into one that exists (cd), and run the command again.",
        )
    if isinstance(error, OSError):
        return _refused_by_the_system(error)
    return error if isinstance(error, LoraDropError) else None


def _print_last(stream: TextIO, text: str = "") -> None:
    """The last of a stream, and what it holds from before; lost where nobody takes it: Python would end with 120."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        _silence(stream)


def _print_end(text: str) -> None:
    """The last words of a command, and what it has printed before."""
    _print_last(sys.stdout)
    _print_last(sys.stderr, text)


def tell(text: str, stream: TextIO | None = None) -> None:
    """Write a line for people, to standard error when None. A full disk behind it, or nobody, stops nothing."""
    with contextlib.suppress(OSError):
        print(text, file=stream or sys.stderr, flush=True)


class _Ended(SystemExit):
    """A signal told the command to end."""


def _end_behind(error: BaseException | None) -> BaseException | None:
    """The Ctrl-C or signal that a library made an error of its own of, as an import of C code does."""
    while error is not None and not isinstance(error, KeyboardInterrupt | _Ended):
        error = error.__cause__ or error.__context__
    return error


_came: list[tuple[BaseException, int]] = []  # what handlers raised for which signals, while a command runs


def forget_signals() -> None:
    """What Ctrl-C asked for has been done, as a reply is cut: an error that follows is one of its own."""
    _came.clear()


def signal_handlers() -> dict[signal.Signals, Any]:
    """Of the signals that end a command; none in a thread where Python lets nobody handle signals."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # the last is Windows'
    numbers = (getattr(signal, name) for name in names if hasattr(signal, name))
    return {number: signal.getsignal(number) for number in numbers}


@contextlib.contextmanager
def held_signals() -> Iterator[Sequence[int]]:
    """Let the signals that end a command wait until the context ends, where they are handled in Python; yields those
    that came. For what must not be torn, and for C code that calls back: it loses what a handler raises there."""
    caught: list[int] = []
    before = {number: handler for number, handler in signal_handlers().items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, _: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and its like unwind as Ctrl-C does, so that what is half done is removed; exit codes are the shell's.

    Those that something else handles, or that are ignored as by `nohup`, are left alone. An error after a signal is the
    signal's. Where a destructor or a weak reference's callback runs just then, Python loses what a handler raises, and
    the signal is sent again.
    """
    again: list[threading.Timer] = []
    report, thread = sys.unraisablehook, threading.get_ident()
    send = getattr(signal, "pthread_kill", lambda _, number: signal.raise_signal(number))  # Windows has only the latter

    def end(number: int, _: object) -> None:
        _came.append((KeyboardInterrupt() if number == signal.SIGINT else _Ended(128 + number), number))
        raise _came[-1][0]

    def lost(unraisable: sys.UnraisableHookArgs) -> None:
        number = next((number for error, number in _came if error is unraisable.exc_value), None)
        if number is None:
            report(unraisable)
            return
        again.append(threading.Timer(0.01, send, (thread, number)))
        again[-1].start()

    defaults = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: handler for number, handler in signal_handlers().items() if handler in defaults}
    for number in before:
        signal.signal(number, end)
    if before:
        sys.unraisablehook = lost
    try:
        yield
    except Exception as error:
        cause = _end_behind(error) or (_came[-1][0] if _came else None)
        if cause is None:
            raise
        raise cause from None
    finally:
        for timer in again:
            timer.cancel()
            timer.join()
        for number, handler in before.items():
            signal.signal(number, handler)
        if before:
            sys.unraisablehook = report
            forget_signals()


def run_command(command: Callable[[Sequence[str]], None], arguments: Sequence[str] | None) -> int:
    """Run a command's body and return its exit code. An exception that is a bug of ours goes through."""
    _ready_streams()
    try:
        try:
            with _ended_by_signals():
                command(sys.argv[1:] if arguments is None else arguments)
        finally:  # also after --help, which ends with SystemExit
            sys.stdout.flush()
            _print_last(sys.stderr)
    except KeyboardInterrupt:
        _print_end("interrupted\n")
        return 130
    except Exception as error:
        if _reader_went(error):
            _silence(sys.stdout)
            _print_last(sys.stderr)
            return 141
        ours = _as_ours(error)
        if ours is None:
            raise
        _print_end(f"error: {ours}\n")
        return ours.exit_code
    return 0
