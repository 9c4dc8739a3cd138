"""What a client is told: events of rows as the objects of OpenAI's API, whole or in chunks.

Enters: events. Leaves: dictionaries for JSON, and whole answers as JSON. Beside the API's fields a chunk has
`lora_drop.step`, the kind of the step that made its token, and `usage` has `lora_drop`: how many steps the rows took
after their prompts. `usage.prompt_tokens_details.cached_tokens` are those of the prompts that no row had to run.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from lora_drop_runtime.decoding.row import CANCELLED, FAILED, LENGTH, STOP, Event
from lora_drop_runtime.grammars.calls import Calls, ToolCall
from lora_drop_runtime.plan.schedule import StepKind
from lora_drop_runtime.reasoning import Thoughts
from lora_drop_runtime.text import TextCodec

from .driver import Told
from .errors import ApiError, row_failed

_BYTES = "bytes:"  # before a part of a character, as the API has it where a token is its text alone


class Piece(NamedTuple):
    """What an event adds to a choice.

    Attributes:
        text: maybe none, where it may still change.
        reasoning: in front of it.
        token: the event, if it has a token that belongs to the answer.
        finish: why the choice ends with it, as the API says it.
        calls: of tools, that end with it.
    """

    text: str
    token: Event | None
    finish: str | None
    calls: Sequence[ToolCall] = ()
    reasoning: str = ""


class Choice:
    """One row's answer as it grows.

    Args:
        format_field: of the request, at fault where a row without tools leads beyond a limit.

    Attributes:
        tokens: of the answer.
        reasoned: those of them that were reasoning.
        steps: after the prompt, by kind.
        drafted, accepted: drafts, where refreshes verify them.
        reused: tokens of its prompt that were not run; None before anything is known of its row.
        finish: why its text ended.
        is_over: its row has ended, too.
    """

    def __init__(
        self,
        codec: TextCodec,
        stops: Sequence[str],
        calls: Calls | None,
        is_silent: bool,
        thoughts: Thoughts | None,
        format_field: str,
    ) -> None:
        self._is_silent, self._field = is_silent, format_field if calls is None else "tools"
        marks = (*(() if calls is None else calls.marks), *(() if thoughts is None else thoughts.style.marks))
        self._pieces = codec.stream(stops, marks)
        self._thoughts = None if thoughts is None else thoughts.stream(calls=calls is not None)
        self._parts = None if calls is None else calls.stream()
        self._has_called = False
        self.tokens, self.reasoned, self.drafted, self.accepted = 0, 0, 0, 0
        self.steps = dict.fromkeys(StepKind, 0)
        self.reused: int | None = None
        self.finish: str | None = None
        self.is_over = False
        self._is_new = True

    def take(self, event: Event) -> Piece:
        """Raises ApiError: the row has failed before its text ended."""
        if event.finished == FAILED and self.finish is None:
            raise row_failed(event.error, self._field)
        self.reused = event.reused
        if event.is_prompt:
            return Piece("", event, None)
        self._count(event)
        self.is_over = event.finished is not None
        if self._is_silent:
            self.finish = "length"
            return Piece("", None, self.finish)
        if self.finish is not None:  # what came after a stop string
            return Piece("", None, None)
        text = "" if event.token is None else self._pieces.push(event.token)
        self.tokens += event.token is not None
        self.reasoned += event.token is not None and self._thoughts is not None and self._thoughts.reasons
        if self._pieces.stopped or event.finished == STOP:
            self.finish = "stop"
        elif event.finished == LENGTH:
            self.finish = "length"
        if self.finish is not None:
            text += self._pieces.finish()
        reasoning, text = self._apart(text)
        text, calls = self._split(text)
        self._has_called |= bool(calls)
        if self._has_called and self.finish == "stop":
            self.finish = "tool_calls"
        return Piece(text, event if event.token is not None else None, self.finish, calls, reasoning)

    def _apart(self, text: str) -> tuple[str, str]:
        """Reasoning and the rest that are ready."""
        if self._thoughts is None:
            return "", text
        reasoning, text = self._thoughts.push(text)
        if self.finish is not None:
            more, rest = self._thoughts.finish()
            reasoning, text = reasoning + more, text + rest
        return reasoning, text

    def _split(self, text: str) -> tuple[str, list[ToolCall]]:
        """Content and calls that are ready."""
        if self._parts is None:
            return text, []
        text, calls = self._parts.push(text)
        if self.finish is not None:
            rest, more = self._parts.finish()
            text, calls = text + rest, calls + more
        return text, calls

    def _count(self, event: Event) -> None:
        if not self._is_new and event.finished != CANCELLED:
            self.steps[event.kind] += 1
        self._is_new = False
        if event.statistics is not None:  # which knows of steps that made no token
            counted = event.statistics
            self.steps = {StepKind.REFRESH: counted.refreshes, StepKind.LORA: counted.lora_steps}
            self.drafted, self.accepted = counted.drafted, counted.accepted


class Places:
    """Where tokens begin in a choice's text, of which a part of a character adds nothing until it is whole.

    Args:
        echo: the text of the prompt, where its tokens are told, too.
    """

    def __init__(self, codec: TextCodec, echo: str) -> None:
        self._codec, self._echo = codec, echo
        self._text, self._place, self._in_prompt = codec.stream(), 0, True

    def of(self, event: Event, own: str) -> int:
        """The place of the next token, whose text is `own` where it is no part of a character."""
        assert event.token is not None
        if self._in_prompt and not event.is_prompt:
            self._text, self._place, self._in_prompt = self._codec.stream(), len(self._echo), False
        begun, new = self._place, self._text.push(event.token)
        self._place += len(new)
        return self._place - len(own) if new.endswith(own) else begun  # text before it was no character


def as_json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def as_call(call: ToolCall) -> dict[str, Any]:
    """As a message has it. Mistral's templates take ids of nine letters and digits alone."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": uuid.uuid4().hex[:9], "type": "function", "function": function}


def _call_deltas(index: int, call: dict[str, Any]) -> list[dict[str, Any]]:
    """A message's call as a stream has it: what is called, then the arguments."""
    function = call["function"]
    parts = [{**call, "function": {**function, "arguments": ""}}, {"function": {"arguments": function["arguments"]}}]
    return [{"delta": {"tool_calls": [{"index": index, **part}]}} for part in parts]


class Answer:
    """The answer to one request, of which each row is a choice.

    Args:
        model: its name.
        prompt_tokens: of all prompts, each counted once.
        choices: rows of each prompt, which come one after another.
        includes_usage: a stream ends with the usage.
        includes_usage_so_far: each chunk of a choice has the usage so far.
        echoes: text that a choice begins with.
        calls: that the model may write.
        thoughts: that it may write before its answer.
        is_silent: no new token is told, though a row makes one.
    """

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    format_field: ClassVar[str] = "response_format"
    end: ClassVar[bytes] = b"data: [DONE]\n\n"  # of a stream

    def __init__(
        self,
        codec: TextCodec,
        model: str,
        prompt_tokens: int,
        rows: int,
        stops: Sequence[str],
        *,
        choices: int = 1,
        logprobs: bool,
        includes_usage: bool,
        includes_usage_so_far: bool,
        verifies: bool,
        echoes: Sequence[str] | None = None,
        calls: Calls | None = None,
        thoughts: Thoughts | None = None,
        is_silent: bool = False,
    ) -> None:
        self._codec, self._prompt_tokens = codec, prompt_tokens
        self._logprobs, self._includes_usage, self._verifies = logprobs, includes_usage, verifies
        self._includes_usage_so_far, self._each = includes_usage_so_far, choices
        self._head = {"id": f"{self.prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.choices = [Choice(codec, stops, calls, is_silent, thoughts, self.format_field) for _ in range(rows)]
        self._thinks = thoughts is not None
        self._echoes = echoes or [""] * rows
        self._texts = [[echo] for echo in self._echoes]
        self._reasoning: list[list[str]] = [[] for _ in range(rows)]
        self._tokens: list[list[Event]] = [[] for _ in range(rows)]
        self._calls: list[list[dict[str, Any]]] = [[] for _ in range(rows)]
        self._places = [Places(codec, echo) for echo in self._echoes]

    @property
    def is_over(self) -> bool:
        return all(choice.is_over for choice in self.choices)

    def take(self, told: Told) -> Piece:
        """Raises ApiError: the row has failed."""
        piece = self.choices[told.row].take(told.event)
        self._texts[told.row].append(piece.text)
        self._reasoning[told.row].append(piece.reasoning)
        self._calls[told.row] += map(as_call, piece.calls)
        if piece.token is not None and self._logprobs:
            self._tokens[told.row].append(piece.token)
        return piece

    # ── in chunks ──────────────────────────────────────────────────────────────────────────────────────────

    def first_chunks(self) -> list[dict[str, Any]]:
        """What comes before any token."""
        begun = ((index, self._begun(index)) for index in range(len(self.choices)))
        return [
            self._chunk({"index": index, **one, "logprobs": None, "finish_reason": None}) for index, one in begun if one
        ]

    def chunks(self, told: Told) -> list[dict[str, Any]]:
        """What an event adds, maybe nothing. Raises ApiError: the row has failed."""
        piece = self.choices[told.row].take(told.event)
        if piece.token is None and not piece.text and not piece.reasoning and piece.finish is None:
            return []
        tokens = [piece.token] if piece.token is not None else []
        said = self._said(told.row, tokens) if self._logprobs and tokens else None
        added = [self._added(piece.text, piece.reasoning)]
        for call in map(as_call, piece.calls):
            added += _call_deltas(len(self._calls[told.row]), call)
            self._calls[told.row].append(call)
        chunks = [self._chunk({"index": told.row, **one, "logprobs": None, "finish_reason": None}) for one in added]
        chunks[0]["choices"][0]["logprobs"] = said
        chunks[-1]["choices"][0]["finish_reason"] = piece.finish
        if piece.token is not None:
            chunks[0]["lora_drop"] = {"step": piece.token.kind.value}
        return chunks

    def last_chunks(self) -> list[dict[str, Any]]:
        """What comes after all tokens."""
        return [{**self._chunk(None), "usage": self.usage()}] if self._includes_usage else []

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        """What a stream that breaks off ends with."""
        return [error.body]

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_object, "choices": [] if choice is None else [choice]}
        if choice is not None and self._includes_usage_so_far:
            return chunk | {"usage": self.usage()}
        return chunk | {"usage": None} if self._includes_usage else chunk

    # ── at once ────────────────────────────────────────────────────────────────────────────────────────────

    def whole(self) -> Iterator[str]:
        """The answer as JSON in parts, once it is over. With logprobs a choice may have megabytes, and six times as
        many as objects, so there are those of one choice at a time."""
        yield as_json({**self._head, "object": self.whole_object})[:-1] + ',"choices":['
        for index in range(len(self.choices)):
            yield ("," if index else "") + as_json(self._choice(index))
        yield '],"usage":' + as_json(self.usage()) + "}"

    def _choice(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            **self._has("".join(self._texts[index]), self._calls[index], "".join(self._reasoning[index])),
            "logprobs": self._said(index, self._tokens[index]) if self._logprobs else None,
            "finish_reason": self.choices[index].finish,
        }

    def usage(self) -> dict[str, Any]:
        """Tokens, and the steps after the prompts; drafts, where refreshes verify them."""
        new = sum(choice.tokens for choice in self.choices)
        steps = {f"{kind.value}_steps": sum(choice.steps[kind] for choice in self.choices) for kind in StepKind}
        if self._verifies:
            steps["drafted"] = sum(choice.drafted for choice in self.choices)
            steps["accepted"] = sum(choice.accepted for choice in self.choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens()},
            **({"completion_tokens_details": {"reasoning_tokens": self._reasoned()}} if self._thinks else {}),
            "lora_drop": steps,
        }

    def _reasoned(self) -> int:
        return sum(choice.reasoned for choice in self.choices)

    def _cached_tokens(self) -> int:
        """Of the prompts, each counted once, those that none of its choices had to run."""
        reused = [choice.reused for choice in self.choices]
        of_prompts = [reused[begin : begin + self._each] for begin in range(0, len(reused), self._each)]
        return sum(min([count for count in counts if count is not None], default=0) for counts in of_prompts)

    def _token(self, token: int, part: str = "") -> tuple[str, bytes]:
        """A token's text and bytes; those of a part of a character stand behind `part` in the text."""
        held = self._codec.token_bytes(token)
        try:
            return held.decode(), held
        except UnicodeDecodeError:
            return part + "".join(f"\\x{byte:02x}" for byte in held), held

    def _listed(self, tokens: Sequence[Event]) -> list[dict[str, Any]]:
        """Tokens and their logprobs, as chats have them."""

        def one(token: int, logprob: float | None) -> dict[str, Any]:
            text, held = self._token(token)
            return {"token": text, "logprob": logprob, "bytes": list(held)}

        return [
            {**one(event.token, event.logprob), "top_logprobs": [one(*pair) for pair in event.top_logprobs]}
            for event in tokens
            if event.token is not None
        ]

    # ── what the two kinds differ in ───────────────────────────────────────────────────────────────────────

    def _begun(self, index: int) -> dict[str, Any]:
        """What a stream's choice begins with, maybe nothing."""
        raise NotImplementedError

    def _added(self, text: str, reasoning: str) -> dict[str, Any]:
        """Text in a chunk."""
        raise NotImplementedError

    def _has(self, text: str, calls: Sequence[dict[str, Any]], reasoning: str) -> dict[str, Any]:
        """The whole text, calls of tools, and the reasoning before them."""
        raise NotImplementedError

    def _said(self, index: int, tokens: Sequence[Event]) -> dict[str, Any]:
        """Tokens and their logprobs."""
        raise NotImplementedError


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def _begun(self, index: int) -> dict[str, Any]:
        return {"text": self._echoes[index]} if self._echoes[index] else {}

    def _added(self, text: str, reasoning: str) -> dict[str, Any]:
        return {"text": text}

    def _has(self, text: str, calls: Sequence[dict[str, Any]], reasoning: str) -> dict[str, Any]:
        return {"text": text}

    def _said(self, index: int, tokens: Sequence[Event]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for event in tokens:
            assert event.token is not None
            text, _ = self._token(event.token, _BYTES)
            found["tokens"].append(text)
            found["token_logprobs"].append(event.logprob)
            top = {} if event.logprob is None else {text: event.logprob}
            for token, logprob in event.top_logprobs:
                top.setdefault(self._token(token, _BYTES)[0], logprob)  # of tokens with one text the likeliest is told
            found["top_logprobs"].append(top or None)
            found["text_offset"].append(self._places[index].of(event, text))
        return found


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def _begun(self, index: int) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def _added(self, text: str, reasoning: str) -> dict[str, Any]:
        thought = {"reasoning_content": reasoning} if reasoning else {}
        return {"delta": thought | ({"content": text} if text or not reasoning else {})}

    def _has(self, text: str, calls: Sequence[dict[str, Any]], reasoning: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        return {"message": message | {"content": text or None, "tool_calls": calls} if calls else message}

    def _said(self, index: int, tokens: Sequence[Event]) -> dict[str, Any]:
        return {"content": self._listed(tokens), "refusal": None}
