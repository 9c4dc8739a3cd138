"""The API's answers as its own description has them (`/openapi.json`), from which clients are made.

answers.py and errors.py make plain dictionaries of these forms; the tests hold both together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorObject(_Said):
    """`param` is the field of the request that is wrong, `code` is for programs."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorAnswer(_Said):
    error: ErrorObject


class Status(_Said):
    status: Literal["ok"]


class ModelFacts(_Said):
    """What a request gets where it does not say, and what it may have."""

    k: int | Literal["auto"]
    policy: str
    lenience: float
    chat: bool
    max_seq_len: int
    max_prompt_len: int


class Model(_Said):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    lora_drop: ModelFacts


class Models(_Said):
    object: Literal["list"]
    data: list[Model]


class Steps(_Said):
    """After the prompts, of all choices; drafts under `lossless`."""

    refresh_steps: int
    lora_steps: int
    drafted: int | None = None
    accepted: int | None = None


class PromptTokens(_Said):
    """Of the prompts, those whose K/V were there from other requests."""

    cached_tokens: int


class CompletionTokens(_Said):
    reasoning_tokens: int


class Usage(_Said):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens | None = None
    lora_drop: Steps


class CompletionLogprobs(_Said):
    """A list each, with an item for each token; of a prompt's first token nothing is known."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Said):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(_Said):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Called(_Said):
    """`arguments` is JSON."""

    name: str
    arguments: str


class Call(_Said):
    id: str
    type: Literal["function"]
    function: Called


class ChatMessage(_Said):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None


class TopToken(_Said):
    """`bytes` tells a part of a character, which in `token` is written like `\\xf0`."""

    token: str
    logprob: float | None
    bytes: list[int]


class ChatToken(TopToken):
    top_logprobs: list[TopToken]


class ChatLogprobs(_Said):
    content: list[ChatToken]
    refusal: None


class ChatChoice(_Said):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(_Said):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: Annotated[list[ChatChoice], Field(min_length=1)]
    usage: Usage


class OutputText(_Said):
    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[ChatToken]


class OutputMessage(_Said):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class ReasoningText(_Said):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(_Said):
    id: str
    type: Literal["reasoning"]
    summary: list[None]
    status: Literal["completed", "incomplete"]
    content: list[ReasoningText]


class FunctionCall(_Said):
    """`arguments` is JSON."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Literal["completed"]


class InputTokens(PromptTokens):
    cache_write_tokens: Literal[0]


class ResponseUsage(_Said):
    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: CompletionTokens
    total_tokens: int
    lora_drop: Steps


class Incomplete(_Said):
    reason: Literal["max_output_tokens"]


class ReasoningTold(_Said):
    effort: str | None
    summary: None


class TextTold(_Said):
    format: dict[str, Any]


class ResponseObject(_Said):
    """An answer, and what its request said."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: Incomplete | None
    model: str
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: ReasoningTold
    store: Literal[False]
    temperature: float
    text: TextTold
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    output: Annotated[list[OutputMessage | ReasoningItem | FunctionCall], Field(min_length=1)]
    usage: ResponseUsage


_WHEN = {
    400: "A field is wrong, unknown, or not supported with this value; `param` names it",
    401: "The key is missing or wrong",
    404: "There is no such model",
    408: "The body did not come in time",
    413: "The body is too large",
    429: "The queue is full",
    500: "The tokens could not be computed",
    503: "The server closes, or its engine has failed",
}
_LATER = {"Retry-After": {"description": "Seconds", "schema": {"type": "string", "pattern": "^[0-9]+$"}}}
Responses = dict[int | str, dict[str, Any]]
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METRICS_ANSWER: Responses = {200: {"content": {METRICS_TYPE: {"schema": {"type": "string"}}}}}


def errors(*statuses: int) -> Responses:
    """For a route's `responses`: each is the error object."""
    found: Responses = {one: {"model": ErrorAnswer, "description": _WHEN[one]} for one in statuses}
    for status in found.keys() & {429}:
        found[status]["headers"] = _LATER
    return found


def generated(model: type[BaseModel]) -> Responses:
    """For a route that generates: whole, or a stream of events where the request has `stream`."""
    events = "A chunk of the API after each `data: `, at last `[DONE]`. An error on the way is an error object."
    if model is ResponseObject:
        events = "Events of the API, with their type behind `event: ` and in `data`. An error is `response.failed`."
    stream = {"schema": {"description": events}}  # no type: readers take it for that of each event, or of all
    done = {"model": model, "description": "The answer", "content": {"text/event-stream": stream}}
    refused = {"model": ErrorAnswer, "description": "The request is refused"}  # not FastAPI's own 422
    return {200: done, **errors(*_WHEN), "4XX": refused}
