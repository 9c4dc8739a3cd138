"""The routes: a request is checked, its rows are submitted, and their events are told as they come.

Enters: a driver and the bundle's tokenizer. Leaves: an ASGI application, which starts the driver on its event loop and
stops it at its end. What costs time here, tokenizing, templates and whole answers, runs in other threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import hmac
import importlib.metadata
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from lora_drop_runtime.decoding.constraint import Constraint
from lora_drop_runtime.decoding.opening import checked_policy
from lora_drop_runtime.decoding.schedules import row_schedule
from lora_drop_runtime.errors import InputError, LoraDropError, counted, one_line
from lora_drop_runtime.grammars.call_styles import with_calls_in_texts
from lora_drop_runtime.grammars.calls import Calls
from lora_drop_runtime.grammars.grammar import Grammars
from lora_drop_runtime.plan.drafting import AUTO, VerifiedSchedule, draft_source
from lora_drop_runtime.plan.policy import Policy
from lora_drop_runtime.plan.schedule import AdaptiveSchedule, PeriodicSchedule, Schedule
from lora_drop_runtime.reasoning import Thoughts, reasoning_style
from lora_drop_runtime.text import TextCodec, TextTooLong, checked_variables
from numpy.typing import NDArray
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import Answer, ChatAnswer, CompletionAnswer
from .driver import Driver, Job, RowRequest
from .errors import ApiError, closing, of_validation, refused, too_slow, unavailable
from .log import Log
from .openapi import (
    METRICS_ANSWER,
    METRICS_TYPE,
    ChatCompletion,
    Completion,
    Model,
    Models,
    ResponseObject,
    Status,
    errors,
    generated,
)
from .records import GONE, Record, Records
from .requests import MOST_BODY_BYTES, ChatRequest, CompletionRequest, Conversation
from .response_answers import ResponseAnswer
from .response_requests import ResponseRequest

BODY_SECONDS = 120  # that a client may take for a body
DISCARD_SECONDS = 10  # that a body which is refused may still come
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
MOST_COMPILING = 2  # schemas and tools at once, each in a process of its own
ACCEPT_LOG_SECONDS = 60
TOO_LONG = "context_length_exceeded"  # a code of the API
# New ones between two collections. A body may have a million lists, and each collection looks at many of them again:
# by Python's own number, some hundreds, that takes four times as long as to read them
COLLECTED_OBJECTS = 50_000

Ids = NDArray[np.int64]
T = TypeVar("T")


def _error(error: ApiError, record: Record) -> JSONResponse:
    record.fails(error.body)
    return JSONResponse(error.body, error.status, error.headers)


def _record(request: Request) -> Record:
    """Of a request, which the gate has begun."""
    record: Record = request.state.record
    return record


def _path(scope: Scope) -> str:
    """Of the routes here, which may stand below a prefix."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


async def _discard(receive: Receive) -> None:
    """Take the rest of a body: a client that is still sending when its connection is closed may not see the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while (await receive()).get("more_body"):
                pass


async def _refuse(answer: JSONResponse, receive: Receive, send: Send) -> None:
    """Answer from the head alone: the answer is there before the body is, and ends when that does."""
    await send({"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": True})
    await _discard(receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _of_ours() -> ApiError:
    return ApiError(500, "The server has an error of its own; its log has more.", code="internal_error")


class Gate:
    """Around all routes: the key, size and time of bodies, the record of each request, and the end of connections once
    the server leaves.

    Args:
        app: behind it.
        key: that `/v1` and `/metrics` ask for.
        driver: says when the server leaves.
        records: of the requests.
        paths: that are counted by name.
    """

    def __init__(self, app: ASGIApp, key: str | None, driver: Driver, records: Records, paths: Sequence[str]) -> None:
        self._app, self._driver, self._records, self._paths = app, driver, records, frozenset(paths)
        self._key = None if key is None else key.encode("utf-8", "surrogateescape")

    def _check(self, scope: Scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if headers.keys() >= {b"content-length", b"transfer-encoding"}:  # a proxy may go by the other (RFC 9112, 6.1)
            said = "The request has both Content-Length and Transfer-Encoding: where it ends is not certain."
            raise ApiError(400, said, code="malformed", headers={"Connection": "close"})
        if self._key is not None and _path(scope).startswith(("/v1", "/metrics")):
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
                raise ApiError(
                    401,
                    "The API key is missing or wrong: send it as Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > MOST_BODY_BYTES:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body has more than {MOST_BODY_BYTES} bytes.", code="body_too_large")

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        taken, is_whole, has_left = 0, False, False
        until = asyncio.get_running_loop().time() + BODY_SECONDS

        async def received() -> Message:
            nonlocal taken, is_whole, has_left
            try:
                async with asyncio.timeout_at(None if is_whole else until):
                    message = await receive()
            except TimeoutError:
                error = too_slow("body", BODY_SECONDS)
                raise HTTPException(error.status, error.body, error.headers) from None
            has_left = message["type"] == "http.disconnect"
            if has_left and not is_whole:
                raise HTTPException(GONE)
            is_whole = not message.get("more_body")
            piece = message.get("body", b"")
            if self._driver.is_closing and not (is_whole or piece):  # `Protocol.shutdown`: the rest is not waited for
                raise HTTPException(503, closing().body, closing().headers)
            taken += len(piece)
            if taken > MOST_BODY_BYTES:
                if message.get("more_body"):
                    await _discard(receive)
                raise HTTPException(413, self._too_large().body)  # which FastAPI lets through
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._records.answer(record, message["status"])
                headers = MutableHeaders(raw=[*message["headers"]])
                headers.update(self._records.headers(record))
                if self._driver.is_leaving:  # a client that keeps its connection would never ask another server
                    headers["Connection"] = "close"
                message = {**message, "headers": headers.raw}
            await send(message)
            is_last = message["type"] == "http.response.body" and not message.get("more_body")
            record.is_told = is_last and not has_left  # to one that has left a server sends nothing, and says nothing

        try:
            self._check(scope)
        except ApiError as error:
            await _refuse(_error(error, record), receive, sent)
            return
        await self._app(scope, received, sent)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if path.startswith(("http://", "https://")):  # as to a proxy (RFC 9112, 3.2.2)
            with contextlib.suppress(ValueError):
                path = urlsplit(path).path or "/"
        found = _path({**scope, "path": path})
        record = self._records.begin(found if found in self._paths else "other", scope["headers"])
        scope["state"] = {**scope.get("state", {}), "record": record}  # also for what answers our own errors
        try:
            await self._answer({**scope, "path": path}, receive, send, record)
        except Exception:
            if record.status is None:
                self._records.refuse(record, _of_ours())
            else:
                record.fails(_of_ours().body)
            raise
        finally:
            self._records.end(record)


def _handle_errors(app: FastAPI, records: Records) -> None:
    """Every error as the API's error object."""

    @app.exception_handler(ApiError)
    async def of_the_api(request: Request, error: ApiError) -> Response:
        return _error(error, _record(request))

    @app.exception_handler(RequestValidationError)
    async def of_a_body(request: Request, error: RequestValidationError) -> Response:
        return _error(of_validation(error.errors()), _record(request))

    @app.exception_handler(AnyHTTPException)
    async def of_http(request: Request, error: AnyHTTPException) -> Response:
        if error.status_code == GONE:
            return Response(status_code=GONE)
        if isinstance(error.detail, dict):  # made above
            _record(request).fails(error.detail)
            return JSONResponse(error.detail, error.status_code, error.headers)
        where = f"{request.method} {request.url.path}"[:200]
        said = {404: f"There is nothing at {where}.", 405: f"{where} is not possible: see docs/serving.md."}
        code = {400: "json", 404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        message = said.get(error.status_code, "The body cannot be read as JSON.")
        return _error(ApiError(error.status_code, message, code=code, headers=error.headers), _record(request))

    @app.exception_handler(RecursionError)
    async def of_depth(request: Request, _: RecursionError) -> Response:
        """JSON that could just be read, but not be written into a message a few calls further in."""
        return _error(ApiError(400, "The body is nested too deep.", code="json"), _record(request))

    @app.exception_handler(Exception)
    async def of_ours(request: Request, _: Exception) -> Response:
        answer = _error(_of_ours(), _record(request))
        # The gate is behind this, and uvicorn closes the connection
        answer.headers.update({**records.headers(_record(request)), "Connection": "close"})
        return answer


class _Delivery(StreamingResponse):
    """A job's answer, in parts or one. The job ends with the response, whatever ends that: a reader that is slow keeps
    its places."""

    def __init__(self, parts: AsyncIterator[bytes], job: Job, kind: str, headers: Mapping[str, str]) -> None:
        super().__init__(parts, media_type=kind, headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._job:
            await super().__call__(scope, receive, send)


def _sse(data: dict[str, Any]) -> bytes:
    """In ASCII: many clients, such as httpx's `iter_lines`, end a line at U+2028, U+2029 and U+0085, too. Events of
    responses have their type in front, too."""
    kind = f"event: {data['type']}\n" if "type" in data else ""
    return kind.encode() + b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def _events(answer: Answer, job: Job, record: Record) -> AsyncIterator[bytes]:
    """The chunks of an answer; those that are there at once go out together, also those before it breaks off."""
    out = list[bytes]()
    try:
        begin = b"".join(map(_sse, answer.first_chunks()))
        if begin:
            yield begin
        while not answer.is_over:
            out = []
            for told in await job.told():
                chunks = answer.chunks(told)
                out += map(_sse, chunks)
                if chunks and answer.choices[told.row].finish and not answer.choices[told.row].is_over:
                    job.cancel(told.row)  # at a stop string
            if out:
                yield b"".join(out)
        yield b"".join(map(_sse, answer.last_chunks())) + answer.end
    except ApiError as error:
        record.fails(error.body)
        yield b"".join([*out, *map(_sse, answer.failed(error))])


def _stream(answer: Answer, job: Job, record: Record) -> Response:
    return _Delivery(_events(answer, job, record), job, "text/event-stream", {"Cache-Control": "no-store"})


async def _in_turn(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def _whole(answer: Answer, job: Job) -> Response:
    while not answer.is_over:
        for told in await job.told():
            if answer.take(told).finish and not answer.choices[told.row].is_over:
                job.cancel(told.row)
    parts = await asyncio.to_thread(lambda: [part.encode() for part in answer.whole()])
    return _Delivery(_in_turn(parts), job, "application/json", {"Content-Length": str(sum(map(len, parts)))})


async def _gone(request: Request) -> None:
    """Returns when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The work's result; None where the client does not wait for it."""
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(work), asyncio.create_task(_gone(request))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def _readable(param: str) -> Iterator[None]:
    """What a text or a template is refused for, as an error of a field."""
    try:
        yield
    except InputError as error:
        raise refused(error, param, TOO_LONG if isinstance(error, TextTooLong) else None) from None


class _LoopErrors:
    """An event loop's own errors in the log. asyncio says thousands of times a second, each with a traceback, that no
    connection can be accepted; this says it once a minute."""

    def __init__(self, log: Log) -> None:
        self._log, self._quiet_until = log, 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not str(context.get("message", "")).startswith("socket.accept() out of system resource"):
            loop.default_exception_handler(context)
        elif loop.time() >= self._quiet_until:
            self._quiet_until = loop.time() + ACCEPT_LOG_SECONDS
            self._log.say("warning: too many connections are open, no more can be accepted (ulimit -n)")


def _failure(error: BaseException) -> str:
    """What the log says of an engine that has failed: the error in full, which clients are not told."""
    said = str(error) if isinstance(error, LoraDropError) else f"{type(error).__name__}: {error}".removesuffix(": ")
    return f"error: the engine has failed, and nothing runs any more: {one_line(said.replace(chr(10), ' '))}"


def _of_effort(effort: str | None, template: str, field: str) -> dict[str, Any]:
    """What a chat template is told of how much to reason, as a field of the request says.

    Raises:
        ApiError: it knows no such thing.
    """
    if effort is None:
        return {}
    if "reasoning_effort" in template:
        return {"reasoning_effort": effort}
    if "enable_thinking" in template:  # of Qwen3, GLM, Gemma 4 and others, which reason or do not
        return {"enable_thinking": effort != "none"}
    if effort != "none" or reasoning_style(template) is not None:
        said = f"{field} is {effort}, and the model's chat template does not know it. Leave it out."
        raise ApiError(400, said, param=field.partition(".")[0])
    return {}


def _k_of(schedule: Schedule) -> int | str:
    """As a request would say it."""
    if isinstance(schedule, VerifiedSchedule):
        return AUTO if schedule.drafts is None else schedule.drafts
    assert isinstance(schedule, PeriodicSchedule | AdaptiveSchedule)  # a server's has a name
    return schedule.k


class Service:
    """What the routes share: how a request becomes rows, and rows become an answer.

    Args:
        driver: runs the bundle.
        codec: its tokenizer and chat template.
        name: of the model; the bundle's when None.
    """

    def __init__(self, driver: Driver, codec: TextCodec, name: str | None = None) -> None:
        self.driver, self._codec = driver, codec
        model = driver.bundle.manifest.model
        self.name = model.name if name is None else name
        self._vocabulary, self._created = model.vocab_size, int(time.time())
        # Apart from the loop's own threads, which others need for their prompts: a compilation whose client has gone
        # away still runs to its end, and one that has not begun never does
        self._compilers = ThreadPoolExecutor(MOST_COMPILING, thread_name_prefix="lora-drop-compile")

    def model(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        facts = {
            "k": _k_of(self.driver.schedule),
            "policy": self.driver.policy.name,
            "lenience": self.driver.lenience,
            "chat": self._codec.chat_template is not None,
            "max_seq_len": self.driver.max_seq_len,
            "max_prompt_len": self.driver.max_prompt_len,
        }
        return {"id": self.name, "object": "model", "created": self._created, "owned_by": "local", "lora_drop": facts}

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            said = f"There is no model {name!r:.80}; this server has {self.name!r}."
            raise ApiError(404, said, param="model", code="model_not_found")

    def _check_count(self, prompts: int, body: CompletionRequest | Conversation, param: str) -> None:
        """Whether there are places for so many prompts. Raises ApiError."""
        count = prompts * body.choices
        if count > self.driver.most_rows:
            said = f"The request asks for {count} texts, this server has places for {self.driver.most_rows}."
            raise ApiError(400, said, param="n" if body.choices > 1 else param)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        self.check_model(body.model)
        _record(request).model = self.name
        prompts = body.prompts
        self._check_count(len(prompts), body, "prompt")
        encoded = await self._encoded(prompts)
        echoes = None
        if body.echo:
            decode = self._codec.decode
            texts = await asyncio.to_thread(lambda: [p if isinstance(p, str) else decode(p) for p in prompts])
            echoes = [text for text in texts for _ in range(body.choices)]
        return await self._answer(CompletionAnswer, body, encoded, "prompt", request, echoes)

    def _contexts(self, prompts: Sequence[Ids], counts: int | Sequence[int] | None) -> Sequence[int | None]:
        """How many tokens of each prompt are its context. Raises ApiError."""
        if counts is None:
            return [None] * len(prompts)
        each = counts if isinstance(counts, Sequence) else [counts] * len(prompts)
        if len(each) != len(prompts):
            said = f"context_tokens has {len(each)} numbers, the number of prompts is {len(prompts)}."
            raise ApiError(400, said, param="context_tokens")
        for count, prompt in zip(each, prompts, strict=True):
            if count > len(prompt):
                said = f"context_tokens is {count}, and the prompt has {counted(len(prompt), 'token')}."
                raise ApiError(400, said, param="context_tokens")
        return each

    async def chat(self, body: Conversation, kind: Callable[..., Answer], request: Request) -> Response:
        """`kind` makes the answer, of what `Answer` is made of."""
        self.check_model(body.model)
        _record(request).model = self.name
        self._check_count(1, body, body.prompt_field)
        messages, tools = body.for_template, body.called
        with _readable("chat_template_kwargs"):
            variables = checked_variables(body.chat_template_kwargs or {})
        template = (self._codec.tool_template if tools is not None else None) or self._codec.chat_template or ""
        variables = _of_effort(body.effort, template, body.effort_field) | variables
        encode = functools.partial(
            self._codec.encode_chat,
            with_calls_in_texts(messages, template),
            variables=variables,
            most_tokens=self.driver.max_prompt_len,
        )
        try:
            with _readable(body.prompt_field if tools is None else "tools"):
                ids = await asyncio.to_thread(encode, tools=None if tools is None else tools.for_template)
        except ApiError:
            if tools is not None:
                with _readable(body.prompt_field):  # which may be at fault by themselves
                    await asyncio.to_thread(encode)
            raise
        with _readable("tools"):
            calls = None if tools is None else tools.calls(self._codec.tool_template or self._codec.chat_template)
        # What has to be JSON or a call from its first letter has no room for reasoning
        is_free = body.json_schema is None if calls is None else calls.is_free
        thoughts = self._codec.thoughts(ids, with_tools=tools is not None) if is_free else None
        return await self._answer(kind, body, [ids], body.prompt_field, request, calls=calls, thoughts=thoughts)

    async def _encoded(self, prompts: Sequence[str] | Sequence[list[int]]) -> list[Ids]:
        def ids(prompt: str | list[int]) -> Ids:
            if isinstance(prompt, str):
                found = self._codec.encode(prompt, most_tokens=self.driver.max_prompt_len)
                self._check_length(len(found), "prompt")  # before the others are read
                return found
            self._check_length(len(prompt), "prompt")  # before millions of ids are
            self._check_vocabulary(prompt, "prompt")
            return np.array(prompt, np.int64)

        with _readable("prompt"):
            return await asyncio.to_thread(lambda: [ids(prompt) for prompt in prompts])

    def _check_vocabulary(self, tokens: Iterable[int], param: str) -> None:
        """Whether the model has them. Raises ApiError."""
        wrong = next((token for token in tokens if not 0 <= token < self._vocabulary), None)
        if wrong is not None:
            said = f"Token id {wrong!r:.40} is outside the vocabulary, which has ids 0 to {self._vocabulary - 1}."
            raise ApiError(400, said, param=param)

    def _policy(self, body: CompletionRequest | Conversation) -> Policy:
        """The request's policy; `k` is checked beside it."""
        driver = self.driver
        try:
            policy = driver.policy if body.policy is None else checked_policy(driver.bundle, body.policy)
        except InputError as error:
            raise refused(error, "policy") from None
        try:
            schedule = row_schedule(driver.bundle.manifest, driver.schedule, body.k, policy)
        except InputError as error:
            raise refused(error, "policy" if body.k is None else "k") from None
        try:
            draft_source(None, policy, len(driver.bundle.manifest.plan.sites), body.lenience)
        except InputError as error:
            raise refused(error, "lenience") from None
        scores_context = body.scores_prompt and body.context_tokens is None
        if scores_context and not policy.verifies and schedule != PeriodicSchedule(0):
            said = (
                "echo: logprobs of a context are those of full steps. Send k: 0, start the server with --k 0,"
                " or say with context_tokens how many tokens of the prompt are context: the others have the schedule's."
            )
            raise ApiError(400, said, param="echo")
        return policy

    def _check_length(self, length: int, param: str) -> None:
        """Whether a prompt of so many tokens fits. Raises ApiError."""
        if not length:
            raise ApiError(400, "The prompt is empty: it has no tokens.", param=param)
        most = min(self.driver.max_prompt_len, self.driver.max_seq_len - 1)
        if length > most:
            said = f"The prompt has {length} tokens, this server takes {most}."
            raise ApiError(400, said, param=param, code=TOO_LONG)

    def _new_tokens(self, prompt: Ids, body: CompletionRequest | Conversation, param: str) -> int:
        """How many new tokens a row may have. Raises ApiError where the prompt or they do not fit."""
        driver, length, asked = self.driver, len(prompt), body.new_tokens
        asked = 1 if asked == 0 else asked  # which is not told
        self._check_length(length, param)
        room = driver.max_seq_len - length
        if asked is not None and asked > room:
            said = f"Prompt and new tokens are {length} + {asked} tokens, this server takes {driver.max_seq_len}."
            raise ApiError(400, said, param=body.limit_field, code=TOO_LONG)
        return min(room, body.usual_tokens or room) if asked is None else asked

    async def _answer(
        self,
        kind: Callable[..., Answer],
        body: CompletionRequest | Conversation,
        prompts: Sequence[Ids],
        param: str,
        request: Request,
        echoes: Sequence[str] | None = None,
        calls: Calls | None = None,
        thoughts: Thoughts | None = None,
    ) -> Response:
        policy = self._policy(body)
        self._check_vocabulary(body.biases, "logit_bias")
        shared: dict[str, Any] = {"k": body.k, "policy": body.policy, "lenience": body.lenience}
        shared["logprobs"] = body.likeliest
        if body.scores_prompt:
            shared["prompt_logprobs"] = True
        if body.ignore_eos or (body.scores_prompt and body.new_tokens in (0, 1)):
            shared["stop_token_ids"] = ()  # of a scored prompt: who reads such answers counts on one token
        rows, samplings = [], body.sampling
        for prompt, context in zip(prompts, self._contexts(prompts, body.context_tokens), strict=True):
            new_tokens = self._new_tokens(prompt, body, param)
            for sampling in samplings:
                own = {"context_tokens": context, "sampling": sampling}
                rows.append(RowRequest(prompt, new_tokens, shared | own))
        answer = kind(
            self._codec,
            self.name,
            sum(map(len, prompts)),
            len(rows),
            body.stops,
            choices=body.choices,
            logprobs=body.likeliest is not None,
            includes_usage=body.includes_usage,
            includes_usage_so_far=body.includes_usage_so_far,
            verifies=policy.verifies,
            echoes=echoes,
            calls=calls,
            thoughts=thoughts,
            is_silent=body.new_tokens == 0,
        )
        job = self.driver.submit(rows)
        _record(request).runs(answer, job)

        async def begin() -> None:
            await job.begin(await self._constraint(body, calls, thoughts, job))

        try:
            return await self._told(answer, job, begin, bool(body.stream), request)
        except InputError as error:  # the batch has too little room beside what was checked: a smaller k takes more
            raise refused(error, "k" if body.k is not None else body.limit_field) from None

    @functools.cached_property
    def _grammars(self) -> Grammars:
        # Of the tokenizer that is open: the directory may have gone, or hold another bundle by now
        manifest = self.driver.bundle.manifest
        return Grammars(self._codec, manifest.model.vocab_size, manifest.special_tokens.eos)

    async def _constraint(
        self, body: CompletionRequest | Conversation, calls: Calls | None, thoughts: Thoughts | None, job: Job
    ) -> Constraint | None:
        """What the rows may write. To find it out may take seconds, so that few are at it at once."""
        schema = body.json_schema
        if schema is None and calls is None:
            return None

        def compiled() -> Constraint | None:
            if calls is not None:
                return calls.constraint(self._grammars, thoughts)
            assert schema is not None
            return self._grammars.json_schema(schema)

        try:
            return await job.unless_ended(asyncio.get_running_loop().run_in_executor(self._compilers, compiled))
        except InputError as error:
            raise refused(error, body.format_field if calls is None else "tools") from None
        except LoraDropError as error:
            raise unavailable(error) from None

    async def _told(
        self, answer: Answer, job: Job, begin: Callable[[], Awaitable[None]], streams: bool, request: Request
    ) -> Response:
        """The response; the job ends with it."""
        with contextlib.ExitStack() as ends:
            ends.enter_context(job)

            async def work() -> Response:
                await begin()
                record = _record(request)
                return _stream(answer, job, record) if streams else await _whole(answer, job)

            found = await _unless_gone(request, work())
            if found is None:
                return Response(status_code=GONE)
            ends.pop_all()  # by the response
            return found


def create_app(
    driver: Driver,
    codec: TextCodec,
    *,
    api_key: str | None = None,
    model_name: str | None = None,
    log_requests: bool = False,
    tells_ids: bool = True,
) -> FastAPI:
    """An application that serves a driver's bundle.

    Args:
        driver: is started and stopped by the application's lifespan.
        codec: the bundle's tokenizer and chat template.
        api_key: that clients have to send; None lets everybody in.
        model_name: what the model is called in requests and answers; the bundle's name for it when None.
        log_requests: write a line of JSON on standard error at each request's end.
        tells_ids: answers have `X-Request-ID`, the request's own or a new one; False where what is before this does so.
    """

    # tokenizers would make a thread for each core at the first text, which no text here gains by, and where a container
    # may not have so many it takes no text ever after
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log = Log()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_exception_handler(_LoopErrors(log))
        collects = gc.get_threshold()
        gc.set_threshold(COLLECTED_OBJECTS, *collects[1:])
        driver.start()
        yield
        await driver.stop()
        await log.close()
        gc.set_threshold(*collects)

    app = FastAPI(
        title="LoRA-Drop",
        description="OpenAI's API for one bundle.",
        version=importlib.metadata.version("lora-drop-export"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    driver.on_failure = lambda error: log.say(_failure(error))
    records = Records(driver.metrics, log if log_requests else None, tells_ids=tells_ids)
    app.state.driver, app.state.records, app.state.log = driver, records, log
    served = driver.bundle.manifest.model
    driver.metrics.info.info(
        {
            "version": app.version,
            "model": served.name,
            "target": driver.target,
            "dtype": served.weight_dtype,
            "k": str(_k_of(driver.schedule)),
            "policy": driver.policy.name,
        }
    )
    service = Service(driver, codec, model_name)
    page = resources.files("lora_drop_serve").joinpath("page.html").read_text(encoding="utf-8")
    _handle_errors(app, records)
    # What the description says of the key, which the gate asks for
    keyed: Any = {} if api_key is None else {"dependencies": [Depends(HTTPBearer(auto_error=False))]}
    wrong_key = () if api_key is None else (401,)

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"})

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=Status, responses=errors(503))
    async def health() -> dict[str, str]:
        driver.check()
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", response_model=Status, responses=errors(503))
    async def ready() -> dict[str, str]:
        driver.check()
        if driver.is_leaving or driver.is_closing:
            raise closing()
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={**METRICS_ANSWER, **errors(*wrong_key)}, **keyed)
    async def metrics() -> Response:
        return Response(driver.metrics.text(), media_type=METRICS_TYPE)

    @app.get("/v1/models", response_model=Models, responses=errors(*wrong_key), **keyed)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model()]}

    @app.get("/v1/models/{name:path}", response_model=Model, responses=errors(*wrong_key, 404), **keyed)
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model()

    @app.post("/v1/completions", response_class=JSONResponse, responses=generated(Completion), **keyed)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await service.complete(body, request)

    @app.post("/v1/chat/completions", response_class=JSONResponse, responses=generated(ChatCompletion), **keyed)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await service.chat(body, ChatAnswer, request)

    @app.post("/v1/responses", response_class=JSONResponse, responses=generated(ResponseObject), **keyed)
    async def responses(body: ResponseRequest, request: Request) -> Response:
        return await service.chat(body, functools.partial(ResponseAnswer, told=body.told), request)

    paths = [route.path for route in app.routes if hasattr(route, "path") and "{" not in route.path]
    app.add_middleware(Gate, key=api_key, driver=driver, records=records, paths=paths)
    return app
