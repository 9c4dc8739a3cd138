"""`lora-drop generate` and `lora-drop chat`: text in, text out, as it is made.

Enters: a bundle and prompts. Leaves: text, printed as it comes. Token ids are the session's business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TextIO

import numpy as np
import numpy.typing as npt
from lora_drop_runtime import bounds
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import Limits
from lora_drop_runtime.command_line import (
    check_known,
    check_options,
    check_text,
    forget_signals,
    option,
    refuse_unused,
    tell,
)
from lora_drop_runtime.decoding.checks import check_request
from lora_drop_runtime.decoding.constraint import Constraint
from lora_drop_runtime.decoding.prompts import padded
from lora_drop_runtime.decoding.sampling import SamplingOptions
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.decoding.statistics import Statistics
from lora_drop_runtime.errors import BundleError, DraftsDoNotPay, InputError, first_line
from lora_drop_runtime.files import read_bounded
from lora_drop_runtime.grammars.grammar import Grammars
from lora_drop_runtime.plan.schedule import SCHEDULES
from lora_drop_runtime.reasoning import Thoughts
from lora_drop_runtime.text import TextCodec, checked_variables

from lora_drop_tools.shared.bundles import check_session
from lora_drop_tools.shared.options import (
    draft_option,
    lenience_option,
    policy_option,
    provider_option,
    refuse_idle_drafts,
    schedule_option,
    target_option,
    threads_option,
)

MOST_QUESTION = 1 << 20  # characters of a line
BYTE_ORDER_MARK = "\ufeff"  # that a file may begin with
MOST_SCHEMA = 1 << 20  # bytes of a file
# Control characters → how they are shown; of lines and tabs a terminal makes nothing else
_ESCAPED = {code: ascii(chr(code))[1:-1] for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
NEW_TOKENS, REPLY_TOKENS = 64, 256  # of `generate` and of `chat`, where the bundle has room for as many


def _schema(given: str) -> str:
    """A JSON schema that is given as it is, or as a file."""
    if given.lstrip().startswith("{"):
        return given
    try:
        return read_bounded(Path(given), MOST_SCHEMA).decode("utf-8")
    except (BundleError, UnicodeDecodeError) as error:
        raise InputError(
            "The JSON schema cannot be read.",
            note=error.note if isinstance(error, BundleError) else f"{given}: {first_line(error)}.",
            hint='Give the file of a schema, or the schema itself, such as \'{"type": "object"}\'.',
        ) from error


@dataclass(frozen=True)
class GenerateSettings:
    """How text is continued. What is None is the bundle's.

    Attributes:
        max_new_tokens: 64 when None, in a chat 256, or what the bundle has room for.
        k: LoRA steps between refreshes, 0 for the full schedule; `auto` under a policy that verifies.
        schedule: when refreshes come, as for `Session.open`.
        draft, lenience: where drafts come from and how they are judged, under a policy that verifies.
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed: as for
            `SamplingOptions`.
        stop: strings that end a text, themselves left out.
        chat_template_kwargs: more variables of the model's chat template, as a JSON object in text.
        json_schema, regex: what a text has to be; the schema as text, which begins with `{`, or the name of its file.
        target, provider, threads: as for `Session.open`.
    """

    max_new_tokens: int | None = option(
        None,
        metavar="N",
        bounds=bounds.TOKENS,
        help=f"write at most N tokens (default {NEW_TOKENS}, or what the bundle has room for)",
    )
    k: int | Literal["auto"] | None = option(
        None,
        bounds=bounds.K,
        help="put so many LoRA steps between refreshes, 0 for none (default: the bundle's); auto, under --policy "
        "lossless: as many as pay",
    )
    schedule: str | None = schedule_option()
    policy: str | None = policy_option()
    draft: str | None = draft_option()
    lenience: float | None = lenience_option()
    temperature: float = option(
        0.0, metavar="T", bounds=bounds.TEMPERATURE, help="draw at this temperature; 0 is greedy (default)"
    )
    top_k: int = option(0, metavar="N", bounds=bounds.TOP_K, help="draw among the N likeliest; 0 is off (default)")
    top_p: float = option(
        1.0, metavar="P", bounds=bounds.TOP_P, help="draw among those that hold this probability; 1 is off (default)"
    )
    min_p: float = option(
        0.0,
        metavar="P",
        bounds=bounds.SHARE,
        help="draw among those with this share of the likeliest's probability; 0 is off (default)",
    )
    repetition_penalty: float = option(
        1.0, metavar="P", bounds=bounds.PENALTY, help="make what was said already less likely; 1 is off (default)"
    )
    presence_penalty: float = option(
        0.0,
        metavar="P",
        bounds=bounds.COUNT_PENALTY,
        help="take this off the logits of what the text has, not the prompt; 0 is off (default)",
    )
    frequency_penalty: float = option(
        0.0, metavar="P", bounds=bounds.COUNT_PENALTY, help="the same, once for each time that the text has it"
    )
    seed: int | None = option(
        None, metavar="N", bounds=bounds.SEED, help="draw the same text every time, but for --k auto"
    )
    stop: tuple[str, ...] = option((), repeat=True, metavar="TEXT", help="end before this text; may be repeated")
    chat_template_kwargs: str | None = option(
        None, metavar="JSON", help="give the chat template these variables, such as '{\"enable_thinking\": false}'"
    )
    json_schema: str | None = option(
        None, metavar="FILE", help="write JSON that is valid under this schema; a text that begins with { is one itself"
    )
    regex: str | None = option(None, metavar="PATTERN", help="write what this regular expression matches as a whole")
    target: str | None = target_option()
    provider: str | None = provider_option()
    threads: int | None = threads_option()

    forgets: ClassVar[bool] = True  # what no layer sees any more

    def __post_init__(self) -> None:
        check_options(self)
        if not self.temperature:
            refuse_unused(self, ("top_k", "top_p", "min_p", "seed"), "--temperature is 0", "add --temperature 0.8")
        check_known("schedule", self.schedule, SCHEDULES, "--schedule")
        if self.k == 0:
            idle = "policy", "schedule", "draft", "lenience"
            refuse_unused(self, idle, "with --k 0 every step is a refresh", "use a larger --k")
        refuse_idle_drafts(self, self.policy)
        if self.json_schema is not None and self.regex is not None:
            refuse_unused(self, ("regex",), "--json-schema says what the text has to be", "give one of the two")
        _ = self.variables  # refuses what is none

    @property
    def variables(self) -> dict[str, Any]:
        """Of the chat template. Raises InputError."""
        if self.chat_template_kwargs is None:
            return {}
        try:
            return checked_variables(json.loads(self.chat_template_kwargs))
        except (ValueError, RecursionError) as error:
            raise InputError(
                "--chat-template-kwargs is no JSON.",
                note=f"{self.chat_template_kwargs!r:.120}: {first_line(error)}.",
                hint="Give an object, such as '{\"enable_thinking\": false}'.",
            ) from None

    @property
    def sampling(self) -> SamplingOptions:
        return SamplingOptions(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )

    def constraint(self, bundle: Bundle) -> Constraint | None:
        """What a text has to be.

        Raises:
            InputError: the file cannot be read, or llguidance cannot follow the schema or expression.
        """
        if self.regex is not None:
            return Grammars.of(bundle).regex(self.regex)
        if self.json_schema is None:
            return None
        return Grammars.of(bundle).json_schema(_schema(self.json_schema))

    def open(self, bundle: str | Path) -> Session:
        """A session under this schedule."""
        return Session.open(
            bundle,
            k=self.k,
            schedule=self.schedule,
            policy=self.policy,
            draft=self.draft,
            lenience=self.lenience,
            target=self.target,
            provider=self.provider,
            threads=self.threads,
            forget=self.forgets,
        )


@dataclass(frozen=True)
class ChatSettings(GenerateSettings):
    """The same for `chat`, whose replies are longer, and whose turns begin with those before."""

    forgets = False

    max_new_tokens: int | None = option(
        None,
        metavar="N",
        bounds=bounds.TOKENS,
        help=f"write at most N tokens (default {REPLY_TOKENS}, or what the bundle has room for)",
    )


@dataclass
class Completion:
    """One prompt's result. `seconds` counts from the prefill on; the next two are what the session says at the end.

    Attributes:
        text: of a chat's answer without the reasoning before it.
        interrupted: Ctrl-C ended it.
        drafts: what the session counted, where drafts are verified.
        reasoning: that a chat's answer began with.
    """

    text: str
    tokens: int
    seconds: float
    kv_bytes: dict[str, int]
    engine_notes: list[str]
    interrupted: bool = False
    drafts: Statistics | None = None
    reasoning: str = ""

    @property
    def notes(self) -> list[str]:
        """Lines for who measures."""
        counted = [] if self.drafts is None else [self.drafts.describe()]
        return [*counted, *([self.drafts.note] if self.drafts and self.drafts.note else []), *self.engine_notes]


@contextlib.contextmanager
def _said_by_us() -> Iterator[None]:
    """No warning of Python's for what stands in the completion's notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DraftsDoNotPay)
        yield


def _piped_question() -> str:
    """A line of standard input, which may be a device without an end, or text of an editor of Windows.

    Raises:
        EOFError: there is none.
    """
    line = sys.stdin.readline(MOST_QUESTION + 1)
    if len(line) > MOST_QUESTION:
        raise InputError(
            "A message is too long.",
            note=f"A line of standard input has more than {MOST_QUESTION} characters.",
            hint="Send shorter lines.",
        )
    if not line:
        raise EOFError
    return line.rstrip("\r\n").removeprefix(BYTE_ORDER_MARK)


def _drop_question(error: InputError) -> None:
    """Who types can go on with another one."""
    print(error, file=sys.stderr, flush=True)


def _questions() -> Iterator[str]:
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows edits lines itself
            importlib.import_module("readline")  # a terminal's own lines end after 4095 bytes, without a word
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else _piped_question()
        except (EOFError, KeyboardInterrupt) as end:
            if sys.stdin.isatty():
                tell("", sys.stdout)  # what comes next would stand behind the question
            if isinstance(end, EOFError):
                return
            raise
        except UnicodeError as error:
            said = str(error)  # of UTF-16 that has no mark
            if isinstance(error, UnicodeDecodeError):
                said = f"It holds the byte {error.object[error.start]:#04x}"
            unreadable = InputError(
                "What was typed is not UTF-8.",
                note=f"{said}.",
                hint="Set the terminal to UTF-8, or give UTF-8 text.",
            )
            if not sys.stdin.isatty():
                raise unreadable from None
            _drop_question(unreadable)
            continue
        if line.strip():
            yield line


def _shown(text: str, out: TextIO) -> str:
    """Text as it is written: a terminal would obey control characters, so they are escaped for it."""
    return text.translate(_ESCAPED) if out.isatty() else text


class _Answer:
    """The text of one completion as it grows, in two: reasoning, and what it is about.

    Args:
        thoughts: reasoning that it may begin with; None where nobody knows of any.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str], thoughts: Thoughts | None) -> None:
        self._pieces = codec.stream(stop, () if thoughts is None else thoughts.style.marks)
        self._thoughts = None if thoughts is None else thoughts.stream()
        self._texts, self._reasoning = list[str](), list[str]()
        self._reasons = False  # what was printed last

    @property
    def stopped(self) -> bool:
        return self._pieces.stopped

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    def push(self, token: int) -> str:
        """What is new of it as it is printed, reasoning between marks."""
        piece = self._pieces.push(token)
        return self._printed("", piece) if self._thoughts is None else self._printed(*self._thoughts.push(piece))

    def finish(self) -> str:
        """What was held back."""
        rest = self._pieces.finish()
        if self._thoughts is None:
            return self._printed("", rest)
        printed = self._printed(*self._thoughts.push(rest))
        return printed + self._printed(*self._thoughts.finish())

    def _printed(self, reasoning: str, text: str) -> str:
        printed = ""
        if reasoning:
            begin = "\n<think>\n" if self._texts else "<think>\n"
            printed = reasoning if self._reasons else begin + reasoning.removeprefix("\n")
            self._reasoning.append(reasoning)
            self._reasons = True
        if text:
            printed += "\n</think>\n\n" + text.removeprefix("\n") if self._reasons else text
            self._texts.append(text)
            self._reasons = False
        return printed


def _stream(
    session: Session,
    codec: TextCodec,
    ids: npt.NDArray[np.int64],
    settings: GenerateSettings,
    out: TextIO,
    constraint: Constraint | None,
    *,
    thoughts: Thoughts | None = None,
    goes_on: bool = False,
) -> Completion:
    """Print one completion as it is made; Ctrl-C ends it early and keeps what is there. One that goes on keeps the
    caches of what it has in common with the one before."""
    answer = _Answer(codec, settings.stop, thoughts)
    tokens, interrupted = 0, False
    begin = time.perf_counter()

    def emit(piece: str) -> None:
        out.write(_shown(piece, out))
        out.flush()

    count = settings.max_new_tokens or NEW_TOKENS
    stream = session.stream(ids, count, sampling=settings.sampling, reuse_prefix=goes_on, constraint=constraint)
    try:
        for token in stream:
            tokens += 1
            emit(answer.push(token))
            if answer.stopped:
                break
    except KeyboardInterrupt:
        interrupted = True
        forget_signals()
    finally:
        stream.close()
    emit(answer.finish())
    out.write("\n")
    seconds = time.perf_counter() - begin
    kv, notes, drafts = session.kv_bytes(), session.engine_notes(), session.statistics()
    return Completion(answer.text, tokens, seconds, kv, notes, interrupted, drafts, answer.reasoning)


def _codec(bundle: Bundle, settings: GenerateSettings) -> TextCodec:
    """What makes tokens of text and back; refuses settings that no session of the bundle can be opened with."""
    check_session(bundle, settings.target, settings.provider, settings.threads, [settings.policy])
    codec = TextCodec.open(bundle.root / "tokenizer")
    codec.stream(settings.stop)
    return codec


def _check_conversation(tokens: int, limits: Limits) -> None:
    most = min(limits.max_seq_len - 1, limits.max_prompt_len)
    if tokens > most:
        raise InputError(
            "The conversation is longer than the bundle allows.",
            note=f"It has {tokens} tokens, the bundle allows {most}.",
            hint="Start a new chat, or export with a larger --max-seq-len and --max-prompt-len.",
        )


def chat(bundle: str | Path, settings: ChatSettings, *, system: str | None = None) -> None:
    """Talk to a model on the terminal. Ctrl-C ends a reply, end of input ends the chat.

    Args:
        system: a system message that the conversation begins with.
    """
    opened = Bundle.open(bundle)
    codec, constraint, variables = _codec(opened, settings), settings.constraint(opened), settings.variables
    if sys.stdin.isatty() and codec.chat_template is None:  # who types would be refused after each question
        raise InputError(
            "The model has no chat template.",
            note="Without one it is not known how it is asked a question.",
            hint='Let it go on with a text: lora-drop generate BUNDLE --prompt "…"',
        )
    with settings.open(bundle) as session, _said_by_us():
        said = False
        messages = [{"role": "system", "content": system}] if system else []
        limits = session.bundle.manifest.limits
        for number, line in enumerate(_questions(), 1):
            messages.append({"role": "user", "content": line})
            try:
                check_text(f"Question {number}", line)
                ids = codec.encode_chat(messages, variables=variables)
                _check_conversation(len(ids), limits)
            except InputError as error:
                if not sys.stdin.isatty():
                    raise
                messages.pop()
                _drop_question(error)
                continue
            except KeyboardInterrupt:  # before the reply began
                messages.pop()
                forget_signals()
                tell("", sys.stdout)
                continue
            room = limits.max_seq_len - len(ids)
            fitting = dataclasses.replace(settings, max_new_tokens=min(settings.max_new_tokens or REPLY_TOKENS, room))
            thoughts = codec.thoughts(ids) if constraint is None else None
            reply = _stream(session, codec, ids, fitting, sys.stdout, constraint, thoughts=thoughts, goes_on=True)
            if reply.drafts is not None and reply.drafts.note and not said:
                said = True
                print(reply.drafts.note, file=sys.stderr, flush=True)
            reasoning = {"reasoning_content": reply.reasoning} if reply.reasoning else {}
            messages.append({"role": "assistant", "content": reply.text, **reasoning})


def _encoded(
    bundle: Bundle, prompts: Sequence[str], settings: GenerateSettings, chat: bool
) -> tuple[TextCodec, list[npt.NDArray[np.int64]], GenerateSettings]:
    """What makes tokens of text and back, the prompts' tokens, and the settings with a number of new tokens.

    Raises:
        InputError: the bundle does not allow as many.
    """
    if not prompts:
        raise InputError(
            "There is no prompt.",
            note="None was given, at least one is needed.",
            hint='Give one with --prompt "…" or --prompt-file FILE.',
        )
    if not chat:
        refuse_unused(settings, ("chat_template_kwargs",), "no chat template is used", "add --chat")
    codec, variables = _codec(bundle, settings), settings.variables
    encoded = [
        codec.encode_chat([{"role": "user", "content": prompt}], variables=variables) if chat else codec.encode(prompt)
        for prompt in prompts
    ]
    for number, tokens in enumerate(encoded, 1):
        if not tokens.size:
            raise InputError(
                "A prompt is empty.", note=f"Prompt {number} has no tokens.", hint="Give it at least one word."
            )
    model, limits = bundle.manifest.model, bundle.manifest.limits
    ids, lengths = padded(encoded, 0)
    room = check_request(ids, lengths, settings.max_new_tokens, limits, model.vocab_size)
    if settings.max_new_tokens is None:
        settings = dataclasses.replace(settings, max_new_tokens=min(NEW_TOKENS, room))
    return codec, encoded, settings


def generate(
    bundle: str | Path,
    prompts: Sequence[str] | str,
    settings: GenerateSettings,
    *,
    chat: bool = False,
    out: TextIO | None = None,
) -> list[Completion]:
    """Continue prompts; a single one is streamed to `out` (standard output) as it is made, several run as a batch.

    Args:
        prompts: texts, or one; with `chat`, user messages put into the model's chat template.

    Raises:
        InputError, BundleError: what cannot be served.
        KeyboardInterrupt: Ctrl-C was pressed; what was written until then stands in `out`.
    """
    out = out or sys.stdout
    prompts = [prompts] if isinstance(prompts, str) else prompts
    opened = Bundle.open(bundle)
    codec, encoded, settings = _encoded(opened, prompts, settings, chat)
    constraint = settings.constraint(opened)
    thoughts = [codec.thoughts(ids) if chat and constraint is None else None for ids in encoded]
    with settings.open(opened.root) as session, _said_by_us():
        if len(encoded) == 1:
            completion = _stream(session, codec, encoded[0], settings, out, constraint, thoughts=thoughts[0])
            if completion.interrupted:
                raise KeyboardInterrupt
            return [completion]
        begin = time.perf_counter()
        count = settings.max_new_tokens or NEW_TOKENS
        rows = session.generate(encoded, count, sampling=settings.sampling, constraint=constraint)
        seconds = time.perf_counter() - begin
        completions = []
        for prompt, row, one in zip(prompts, rows, thoughts, strict=True):
            answer = _Answer(codec, settings.stop, one)
            text = "".join(answer.push(int(token)) for token in row) + answer.finish()
            kv, notes, drafts = session.kv_bytes(), session.engine_notes(), session.statistics()
            completions.append(
                Completion(answer.text, len(row), seconds, kv, notes, drafts=drafts, reasoning=answer.reasoning)
            )
            print(_shown(f"── {prompt}\n{text}", out), file=out, flush=True)
        return completions
