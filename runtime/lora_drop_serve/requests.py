"""What a client may ask: the bodies of requests, checked field by field.

Enters: JSON. Leaves: frozen models whose fields are of their types and within their bounds, or errors that name a
field. Knows no tokenizer and no engine: whether a prompt fits is found out later.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from lora_drop_runtime import bounds
from lora_drop_runtime.bounds import Bounds
from lora_drop_runtime.decoding.sampling import MOST_BIASES, SamplingOptions
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.files import is_utf8
from lora_drop_runtime.grammars.calls import AUTO, NONE
from lora_drop_runtime.grammars.tools import MOST_TOOLS, Tools
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .errors import ApiError, refused

MOST_BODY_BYTES = 4 << 20
MOST_FIELDS = 128  # of an object that is not a schema
MOST_PROMPTS = MOST_MESSAGES = MOST_PARTS = 4096  # each is looked at by itself, while nobody else is answered
MOST_STOPS, MOST_STOP_CHARACTERS = 32, 256  # each is looked for at each token
MOST_TOP = 20  # logprobs of a token
MOST_CHOICES = 128


def _utf8(text: str) -> str:
    """Halves of characters, which JSON can write, are in no text."""
    if not is_utf8(text):
        raise ValueError("it holds halves of characters (lone surrogates)")
    return text


Text = Annotated[str, AfterValidator(_utf8)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Item = TypeVar("Item")
Stop = Annotated[Text, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]
Items = Annotated[list[Item], Field(fail_fast=True)]  # pydantic would tell of each wrong item of millions


def few_fields(data: Any) -> Any:
    if isinstance(data, dict) and len(data) > MOST_FIELDS:
        raise ValueError(f"it has {len(data)} fields, {MOST_FIELDS} are the most")
    return data


def count_parts(items: Any, fields: Sequence[str]) -> int:
    """How many parts the lists of these fields have, in all objects of a list."""
    held = [one for one in items if isinstance(one, dict)] if isinstance(items, list) else []
    lists = [one.get(name) for one in held for name in fields]
    return sum(len(one) for one in lists if isinstance(one, list))


def utf8_json(value: Any) -> Any:
    """The same of texts within JSON."""
    try:
        _utf8(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


ANY: list[Any] = []  # whatever the value, it changes nothing
# Fields of OpenAI's APIs that this server does not have, and the values with which they change nothing: of all of them,
# and of completions and chats
IN_ALL_CHANGES_NOTHING: dict[str, Sequence[Any]] = {
    "moderation": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "user": ANY,
    "safety_identifier": ANY,
    "prompt_cache_key": ANY,
    "prompt_cache_options": ANY,
    "prompt_cache_retention": ANY,
}
CHANGES_NOTHING: dict[str, Sequence[Any]] = {
    **IN_ALL_CHANGES_NOTHING,
    "metadata": ANY,
    "best_of": (None, 1),
    "suffix": (None, ""),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}


def _only(value: Any) -> dict[str, Any]:
    """The schema of one value. Generators of clients take no list within `enum`, and no null beside another type."""
    if isinstance(value, list):
        return {
            "type": "array",
            "items": {"enum": value} if value else {},
            "minItems": len(value),
            "maxItems": len(value),
        }
    return {"type": "null"} if value is None else {"const": value}


def _describe_the_rest(schema: dict[str, Any], model: type[Request]) -> None:
    """Add what is taken though it changes nothing to the description of a request."""
    for name, values in model.changes_nothing.items():
        if name in schema["properties"]:
            continue
        said = {} if values is ANY else {"anyOf": [_only(value) for value in values]}
        schema["properties"][name] = {**said, "description": "Changes nothing."}


def within(found: Bounds) -> Any:
    """A number of the runtime's bounds, as a field's constraint."""
    return Field(gt=found.least, le=found.most) if found.open else Field(ge=found.least, le=found.most)


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _stops(stop: Any) -> Any:
    stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
    if len(stops) > MOST_STOPS:
        raise ValueError(f"{len(stops)} strings are too many, {MOST_STOPS} are the most")
    if not all(isinstance(text, str) for text in stops):
        raise ValueError("it has to be a text, or a list of texts")
    if not all(0 < len(text) <= MOST_STOP_CHARACTERS for text in stops):
        raise ValueError(f"a string has to have 1 to {MOST_STOP_CHARACTERS} characters")
    return stop


_TOKEN_ID = r"^(0|[1-9][0-9]{0,9})$"  # as a key of JSON


def _biases(given: Any) -> Any:
    """Of each wrong pair pydantic would say its own errors."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError("it has to be an object whose keys are token ids")
    if len(given) > MOST_BIASES:
        raise ValueError(f"{len(given)} tokens are too many, {MOST_BIASES} are the most")
    for token, bias in given.items():
        if re.fullmatch(_TOKEN_ID, token) is None:  # search lets a line end behind it
            raise ValueError(f"{token!r:.40} is no token id")
        if type(bias) not in (int, float) or not bounds.BIAS.least <= bias <= bounds.BIAS.most:
            raise ValueError(f"the bias of token {token} has to be a number from {bounds.BIAS}")
    return given


class StreamOptions(StrictModel):
    """`continuous_usage_stats`, as vLLM has it: every chunk with a choice has the usage so far."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None  # there is none
    continuous_usage_stats: bool | None = None


class TextFormat(StrictModel):
    type: Literal["text"]


class JsonObjectFormat(StrictModel):
    type: Literal["json_object"]


class NamedSchema(StrictModel):
    """A schema is followed to the letter, `strict` or not."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class JsonSchemaFormat(StrictModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


Biases = Annotated[
    dict[Annotated[str, Field(pattern=_TOKEN_ID)], Annotated[float, within(bounds.BIAS)]],
    Field(max_length=MOST_BIASES, json_schema_extra={"additionalProperties": False}),
]


class Request(StrictModel):
    """What a request of any kind has. `k`, `policy` and `lenience` are this server's own, and so are `top_k`, `min_p`,
    `repetition_penalty` and `ignore_eos`.

    Attributes:
        changes_nothing: fields of the API that are not here, and the values with which they change nothing.
        reasons: why those of them with other values are refused, where there is more to say.
        format_field: says what form the text has.
        choices: texts for each prompt.
        stops: texts that end one.
        json_schema: that a text follows; None where it is free.
        includes_usage: whether a stream ends with the usage.
        includes_usage_so_far: whether each chunk has the usage so far.
    """

    model_config = ConfigDict(json_schema_extra=_describe_the_rest)
    changes_nothing: ClassVar[Mapping[str, Sequence[Any]]] = CHANGES_NOTHING
    reasons: ClassVar[Mapping[str, str]] = {}
    format_field: ClassVar[str] = "response_format"

    model: Text | None = None
    temperature: Annotated[float, within(bounds.TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(ge=0, le=bounds.TOP_P.most)] | None = None
    top_k: Annotated[int, within(bounds.TOP_K)] | None = None
    min_p: Annotated[float, within(bounds.SHARE)] | None = None
    repetition_penalty: Annotated[float, within(bounds.PENALTY)] | None = None
    presence_penalty: Annotated[float, within(bounds.COUNT_PENALTY)] | None = None
    frequency_penalty: Annotated[float, within(bounds.COUNT_PENALTY)] | None = None
    logit_bias: Annotated[Biases | None, BeforeValidator(_biases)] = None
    seed: Annotated[int, Field(ge=-bounds.SEED.most - 1, le=bounds.SEED.most)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    k: Annotated[int, within(bounds.K)] | Literal["auto"] | None = None
    policy: Text | None = None
    lenience: Annotated[float, within(bounds.LENIENCE)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_here(cls, data: Any) -> Any:
        """Fields of the API that would have to change the answer are errors; others are left out."""
        if not isinstance(data, dict):
            return data
        kept = dict(few_fields(data))
        for name in cls.changes_nothing.keys() & data.keys() - cls.model_fields.keys():
            known, value = cls.changes_nothing[name], kept[name]
            same = any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in known)
            if known is not ANY and not same:
                said = cls.reasons.get(name, "this server does not support it with this value")
                raise PydanticCustomError("unsupported_parameter", "{said}", {"param": name, "said": said})
            del kept[name]
        return kept

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.ignore_eos and self.json_schema is not None:
            raise PydanticCustomError("ignore_eos", "JSON ends with an end token", {"param": "ignore_eos"})
        return self

    @property
    def stops(self) -> list[str]:
        return []

    @property
    def choices(self) -> int:
        return 1

    @property
    def json_schema(self) -> dict[str, Any] | None:
        return None

    @property
    def includes_usage(self) -> bool:
        return False

    @property
    def includes_usage_so_far(self) -> bool:
        return False

    @property
    def biases(self) -> dict[int, float]:
        """By token id."""
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}

    @property
    def sampling(self) -> list[SamplingOptions]:
        """How the tokens of each of `n` choices are drawn: choice i draws by seed + i."""
        first = SamplingOptions(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p or sys.float_info.min,  # 0: the likeliest token
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.biases,
        )
        if self.seed is None:
            return [first] * self.choices
        return [first.seeded((self.seed + choice) % (int(bounds.SEED.most) + 1)) for choice in range(self.choices)]


class _Generation(Request):
    """Fields of completions and chats."""

    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, within(bounds.TOKENS)] | None = None
    stop: Annotated[Stop | Annotated[Items[Stop], Field(max_length=MOST_STOPS)] | None, BeforeValidator(_stops)] = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "it needs stream: true", {"param": "stream_options"})
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def json_schema(self) -> dict[str, Any] | None:
        if isinstance(self.response_format, JsonSchemaFormat):
            return self.response_format.json_schema.schema_
        return {"type": "object"} if isinstance(self.response_format, JsonObjectFormat) else None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def includes_usage_so_far(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


class CompletionRequest(_Generation):
    """The body of /v1/completions."""

    usual_tokens: ClassVar[int | None] = 16  # where none are asked for and as many fit: the API's default

    prompt: Annotated[Text | Items[Text] | Items[int] | Items[Items[int]], Field(min_length=1)]
    echo: bool | None = None
    context_tokens: Annotated[int, Field(ge=1)] | Items[Annotated[int, Field(ge=1)]] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=bounds.TOKENS.most)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _said_in_one_sentence(cls, prompt: Any) -> Any:
        """Of a union pydantic says one error for each part."""
        parts = prompt if isinstance(prompt, list) else [prompt]
        if len(parts) > MOST_PROMPTS and type(parts[0]) is not int:
            raise ValueError(f"{len(parts)} prompts are too many, {MOST_PROMPTS} are the most")
        texts = all(isinstance(part, str) for part in parts)
        ids = isinstance(prompt, list) and all(type(part) is int for part in parts)
        rows = all(isinstance(part, list) and all(type(one) is int for one in part) for part in parts)
        if not parts or prompt == "" or not (texts or ids or rows):
            raise ValueError("it has to be a text, a list of token ids, or a list of either, and not empty")
        return prompt

    @field_validator("context_tokens", mode="before")
    @classmethod
    def _counts(cls, counts: Any) -> Any:
        """As for `prompt`."""
        each = counts if isinstance(counts, list) else [counts]
        if counts is not None and not (each and all(type(one) is int and one > 0 for one in each)):
            raise ValueError("it has to be a number from 1 on, or a list of such numbers, one for each prompt")
        return counts

    @model_validator(mode="after")
    def _says_something(self) -> CompletionRequest:
        if self.context_tokens is not None and not self.scores_prompt:
            raise PydanticCustomError("context_tokens", "it needs echo and logprobs", {"param": "context_tokens"})
        if self.max_tokens == 0 and not self.scores_prompt:
            raise PydanticCustomError("max_tokens", "0 needs echo and logprobs", {"param": "max_tokens"})
        return self

    @property
    def scores_prompt(self) -> bool:
        """Whether logprobs of the prompt are asked for."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # then all are
        return self.prompt

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def limit_field(self) -> str:
        """The field that says how many new tokens there may be."""
        return "max_tokens"

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens are told with each; None tells no logprobs."""
        return self.logprobs


class TextPart(StrictModel):
    type: Literal["text"]
    text: Text


def as_arguments(value: Any) -> Any:
    """JSON, as the API has it; templates write it themselves. An empty text is what some clients send for none."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value or "{}")
    except (ValueError, RecursionError):
        raise ValueError("the arguments of a call are no JSON") from None


class CalledFunction(StrictModel):
    model_config = ConfigDict(extra="ignore")  # the client library's own, such as `parsed_arguments`

    name: Text
    arguments: Annotated[dict[str, Any], BeforeValidator(as_arguments)]


class MessageCall(StrictModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    function: CalledFunction


def _texts(content: Any) -> Any:
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str | list | None) or not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        raise ValueError("messages are text alone: a string, or parts of the type text")
    return content


def role_for_template(role: str) -> str:
    return "system" if role == "developer" else role  # its name in newer versions of the API


def _describe_what_is_said(schema: dict[str, Any]) -> None:
    """What `_says_something` asks for, for the description."""
    schema["anyOf"] = [{"required": ["content"]}, {"required": ["tool_calls"]}]


class Message(StrictModel):
    """What a role says. Fields beside these go to the template as they are."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_describe_what_is_said)

    role: Text
    content: Annotated[Text | Items[TextPart] | None, BeforeValidator(_texts)] = None
    tool_calls: Items[MessageCall] | None = None

    _few_fields = model_validator(mode="before")(few_fields)

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self

    @property
    def for_template(self) -> dict[str, Any]:
        # None stands beside calls alone, where templates of Qwen3 and others want an empty text
        content = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""
        calls = [{**dict(call), "function": dict(call.function)} for call in self.tool_calls or ()] or None
        said = {"role": role_for_template(self.role), "content": content, "tool_calls": calls}
        return {**(self.model_extra or {}), **said}


class Conversation(Request):
    """What a request has whose prompt is a conversation.

    Attributes:
        prompt_field: has the conversation.
        for_template: its messages, as chat templates have them.
        called_tools, called_choice: as the chat's API has them.
        effort: how much to reason.
    """

    usual_tokens: ClassVar[int | None] = None  # as many as fit
    scores_prompt: ClassVar[bool] = False
    context_tokens: ClassVar[None] = None
    prompt_field: ClassVar[str]
    effort_field: ClassVar[str]

    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(few_fields), AfterValidator(utf8_json)] | None = (
        None
    )

    @model_validator(mode="after")
    def _ends_a_call(self) -> Self:
        if self.ignore_eos and self.called_tools:
            raise PydanticCustomError("ignore_eos", "calls of tools end with an end token", {"param": "ignore_eos"})
        return self

    @property
    def for_template(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    @property
    def called_tools(self) -> list[dict[str, Any]] | None:
        raise NotImplementedError

    @property
    def called_choice(self) -> object:
        raise NotImplementedError

    @property
    def effort(self) -> str | None:
        raise NotImplementedError

    @property
    def new_tokens(self) -> int | None:
        """How many new tokens there may be; None for as many as are usual."""
        raise NotImplementedError

    @property
    def limit_field(self) -> str:
        """The field that says how many."""
        raise NotImplementedError

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens are told with each; None tells no logprobs."""
        raise NotImplementedError

    @property
    def called(self) -> Tools | None:
        """The tools that the model may call; None where it is to call none.

        Raises:
            ApiError: they or the choice are none, or a form of the text stands beside them.
        """
        if not self.called_tools:
            if self.called_choice not in (None, NONE, AUTO):
                raise ApiError(400, "tool_choice: it needs tools.", param="tool_choice")
            return None
        choice = AUTO if self.called_choice is None else self.called_choice
        parallel = self.parallel_tool_calls is not False
        try:
            Tools(self.called_tools)
        except InputError as error:
            raise refused(error, "tools") from None
        try:
            tools = Tools(self.called_tools, choice, parallel=parallel)
        except InputError as error:
            raise refused(error, "tool_choice") from None
        if choice == NONE:
            return None
        if self.json_schema is not None:
            field = self.format_field
            said = f"{field}: it cannot be followed beside tools; use one of the two, or tool_choice: none."
            raise ApiError(400, said, param=field)
        return tools


class ChatRequest(_Generation, Conversation):
    """The body of /v1/chat/completions."""

    prompt_field: ClassVar[str] = "messages"
    effort_field: ClassVar[str] = "reasoning_effort"

    messages: Annotated[Items[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, within(bounds.TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    tools: Annotated[Items[dict[str, Any]], Field(max_length=MOST_TOOLS), AfterValidator(utf8_json)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: Effort | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _few_parts(cls, messages: Any) -> Any:
        count = count_parts(messages, ("content", "tool_calls"))
        if count > MOST_PARTS:
            raise ValueError(f"they have {count} parts and calls, {MOST_PARTS} are the most")
        return messages

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise PydanticCustomError("max_tokens", "it differs from max_completion_tokens", {"param": "max_tokens"})
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "it needs logprobs: true", {"param": "top_logprobs"})
        return self

    @property
    def for_template(self) -> list[dict[str, Any]]:
        return [message.for_template for message in self.messages]

    @property
    def called_tools(self) -> list[dict[str, Any]] | None:
        return self.tools

    @property
    def called_choice(self) -> object:
        return self.tool_choice

    @property
    def effort(self) -> str | None:
        return self.reasoning_effort

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def limit_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
