"""What a client may ask of `/v1/responses`: the body of a request, and the conversation that it holds.

Enters: JSON. Leaves: a frozen model as for chats (requests.py), whose items are messages for a chat template. Nothing
is stored: a request has the whole conversation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from lora_drop_runtime import bounds
from lora_drop_runtime.grammars.tools import ALLOWED, MOST_TOOLS
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from .errors import ApiError
from .requests import (
    ANY,
    IN_ALL_CHANGES_NOTHING,
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
    count_parts,
    few_fields,
    role_for_template,
    utf8_json,
    within,
)

LOGPROBS = "message.output_text.logprobs"  # in `include`
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # parts, and what has them


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


def _in_chat(choice: FunctionChoice) -> dict[str, Any]:
    """As the chat's API has it."""
    return {"type": "function", "function": {"name": choice.name}}


class AllowedTools(StrictModel):
    """Of all tools those that may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[Items[FunctionChoice], Field(min_length=1, max_length=MOST_TOOLS)]


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
    if count_parts(given, ("content", "output", "summary")) > MOST_PARTS:
        raise ValueError(f"they have more than {MOST_PARTS} parts")
    for item in given:
        few_fields(item)
    return given


def _choice(given: Any) -> Any:
    """As for `_items`."""
    is_one = isinstance(given, dict) and given.get("type") == "function" and isinstance(given.get("name"), str)
    is_some = isinstance(given, dict) and given.get("type") == ALLOWED
    if given not in (None, "none", "auto", "required") and not is_one and not is_some:
        raise ValueError('it has to be none, auto, required, {"type": "function", "name": …}, or some of allowed_tools')
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
                add(role_for_template(role), item.text("content"))
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
        **IN_ALL_CHANGES_NOTHING,
        "background": (None, False),
        "background_options": (None,),
        "access_programs": (None,),
        "client_metadata": ANY,  # of Codex
        "context_management": (None, []),
        "conversation": (None,),
        "image": (None,),
        "max_tool_calls": ANY,  # of the API's own tools
        "previous_response_id": (None,),
        "prompt": (None,),
        "truncation": (None, "disabled"),
    }
    reasons: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("background", "conversation", "previous_response_id", "store"),
        "this server stores nothing; send the whole conversation as input, and wait for the answer",
    )
    format_field: ClassVar[str] = "text"
    prompt_field: ClassVar[str] = "input"
    effort_field: ClassVar[str] = "reasoning.effort"

    input: Annotated[Text | Annotated[list[dict[str, Any]], AfterValidator(utf8_json)], BeforeValidator(_items)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, within(bounds.TOKENS)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    include: Items[Text] | None = None
    text: TextOptions | None = None
    tools: Annotated[Items[FunctionTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"]
        | Annotated[FunctionChoice | AllowedTools, Field(discriminator="type")]
        | None,
        BeforeValidator(_choice),
    ] = None
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
        first = {"role": "system", "content": self.instructions, "tool_calls": None}
        return [*([] if self.instructions is None else [first]), *_messages(said)]

    @property
    def called_tools(self) -> list[dict[str, Any]] | None:
        functions = [_fields(tool) for tool in self.tools or ()]
        return [{"type": function.pop("type"), "function": function} for function in functions] or None

    @property
    def called_choice(self) -> object:
        choice = self.tool_choice
        if isinstance(choice, AllowedTools):
            return {"type": ALLOWED, ALLOWED: {"mode": choice.mode, "tools": [*map(_in_chat, choice.tools)]}}
        return _in_chat(choice) if isinstance(choice, FunctionChoice) else choice

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
        choice = self.tool_choice
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
            "tool_choice": choice.model_dump() if isinstance(choice, StrictModel) else choice or "auto",
            "tools": [{"parameters": None, "strict": True, **_fields(tool)} for tool in self.tools or ()],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": "disabled",
        }
