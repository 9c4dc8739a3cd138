"""Reasoning in front of an answer, as models write it: its style is told by their chat template.

Enters: a chat template; the text of an answer as it grows. Leaves: reasoning and content.

    <think>…</think> content                                   Qwen3, DeepSeek-R1, GLM 4.5 and others; the template may
                                                               have written the first mark; some have marks of their own
    <|channel|>analysis<|message|>…<|end|>                     GPT-OSS: messages on channels, of which `analysis` is
    <|start|>assistant<|channel|>final<|message|>content       reasoning; one to a function is a call of it
"""

from __future__ import annotations

import copy
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass

_SPACE = string.whitespace
_BEGIN, _FREE, _BETWEEN, _HEADER, _REASONING, _CONTENT = "begin", "free", "between", "header", "reasoning", "content"
_CALL = "call"
_START, _CHANNEL, _MESSAGE, _END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
_ANALYSIS = "analysis"  # begins the header of a message that is reasoning
_TO = "to=functions."
_FUNCTION = re.compile(re.escape(_TO) + r"([A-Za-z0-9_.-]+)(?![^\s<])")
CALL_HEADER = (f"{_CHANNEL}commentary {_TO}", f" <|constrain|>json{_MESSAGE}")  # of a call, around the function's name


@dataclass(frozen=True)
class ReasoningStyle:
    """How reasoning is told from content.

    Attributes:
        marks: parts of the text that are special tokens of some models: they are to be kept in it.
        ways: state → mark that ends it → the next state. A text begins in `begin`, and one that no mark begins is free
            content.
        opening: what a prompt ends with that has begun the reasoning already; empty where none does.
    """

    marks: tuple[str, ...]
    ways: Mapping[str, Mapping[str, str]]
    opening: str = ""

    def begun_by(self, prompt_end: str) -> bool:
        """Whether a prompt that ends so, its special tokens kept, has begun the reasoning."""
        return bool(self.opening) and prompt_end.rstrip().endswith(self.opening.rstrip())


def _between(begin: str, end: str, behind: str = "") -> ReasoningStyle:
    """Reasoning between two marks, and behind a word."""
    return ReasoningStyle(
        marks=(begin, end),
        ways={_BEGIN: {begin + behind: _REASONING}, _REASONING: {end: _CONTENT}, _CONTENT: {}},
        opening=begin + behind,
    )


THINK = _between("<think>", "</think>")
BETWEEN = {  # by the mark that ends them
    "</think>": THINK,
    "</seed:think>": _between("<seed:think>", "</seed:think>"),  # Seed-OSS
    "[/THINK]": _between("[THINK]", "[/THINK]"),  # Mistral
    "<|END_THINKING|>": _between("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    "<channel|>": _between("<|channel>", "<channel|>", "thought\n"),  # Gemma 4
}
_NEXT_MESSAGE = {_END: _BETWEEN, _START: _BETWEEN, _CHANNEL: _HEADER}
CHANNELS = ReasoningStyle(
    marks=(_START, _CHANNEL, _MESSAGE, _END, "<|constrain|>", "<|call|>"),
    ways={
        _BEGIN: {_START: _BETWEEN, _CHANNEL: _HEADER, _TO: _BETWEEN},  # the last where the prompt has said who speaks
        _BETWEEN: {_CHANNEL: _HEADER, _MESSAGE: _CONTENT},
        _HEADER: {_MESSAGE: _CONTENT},  # or reasoning, or a call, as the header says
        _REASONING: _NEXT_MESSAGE,
        _CONTENT: _NEXT_MESSAGE,
        _CALL: {**_NEXT_MESSAGE, "<|call|>": _BETWEEN},
    },
)


def reasoning_style(chat_template: str | None) -> ReasoningStyle | None:
    """The style that a chat template tells; None of one that knows no reasoning."""
    template = chat_template or ""
    if all(mark in template for mark in (_CHANNEL, _MESSAGE, _ANALYSIS)):
        return CHANNELS
    return next((style for mark, style in BETWEEN.items() if mark in template), None)


class ReasoningStream:
    """Text in, as it grows; reasoning and content out, as soon as they cannot change. White space around either is
    neither's, and messages of one kind become one, a line each.

    Args:
        style: of the text, whose marks it keeps.
        inside: the prompt has begun the reasoning.
        calls: a message to a function is content with `CALL_HEADER` in front of it, however its header was written.

    Attributes:
        reasons: whether what comes next is reasoning, as far as is known.
    """

    def __init__(self, style: ReasoningStyle, *, inside: bool = False, calls: bool = False) -> None:
        self._ways, self._calls = style.ways, calls
        self._state = _REASONING if inside else _BEGIN
        self._held = ""  # may begin a mark
        self._space = list[str]()  # before it, may be at an end; no mark has such
        self._header = ""
        self._before: dict[str, str | None] = {_REASONING: "", _CONTENT: ""}  # of what comes next; None within a text

    def fork(self) -> ReasoningStream:
        """One that goes on from here by itself."""
        new = copy.copy(self)
        new._before, new._space = dict(self._before), list(self._space)
        return new

    @property
    def reasons(self) -> bool:
        return self._state == _REASONING

    def push(self, piece: str) -> tuple[str, str]:
        """Reasoning and content that are ready, maybe none."""
        self._held += piece
        found = {_REASONING: "", _CONTENT: ""}
        while self._step(found):
            pass
        return found[_REASONING], found[_CONTENT]

    def finish(self) -> tuple[str, str]:
        """What is left when the text has ended."""
        found, state = {_REASONING: "", _CONTENT: ""}, self._state
        if state in (_REASONING, _CONTENT, _CALL):
            self._tell(found, self._held)
            self._held = ""
        if state in (_BEGIN, _FREE, _CONTENT):
            self._tell_all(found)
        self._held, self._space = "", []
        return found[_REASONING], found[_CONTENT]

    def _step(self, found: dict[str, str]) -> bool:
        """Take what is held as far as the next mark; whether there may be another one."""
        if self._state == _FREE:
            self._tell_all(found)
            return False
        marks = self._ways[self._state]
        if self._state == _BEGIN and not self._may_begin(marks):
            self._state = _FREE
            return True
        places = {mark: place for mark in marks if (place := self._held.find(mark)) >= 0}
        if not places:
            self._tell_what_is_sure(found, marks)
            return False
        mark = min(places, key=places.__getitem__)
        before, self._held = self._held[: places[mark]], self._held[places[mark] + len(mark) :]
        self._leave(found, before)
        self._state = marks[mark]
        if mark == _MESSAGE:
            self._begin_message(found)
        elif mark in (_CHANNEL, _TO):
            self._header += mark
        return True

    def _begin_message(self, found: dict[str, str]) -> None:
        """What a message is its header says: of who speaks to whom, and on which channel."""
        called = _FUNCTION.search(self._header) if self._calls else None
        if called is not None:
            self._state = _CALL
            found[_CONTENT] += (self._before[_CONTENT] or "") + called[1].join(CALL_HEADER)
            self._before[_CONTENT] = "\n"
        elif self._header.rpartition(_CHANNEL)[2].lstrip(_SPACE).startswith(_ANALYSIS):
            self._state = _REASONING
        self._header = ""  # the next message may have none

    def _may_begin(self, marks: Mapping[str, str]) -> bool:
        """Whether the text so far is white space, and a mark or the beginning of one."""
        text = self._held.lstrip(_SPACE)
        self._space.append(self._held[: len(self._held) - len(text)])
        self._held = text
        return any(text.startswith(mark) or mark.startswith(text) for mark in marks)

    def _tell_what_is_sure(self, found: dict[str, str], marks: Mapping[str, str]) -> None:
        if self._state == _BEGIN:
            return
        begun = max((n for mark in marks for n in range(1, len(mark)) if self._held.endswith(mark[:n])), default=0)
        sure = self._held[: len(self._held) - begun]
        self._held = self._held[len(sure) :]
        if self._state in (_BETWEEN, _HEADER):
            self._header += sure
        else:
            self._tell(found, sure)
            if not marks:  # else what follows may be one, before which white space is dropped
                self._tell_all(found)

    def _leave(self, found: dict[str, str], text: str) -> None:
        """The rest of a state's text, which a mark ends."""
        if self._state in (_BETWEEN, _HEADER):
            self._header += text
        elif self._state != _BEGIN:
            self._tell(found, text)
            if self._before.get(self._state, "") is None:
                self._before[self._state] = "\n"
        self._space = []

    def _tell(self, found: dict[str, str], text: str) -> None:
        """Of reasoning or content. White space at its end is kept, and told before what follows; that of calls at
        once."""
        if self._state == _CALL:
            found[_CONTENT] += text
            return
        before = self._before[self._state]
        if before is not None:
            text = text.lstrip(_SPACE)
        told = text.rstrip(_SPACE)
        if told:
            found[self._state] += ("".join(self._space) if before is None else before) + told
            self._before[self._state], self._space = None, []
        self._space.append(text[len(told) :])

    def _tell_all(self, found: dict[str, str]) -> None:
        """Content, with what is kept."""
        found[_CONTENT] += "".join(self._space) + self._held
        self._held, self._space = "", []


@dataclass(frozen=True)
class Thoughts:
    """Reasoning that an answer may begin with.

    Attributes:
        inside: the prompt has begun it.
    """

    style: ReasoningStyle
    inside: bool = False

    def stream(self, *, calls: bool = False) -> ReasoningStream:
        """A new stream for one text, in which calls of tools are looked for or not."""
        return ReasoningStream(self.style, inside=self.inside, calls=calls)
