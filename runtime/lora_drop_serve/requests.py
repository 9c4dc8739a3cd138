"""What a client may ask: the bodies of requests, checked field by field.

Enters: JSON. Leaves: frozen models whose fields are of their types and within their bounds, or errors that name a
field. Knows no tokenizer and no engine: whether a prompt fits is found out later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from lora_drop_runtime import bounds
from lora_drop_runtime.bounds import Bounds
from lora_drop_runtime.decoding.sampling import SamplingOptions
from lora_drop_runtime.files import is_utf8
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

MOST_BODY_BYTES = 8 << 20
MOST_STOPS, MOST_STOP_CHARACTERS = 32, 256  # each is looked for at each token
MOST_TOP = 20  # logprobs of a token
MOST_CHOICES = 128


def _utf8(text: str) -> str:
    """Halves of characters, which JSON can write, are in no text."""
    if not is_utf8(text):
        raise ValueError("it holds halves of characters (lone surrogates)")
    return text


Text = Annotated[str, AfterValidator(_utf8)]

_ANY: list[Any] = []  # whatever the value, it changes nothing
# Fields of OpenAI's API that this server does not have, and the values with which they change nothing
CHANGES_NOTHING: dict[str, Sequence[Any]] = {
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": _ANY,
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "metadata": _ANY,
    "user": _ANY,
    "safety_identifier": _ANY,
    "prompt_cache_key": _ANY,
    "prompt_cache_retention": _ANY,
}


def _within(found: Bounds) -> Any:
    """A number of the runtime's bounds, as a field's constraint."""
    return Field(gt=found.least, le=found.most) if found.open else Field(ge=found.least, le=found.most)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Model):
    include_usage: bool | None = None


class _Request(_Model):
    """Fields of both kinds of request. `k` and `policy` are this server's own, and so are `top_k` and
    `repetition_penalty`."""

    model: Text | None = None
    temperature: Annotated[float, _within(bounds.TEMPERATURE)] | None = None
    top_p: Annotated[float, _within(bounds.TOP_P)] | None = None
    top_k: Annotated[int, _within(bounds.TOP_K)] | None = None
    repetition_penalty: Annotated[float, _within(bounds.PENALTY)] | None = None
    seed: Annotated[int, _within(bounds.SEED)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, _within(bounds.TOKENS)] | None = None
    stop: Text | list[Text] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    k: Annotated[int, _within(bounds.K)] | Literal["auto"] | None = None
    policy: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_here(cls, data: Any) -> Any:
        """Fields of the API that would have to change the answer are errors; others are left out."""
        if not isinstance(data, dict):
            return data
        kept = dict(data)
        for name in CHANGES_NOTHING.keys() & data.keys():
            known = CHANGES_NOTHING[name]
            if known is not _ANY and kept[name] not in known:
                raise PydanticCustomError(
                    "unsupported_parameter", "this server does not support it with this value", {"param": name}
                )
            del kept[name]
        return kept

    @field_validator("stop")
    @classmethod
    def _bounded(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MOST_STOPS:
            raise ValueError(f"{len(stops)} strings are too many, {MOST_STOPS} are the most")
        if not all(0 < len(text) <= MOST_STOP_CHARACTERS for text in stops):
            raise ValueError(f"a string has to have 1 to {MOST_STOP_CHARACTERS} characters")
        return stop

    @model_validator(mode="after")
    def _streams(self) -> _Request:
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
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, choice: int) -> SamplingOptions:
        """How the tokens of one of `n` choices are drawn: choice i draws by seed + i."""
        return SamplingOptions(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=None if self.seed is None else (self.seed + choice) % (int(bounds.SEED.most) + 1),
        )


class CompletionRequest(_Request):
    """The body of /v1/completions."""

    usual_tokens: ClassVar[int | None] = 16  # where none are asked for and as many fit: the API's default

    prompt: Text | list[Text] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _said_in_one_sentence(cls, prompt: Any) -> Any:
        """Of a union pydantic says one error for each part."""
        parts = prompt if isinstance(prompt, list) else [prompt]
        texts = all(isinstance(part, str) for part in parts)
        ids = isinstance(prompt, list) and all(type(part) is int for part in parts)
        rows = all(isinstance(part, list) and all(type(one) is int for one in part) for part in parts)
        if not parts or not (texts or ids or rows):
            raise ValueError("it has to be a text, a list of token ids, or a list of either, and not empty")
        return prompt

    @model_validator(mode="after")
    def _no_logprobs_of_prompts(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError("echo", "logprobs of a prompt are not computed", {"param": "echo"})
        return self

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


class TextPart(_Model):
    type: Literal["text"]
    text: Text


class Message(_Model):
    """What a role says. Fields beside these go to the template as they are."""

    model_config = ConfigDict(extra="allow")

    role: Text
    content: Text | list[TextPart] | None = None

    @property
    def for_template(self) -> dict[str, Any]:
        content = self.content if not isinstance(self.content, list) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role  # its name in newer versions of the API
        return {**(self.model_extra or {}), "role": role, "content": content}


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    usual_tokens: ClassVar[int | None] = None  # as many as fit

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, _within(bounds.TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise PydanticCustomError("max_tokens", "it differs from max_completion_tokens", {"param": "max_tokens"})
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "it needs logprobs: true", {"param": "top_logprobs"})
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def limit_field(self) -> str:
        """The field that says how many new tokens there may be."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def likeliest(self) -> int | None:
        """As for a completion."""
        return (self.top_logprobs or 0) if self.logprobs else None
