"""`/v1/responses`: its requests as conversations, and its answers as items of output, whole or in events.

Enters: JSON; events of a row. Leaves: messages for a chat template; the objects of OpenAI's Responses API. Nothing is
stored: a request has the whole conversation, and an answer cannot be asked for again.
"""

from __future__ import annotations

import copy
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from lora_drop_runtime import bounds
from lora_drop_runtime.decoding.row import Event
from lora_drop_runtime.grammars.tools import MOST_TOOLS
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from .answers import Answer, Piece, as_call, as_json
from .driver import Told
from .errors import ApiError
from .requests import (
    ANY,
    MOST_MESSAGES,
    MOST_PARTS,
    MOST_TOP,
    Conversation,
    Effort,
    Items,
    JsonObjectFormat,
    NamedSchema,
    StrictModel,
    Text,
    TextFormat,
    as_arguments,
    few_fields,
    utf8_json,
)

LOGPROBS = "message.output_text.logprobs"  # in `include`
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # parts, and what has them


# ── requests ───────────────────────────────────────────────────────────────────────────────────────────────────


class SchemaFormat(NamedSchema):
    type: Literal["json_schema"]


class TextOptions(StrictModel):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class FunctionTool(StrictModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    name: Text
    description: Text | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(utf8_json)] | None = None
    strict: bool | None = None  # followed they are anyway


class FunctionChoice(StrictModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    name: Text


class ReasoningOptions(StrictModel):
    """Reasoning is told as it is, whatever summary is asked for."""

    model_config = ConfigDict(extra="ignore")

    effort: Effort | None = None


class ResponseStreamOptions(StrictModel):
    include_obfuscation: Literal[False] | None = None  # there is none


def _fields(model: StrictModel) -> dict[str, Any]:
    """Those that are there, as JSON has them. Schemas stay as they are: pydantic takes none that is nested deep."""
    return {name.rstrip("_"): value for name, value in model if value is not None}


def _items(given: Any) -> Any:
    """Of a union pydantic says one error for each part."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not given or not all(isinstance(item, dict) for item in given):
        raise ValueError("it has to be a text, or a list of items, and not empty")
    if len(given) > MOST_MESSAGES:
        raise ValueError(f"{len(given)} items are too many, {MOST_MESSAGES} are the most")
    lists = [item.get(name) for item in given for name in ("content", "output", "summary")]
    if sum(len(one) for one in lists if isinstance(one, list)) > MOST_PARTS:
        raise ValueError(f"they have more than {MOST_PARTS} parts")
    for item in given:
        few_fields(item)
    return given


def _choice(given: Any) -> Any:
    """As for `_items`."""
    is_one = isinstance(given, dict) and given.get("type") == "function" and isinstance(given.get("name"), str)
    if given not in (None, "none", "auto", "required") and not is_one:
        raise ValueError('it has to be none, auto, required, or {"type": "function", "name": …}')
    return given


class _Item:
    """One of `input`, at a place there; what is wrong with it is an ApiError."""

    def __init__(self, place: int, fields: Mapping[str, Any]) -> None:
        self._place, self._fields = place, fields
        self.type = fields.get("type") or ("message" if "role" in fields else None)

    def wrong(self, said: str) -> ApiError:
        return ApiError(400, f"input.{self._place}: {said}.", param="input")

    def word(self, name: str) -> str:
        """A text that has to be there."""
        found = self._fields.get(name)
        if not isinstance(found, str) or not found:
            raise self.wrong(f"{name} is missing, or no text")
        return found

    def text(self, name: str) -> str:
        """A text, or the texts of a list of parts."""
        found = self._fields.get(name)
        if isinstance(found, str):
            return found
        if not isinstance(found, list):
            raise self.wrong(f"{name} has to be a text, or a list of parts")
        return "".join(map(self._part, found))

    def _part(self, part: Any) -> str:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(_TEXTS[kind]) if isinstance(kind, str) and kind in _TEXTS else None
        if not isinstance(text, str):
            raise self.wrong(f"messages are text alone: a part of the type {kind!r:.40} is none")
        return text

    def call(self) -> dict[str, Any]:
        """As a chat's message has it."""
        try:
            arguments = as_arguments(self._fields.get("arguments"))
        except ValueError as error:
            raise self.wrong(str(error)) from None
        if not isinstance(arguments, dict):
            raise self.wrong("the arguments of a call are no object")
        function = {"name": self.word("name"), "arguments": arguments}
        return {"id": self.word("call_id"), "type": "function", "function": function}

    def thoughts(self) -> str:
        """Of an item of reasoning; none where it has nothing that can be read, as where it is encrypted."""
        parts = self._fields.get("content") or self._fields.get("summary") or []
        texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
        return "".join(text for text in texts if isinstance(text, str))


def _messages(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As chat templates have them. Raises ApiError."""
    found, thoughts = list[dict[str, Any]](), ""

    def add(role: str, content: str, **others: Any) -> None:
        nonlocal thoughts
        thought = {"reasoning_content": thoughts} if thoughts and role == "assistant" else {}
        found.append({"role": role, "content": content, "tool_calls": None, **thought, **others})
        thoughts = ""

    for place, fields in enumerate(items):
        item = _Item(place, fields)
        if item.type == "message":
            role = item.word("role")
            if role == "assistant" and found and found[-1]["tool_calls"] and not thoughts:  # one turn, as chats have it
                found[-1]["content"] += item.text("content")
            else:
                add("system" if role == "developer" else role, item.text("content"))
        elif item.type == "function_call":
            if thoughts or not found or found[-1]["role"] != "assistant":
                add("assistant", "")
            found[-1]["tool_calls"] = [*(found[-1]["tool_calls"] or ()), item.call()]
        elif item.type == "function_call_output":
            add("tool", item.text("output"), tool_call_id=item.word("call_id"))
        elif item.type == "reasoning":
            thoughts += item.thoughts()
        else:
            raise item.wrong(f"an item of the type {item.type!r:.40} is not supported")
    if not found:
        raise ApiError(400, "input: it has no message.", param="input")
    return found


class ResponseRequest(Conversation):
    """The body of /v1/responses."""

    changes_nothing: ClassVar[Mapping[str, Sequence[Any]]] = {
        "background": (None, False),
        "background_options": (None,),
        "access_programs": (None,),
        "client_metadata": ANY,  # of Codex
        "context_management": (None, []),
        "conversation": (None,),
        "image": (None,),
        "max_tool_calls": ANY,  # of the API's own tools
        "moderation": (None,),
        "previous_response_id": (None,),
        "prompt": (None,),
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
        "truncation": (None, "disabled"),
        "user": ANY,
        "safety_identifier": ANY,
        "prompt_cache_key": ANY,
        "prompt_cache_options": ANY,
        "prompt_cache_retention": ANY,
    }
    format_field: ClassVar[str] = "text"
    prompt_field: ClassVar[str] = "input"
    effort_field: ClassVar[str] = "reasoning.effort"

    input: Annotated[Text | Annotated[list[dict[str, Any]], AfterValidator(utf8_json)], BeforeValidator(_items)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=bounds.TOKENS.least, le=bounds.TOKENS.most)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    include: Items[Text] | None = None
    text: TextOptions | None = None
    tools: Annotated[Items[FunctionTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Annotated[Literal["none", "auto", "required"] | FunctionChoice | None, BeforeValidator(_choice)] = None
    reasoning: ReasoningOptions | None = None
    metadata: Annotated[dict[Text, Text], BeforeValidator(few_fields)] | None = None
    stream_options: ResponseStreamOptions | None = None

    @model_validator(mode="after")
    def _agree(self) -> ResponseRequest:
        if self.top_logprobs and LOGPROBS not in (self.include or ()):
            said = f"it needs include: [{json.dumps(LOGPROBS)}]"
            raise PydanticCustomError("top_logprobs", "{said}", {"param": "top_logprobs", "said": said})
        return self

    @property
    def json_schema(self) -> dict[str, Any] | None:
        form = None if self.text is None else self.text.format
        if isinstance(form, SchemaFormat):
            return form.schema_
        return {"type": "object"} if isinstance(form, JsonObjectFormat) else None

    @property
    def for_template(self) -> list[dict[str, Any]]:
        said = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        first = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return [*_messages(first), *_messages(said)] if first else _messages(said)

    @property
    def called_tools(self) -> list[dict[str, Any]] | None:
        functions = [_fields(tool) for tool in self.tools or ()]
        return [{"type": function.pop("type"), "function": function} for function in functions] or None

    @property
    def called_choice(self) -> object:
        choice = self.tool_choice
        return {"type": "function", "function": {"name": choice.name}} if isinstance(choice, FunctionChoice) else choice

    @property
    def effort(self) -> str | None:
        return None if self.reasoning is None else self.reasoning.effort

    @property
    def new_tokens(self) -> int | None:
        return self.max_output_tokens

    @property
    def limit_field(self) -> str:
        return "max_output_tokens"

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None

    @property
    def told(self) -> dict[str, Any]:
        """What an answer says of its request."""
        form = TextFormat(type="text") if self.text is None or self.text.format is None else self.text.format
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": self.effort, "summary": None},
            "store": False,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": _fields(form)},
            "tool_choice": dict(choice) if isinstance(choice := self.tool_choice, FunctionChoice) else choice or "auto",
            "tools": [{"parameters": None, "strict": True, **_fields(tool)} for tool in self.tools or ()],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": "disabled",
        }


# ── answers ────────────────────────────────────────────────────────────────────────────────────────────────────


def _content(item: Mapping[str, Any]) -> dict[str, Any]:
    """The one part of a message or of reasoning."""
    part: dict[str, Any] = item["content"][0]
    return part


class ResponseAnswer(Answer):
    """Of /v1/responses: one row, whose reasoning, text and calls are items of `output`.

    Args:
        told: what it says of its request.
        options: of `Answer`, for one row.
    """

    prefix, whole_object, chunk_object = "resp_", "response", "response"
    format_field: ClassVar[str] = "text"
    end: ClassVar[bytes] = b""

    def __init__(self, *arguments: Any, told: Mapping[str, Any], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._told = told
        self._output = list[dict[str, Any]]()
        self._is_open = False  # whether the last of them grows
        self._held = list[Event]()  # tokens whose text is not told yet
        self._events = 0

    def take(self, told: Told) -> Piece:
        piece = self.choices[told.row].take(told.event)
        self._grow(piece)
        return piece

    # ── in events ──────────────────────────────────────────────────────────────────────────────────────────

    def first_chunks(self) -> list[dict[str, Any]]:
        return [self._of_all("created", "in_progress"), self._of_all("in_progress", "in_progress")]

    def chunks(self, told: Told) -> list[dict[str, Any]]:
        return self._grow(self.choices[told.row].take(told.event))

    def last_chunks(self) -> list[dict[str, Any]]:
        return [self._of_all(self._status, self._status)]

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        code = "invalid_prompt" if error.status < 500 else "server_error"
        said = {"code": code, "message": error.body["error"]["message"]}
        return [*self._close("incomplete"), self._of_all("failed", "failed", error=said)]

    def whole(self) -> Iterator[str]:
        yield as_json(self._response(self._status))

    # ── what a piece adds ──────────────────────────────────────────────────────────────────────────────────

    def _grow(self, piece: Piece) -> list[dict[str, Any]]:
        """To the output; the events that say so."""
        if piece.token is not None:
            self._held.append(piece.token)
        added = list[dict[str, Any]]()
        if piece.reasoning:
            added += self._more("reasoning", "reasoning_text", piece.reasoning)
        if piece.text:
            added += self._more("message", "output_text", piece.text)
        for call in piece.calls:
            added += self._called(as_call(call))
        if piece.finish is not None:
            added += [] if self._output else self._begin("message", "output_text")
            added += self._close("incomplete" if piece.finish == "length" else "completed")
        deltas = [event for event in added if event["type"].endswith(".delta")]
        if piece.token is not None and deltas:
            deltas[0]["lora_drop"] = {"step": piece.token.kind.value}
        return added

    def _more(self, kind: str, part: str, text: str) -> list[dict[str, Any]]:
        """Text of a message, or of reasoning."""
        is_same = self._is_open and self._output[-1]["type"] == kind
        added = [] if is_same else [*self._close("completed"), *self._begin(kind, part)]
        content, said = _content(self._output[-1]), {}
        content["text"] += text
        if kind == "message":
            said = {"logprobs": self._listed(self._held) if self._logprobs else []}
            content["logprobs"] += said["logprobs"]
        self._held = []
        return [*added, self._of_part(f"{part}.delta", delta=text, **said)]

    def _begin(self, kind: str, part: str) -> list[dict[str, Any]]:
        """An item that grows."""
        if kind == "message":
            content: dict[str, Any] = {"type": part, "text": "", "annotations": [], "logprobs": []}
            item: dict[str, Any] = {"id": f"msg_{uuid.uuid4().hex}", "type": kind, "role": "assistant"}
        else:
            content = {"type": part, "text": ""}
            item = {"id": f"rs_{uuid.uuid4().hex}", "type": kind, "summary": []}
        begun = {**item, "status": "in_progress", "content": []}
        self._output.append({**item, "status": "in_progress", "content": [content]})
        self._is_open = True
        place = len(self._output) - 1
        first = self._event("output_item.added", output_index=place, item=begun)
        return [first, self._of_part("content_part.added", part=copy.deepcopy(content))]

    def _close(self, status: str) -> list[dict[str, Any]]:
        """The item that grows, if there is one."""
        if not self._is_open:
            return []
        item = self._output[-1]
        self._is_open, item["status"] = False, status
        content = _content(item)
        said = {"logprobs": content["logprobs"]} if item["type"] == "message" else {}
        return [
            self._of_part(f"{content['type']}.done", text=content["text"], **said),
            self._of_part("content_part.done", part=content),
            self._event("output_item.done", output_index=len(self._output) - 1, item=item),
        ]

    def _called(self, call: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A call, which is told once it has ended."""
        added, self._held = self._close("completed"), []
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call["id"], "name": name}
        done = {**item, "arguments": arguments, "status": "completed"}
        self._output.append(done)
        place = {"output_index": len(self._output) - 1}
        of_item = {**place, "item_id": item["id"]}
        return [
            *added,
            self._event("output_item.added", **place, item={**item, "arguments": "", "status": "in_progress"}),
            self._event("function_call_arguments.delta", **of_item, delta=arguments),
            self._event("function_call_arguments.done", **of_item, name=name, arguments=arguments),
            self._event("output_item.done", **place, item=done),
        ]

    # ── objects ────────────────────────────────────────────────────────────────────────────────────────────

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._events += 1
        return {"type": f"response.{kind}", "sequence_number": self._events - 1, **fields}

    def _of_part(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Of the one part of the last item."""
        place = {"output_index": len(self._output) - 1, "item_id": self._output[-1]["id"], "content_index": 0}
        return self._event(kind, **place, **fields)

    def _of_all(self, kind: str, status: str, **fields: Any) -> dict[str, Any]:
        return self._event(kind, response={**self._response(status), **fields})

    @property
    def _status(self) -> str:
        return "incomplete" if self.choices[0].finish == "length" else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        is_over = status in ("completed", "incomplete")
        return {
            "id": self._head["id"],
            "object": self.whole_object,
            "created_at": self._head["created"],
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._head["model"],
            **self._told,
            "output": [*self._output],
            "usage": self._counted() if is_over else None,
        }

    def _counted(self) -> dict[str, Any]:
        """The usage, in the words of this API."""
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._reasoned()},
            "total_tokens": usage["total_tokens"],
            "lora_drop": usage["lora_drop"],
        }
