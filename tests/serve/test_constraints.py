"""Response formats and tools, as OpenAI's own client asks for them and reads them."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from lora_drop_runtime import Batch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.grammars.grammar import GrammarConstraint, Grammars
from lora_drop_runtime.text import TextCodec
from lora_drop_serve.app import MOST_COMPILING
from pydantic import BaseModel

from tests.support.bundles import make_bundle, record_again
from tests.support.serving import Served, await_that, serving, word_bundle
from tests.support.tokenizers import END, byte_tokenizer

from .test_errors import CHAT, COMPLETIONS, check_error

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% if tools %}<tool_call>name, arguments</tool_call>{% endif %}"
    "{% for message in messages %}{{ message.role }}:{{ message.content.split('</think>')[-1] }}"
    "{% for call in message.tool_calls %} {{ call.function.name }}({{ call.function.arguments.city }}){% endfor %}|"
    "{% endfor %}"
)
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
WEATHER = {"type": "function", "function": {"name": "weather"}}
HI: list[Any] = [{"role": "user", "content": "Hi"}]
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}


def calling_bundle(root: Path) -> Bundle:
    """Whose template has tools, and whose tokens are bytes and the marks of calls."""
    make_bundle("llama", root, drop_layers=(3, 4, 6), k=3, max_batch=8, max_seq_len=256)
    (root / "tokenizer").mkdir(exist_ok=True)
    (root / "tokenizer/chat_template.jinja").write_text(TEMPLATE)
    byte_tokenizer(root, calls=True)
    return Bundle.open(root)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return calling_bundle(tmp_path_factory.mktemp("constraints") / "b")


@pytest.fixture(scope="module")
def served(bundle: Bundle) -> Iterator[Served]:
    batch = Batch.open(bundle.root, slots=4, policy="backfill", threads=1)
    with serving(batch, TextCodec.open(bundle.root / "tokenizer"), max_waiting=4) as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0, timeout=None) as client:
        yield client


def asked(bundle: Bundle, **fields: Any) -> dict[str, Any]:
    return {"model": bundle.manifest.model.name, "messages": HI, "seed": 3, "max_tokens": 180, **fields}


def joined(stream: Any) -> dict[str, Any]:
    """What the chunks of one choice come to, as the API says to join them."""
    content, calls, finish = "", list[dict[str, str]](), None
    for chunk in stream:
        (choice,) = chunk.choices
        assert finish is None
        finish = choice.finish_reason
        content += choice.delta.content or ""
        for part in choice.delta.tool_calls or ():
            if part.index == len(calls):
                assert part.type == "function"
                assert re.fullmatch("[0-9a-f]{9}", part.id)  # Mistral's templates take no others
                calls.append({"name": part.function.name, "arguments": ""})
            calls[part.index]["arguments"] += part.function.arguments
    return {"content": content or None, "calls": calls, "finish": finish}


def said(choice: Any) -> dict[str, Any]:
    """The same of a whole answer."""
    calls = [call.function.model_dump(include={"name", "arguments"}) for call in choice.message.tool_calls or ()]
    return {"content": choice.message.content or None, "calls": calls, "finish": choice.finish_reason}


# ── response formats ───────────────────────────────────────────────────────────────────────────────────────────


def test_what_follows_a_schema_is_valid(client: openai.OpenAI, bundle: Bundle) -> None:
    for k, policy in ((0, "backfill"), (3, "backfill"), (3, "lossless")):
        extra = {"k": k, "policy": policy}
        done = client.chat.completions.create(**asked(bundle, n=3, response_format=FORMAT, extra_body=extra))
        for choice in done.choices:
            jsonschema.validate(json.loads(choice.message.content), CITY)
            assert choice.finish_reason == "stop"
    stream = client.chat.completions.create(**asked(bundle, response_format=FORMAT), stream=True)
    whole = client.chat.completions.create(**asked(bundle, response_format=FORMAT))
    assert joined(stream) == said(whole.choices[0])


def test_a_completion_follows_a_schema(client: openai.OpenAI, bundle: Bundle) -> None:
    name = bundle.manifest.model.name
    extra = {"response_format": FORMAT}
    done = client.completions.create(model=name, prompt=["Hi", "Ho"], max_tokens=200, seed=3, extra_body=extra)
    for choice in done.choices:
        jsonschema.validate(json.loads(choice.text), CITY)


def test_an_object_and_what_is_cut(client: openai.OpenAI, bundle: Bundle) -> None:
    done = client.chat.completions.create(**asked(bundle, max_tokens=9, response_format={"type": "json_object"}))
    assert done.choices[0].message.content.startswith("{")
    assert done.choices[0].finish_reason == "length" or json.loads(done.choices[0].message.content) is not None
    done = client.chat.completions.create(**asked(bundle, max_tokens=9, response_format=FORMAT))
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == ('{"city": ', "length")
    free = client.chat.completions.create(**asked(bundle))
    text = client.chat.completions.create(**asked(bundle, response_format={"type": "text"}))
    assert text.choices[0].message.content == free.choices[0].message.content


class City(BaseModel):
    city: Literal["Rome", "Oslo"]
    capital: bool


def test_a_pydantic_model_is_parsed(client: openai.OpenAI, bundle: Bundle) -> None:
    done = client.chat.completions.parse(**asked(bundle, response_format=City))
    found = done.choices[0].message.parsed
    assert isinstance(found, City)
    called: dict[str, Any] = {
        "tools": [openai.pydantic_function_tool(City)],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    done = client.chat.completions.parse(**asked(bundle, **called))
    assert isinstance(done.choices[0].message.tool_calls[0].function.parsed_arguments, City)
    with client.chat.completions.stream(**asked(bundle, **called)) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, City)


# ── tools ──────────────────────────────────────────────────────────────────────────────────────────────────────


def check_calls(found: dict[str, Any]) -> None:
    for call in found["calls"]:
        jsonschema.validate(json.loads(call["arguments"]), CITY if call["name"] == "weather" else {"maxProperties": 0})


@pytest.mark.parametrize("choice", ["required", WEATHER], ids=["required", "named"])
def test_a_call_that_has_to_be_made(client: openai.OpenAI, bundle: Bundle, choice: Any) -> None:
    for parallel in (True, False):
        fields = asked(bundle, tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel)
        whole = said(client.chat.completions.create(**fields).choices[0])
        assert whole["calls"]
        assert (whole["content"] is None) == (whole["finish"] == "tool_calls")  # else a further call was cut
        several = parallel and choice == "required"
        assert several or (len(whole["calls"]), whole["finish"]) == (1, "tool_calls")
        assert choice == "required" or [call["name"] for call in whole["calls"]] == ["weather"]
        check_calls(whole)
        stream = joined(client.chat.completions.create(**fields, stream=True))
        assert stream == whole


def test_under_auto_the_model_chooses(client: openai.OpenAI, bundle: Bundle) -> None:
    """Text streams as it comes, calls behind it; a stream is the whole answer."""
    fields = asked(bundle, tools=TOOLS, n=8, parallel_tool_calls=False, logprobs=True)
    with_calls = without = 0
    for choice in client.chat.completions.create(**fields).choices:
        found = said(choice)
        check_calls(found)
        with_calls += bool(found["calls"] and found["content"])
        without += not found["calls"]
        assert (found["finish"] == "tool_calls") == bool(found["calls"])
        alone = {**fields, "n": 1, "seed": 3 + choice.index}
        chunks = list(client.chat.completions.create(**alone, stream=True))
        assert joined(chunks) == found
        tokens = [token.token for chunk in chunks if (part := chunk.choices[0].logprobs) for token in part.content]
        assert tokens == [token.token for token in choice.logprobs.content]
    assert with_calls
    assert without


def test_arguments_are_an_object_though_the_schema_does_not_say_so(client: openai.OpenAI, bundle: Bundle) -> None:
    loose = {"type": "function", "function": {"name": "f", "parameters": {"maxProperties": 0}}}
    done = client.chat.completions.create(**asked(bundle, n=3, tools=[loose], tool_choice="required"))
    calls = [call for choice in done.choices for call in said(choice)["calls"]]
    assert calls
    assert {call["arguments"] for call in calls} == {"{}"}


def test_a_text_of_a_special_token_that_a_schema_demands_is_written(client: openai.OpenAI, bundle: Bundle) -> None:
    demanded = schema({"const": f"a{END}"})
    for streams in (False, True):
        done = client.chat.completions.create(**asked(bundle, **demanded), stream=streams)
        found = joined(done) if streams else said(done.choices[0])
        assert found == {"content": f'"a{END}"', "calls": [], "finish": "stop"}


def test_a_mark_in_the_reasoning_begins_no_call(bundle: Bundle, tmp_path: Path) -> None:
    """The prompt begins the reasoning, and the model writes nothing but the mark of a call if it may."""
    root = shutil.copytree(bundle.root, tmp_path / "b")
    (root / "tokenizer/chat_template.jinja").write_text(TEMPLATE + "<think>")
    record_again(root)
    codec = TextCodec.open(root / "tokenizer")
    (mark,) = codec.encode("<tool_call>").tolist()
    body = {"messages": HI, "tools": TOOLS, "parallel_tool_calls": False, "max_tokens": 3, "logit_bias": {mark: 100}}
    with serving(Batch.open(root, slots=1, threads=1), codec) as server:
        (choice,) = server.http.post("/v1/chat/completions", json=body).json()["choices"]
        assert (choice["message"]["reasoning_content"], choice["finish_reason"]) == ("<tool_call>" * 3, "length")


def test_with_none_there_are_no_calls(client: openai.OpenAI, bundle: Bundle) -> None:
    free = client.chat.completions.create(**asked(bundle))
    done = client.chat.completions.create(**asked(bundle, tools=TOOLS, tool_choice="none"))
    assert done.choices[0].message.tool_calls is None
    assert done.choices[0].message.content == free.choices[0].message.content
    assert done.usage.prompt_tokens == free.usage.prompt_tokens
    done = client.chat.completions.create(**asked(bundle, tools=TOOLS, tool_choice="none", response_format=FORMAT))
    jsonschema.validate(json.loads(done.choices[0].message.content), CITY)


def test_a_cut_call_is_text(client: openai.OpenAI, bundle: Bundle) -> None:
    done = client.chat.completions.create(**asked(bundle, tools=TOOLS, tool_choice=WEATHER, max_tokens=20))
    found = said(done.choices[0])
    assert found["finish"] == "length"
    assert found["calls"] == []
    assert found["content"].startswith('<tool_call>\n{"name": "we')


def test_the_history_of_calls_goes_to_the_template(client: openai.OpenAI, bundle: Bundle) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages: list[Any] = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "Rain"}]},
    ]
    text = "user:Hi|assistant: weather(Rome)|tool:Rain|"
    wanted = client.completions.create(
        model=bundle.manifest.model.name, prompt=text, max_tokens=20, seed=3, temperature=1
    )
    done = client.chat.completions.create(**asked(bundle, messages=messages, max_tokens=20))
    assert done.usage.prompt_tokens == wanted.usage.prompt_tokens == len(text)
    assert done.choices[0].message.content == wanted.choices[0].text
    # What the client itself makes of an answer may be sent back
    answer = client.chat.completions.create(**asked(bundle, tools=TOOLS, tool_choice=WEATHER)).choices[0].message
    city = json.loads(answer.tool_calls[0].function.arguments)["city"]
    messages[1] = answer.model_dump()
    messages[1]["tool_calls"][0]["function"]["parsed_arguments"] = {"city": city}  # of the client's `parse`
    done = client.chat.completions.create(**asked(bundle, messages=messages, max_tokens=1))
    assert done.usage.prompt_tokens == len(text.replace("Rome", city))
    messages[1]["tool_calls"][0]["function"]["arguments"] = ""  # of a tool without parameters, by some clients
    assert client.chat.completions.create(**asked(bundle, messages=messages, max_tokens=1)).usage.prompt_tokens


# ── errors ─────────────────────────────────────────────────────────────────────────────────────────────────────


def schema(value: Any, **fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": value, **fields}}}


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


def with_call(arguments: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": "assistant", "tool_calls": [call]}]}


LARGE = {"properties": {f"p{n}": {"const": "x" * 100} for n in range(3000)}}
DEEP: dict[str, Any] = {}
for _ in range(300):
    DEEP = {"properties": {"a": DEEP}}
SLOW = schema({"type": "integer", "multipleOf": 62615533})  # a second until it is given up

WRONG = [
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "s"}}}, "response_format"),
    ({"response_format": {"type": "json_object", "x": 1}}, "response_format"),
    (schema({}, name="a b"), "response_format"),
    (schema([]), "response_format"),
    (schema({"type": "nothing"}), "response_format"),
    (schema({"not": {}}), "response_format"),
    (SLOW, "response_format"),
    (schema({"const": "\ud800"}), "response_format"),
    (schema(LARGE), "response_format"),
    (schema({"$ref": "#/nowhere"}), "response_format"),
    ({"tools": TOOLS, **schema(CITY)}, "response_format"),
    ({"tools": "f"}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [*TOOLS, WEATHER]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(129)]}, "tools"),
    (function(parameters={"not": {}}), "tools"),
    (function(parameters={"type": "nothing"}), "tools"),
    (function(parameters={"type": "string"}), "tools"),
    (function(parameters={"type": ["object", "null"]}), "tools"),
    (function(parameters='{"type": "object"}'), "tools"),
    (function(parameters=[]), "tools"),
    (function(parameters=True), "tools"),
    (function(description="\ud800"), "tools"),
    ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"tool_choice": WEATHER}, "tool_choice"),
    (with_call("{"), "messages"),
    (with_call("[1]"), "messages"),
    (with_call("[" * 10**5), "messages"),
    (with_call(None), "messages"),
]


def test_the_place_of_what_is_wrong_in_a_schema_is_a_path_in_the_body(served: Served) -> None:
    for body, place in (
        (schema(False), "response_format.json_schema.schema: "),
        ({"response_format": {"type": "json_object", "x": 1}}, "'response_format.x'"),
    ):
        answer = served.http.post(CHAT, json={"messages": HI, **body})
        assert place in answer.json()["error"]["message"]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=[f"{i}-{case[1]}" for i, case in enumerate(WRONG)])
def test_a_wrong_one_is_named(served: Served, body: dict[str, Any], param: str) -> None:
    """Also where a stream is asked for: none has begun."""
    for streams in (False, True) if body is not SLOW else (True,):
        content = json.dumps({"messages": HI, "max_tokens": 4, "stream": streams, **body}).encode()
        answer = served.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        check_error(answer, 400, param)
    served.await_rows(0)


@pytest.mark.parametrize(
    ("body", "param"),
    [(schema(CITY), "response_format"), ({"tools": TOOLS, "tool_choice": "required"}, "tools")],
    ids=["response_format", "tools"],
)
def test_what_leads_beyond_a_limit_is_named(
    served: Served, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], param: str
) -> None:
    """Which shows while the row runs."""

    def refuses(*_: Any) -> None:
        raise InputError("The limit is reached.", note="It is a test.", hint="None.")

    monkeypatch.setattr(GrammarConstraint, "accept", refuses)
    check_error(served.http.post(CHAT, json={"messages": HI, **body}), 400, param)
    streamed = served.http.post(CHAT, json={"messages": HI, "stream": True, **body})
    last = [line for line in streamed.text.splitlines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["param"] == param
    served.await_rows(0)


def test_as_many_tools_are_described_as_are_taken(served: Served) -> None:
    described = served.http.get("/openapi.json").json()["components"]["schemas"]["ChatRequest"]["properties"]["tools"]
    (most,) = (one["maxItems"] for one in described["anyOf"] if "maxItems" in one)
    tools = [{"type": "function", "function": {"name": f"f{n}"}} for n in range(most)]
    body = {"messages": HI, "max_tokens": 1, "tools": tools, "tool_choice": "none"}
    assert served.http.post(CHAT, json=body).status_code == 200


def test_completions_have_no_tools(served: Served) -> None:
    check_error(served.http.post(COMPLETIONS, json={"prompt": "Hi", "tools": TOOLS}), 400, "tools")


def test_deep_schemas_are_followed_or_refused(served: Served) -> None:
    answer = served.http.post(CHAT, json={"messages": HI, "max_tokens": 4, **schema(DEEP)})
    assert answer.status_code in (200, 400), answer.text


def test_a_template_without_tools(tmp_path: Path) -> None:
    bundle = word_bundle(tmp_path / "b")
    batch = Batch.open(bundle.root, slots=1, threads=1)
    with serving(batch, TextCodec.open(bundle.root / "tokenizer")) as served:
        body = {"messages": [{"role": "user", "content": "t1"}], "max_tokens": 4}
        check_error(served.http.post(CHAT, json={**body, "tools": TOOLS}), 400, "tools")
        # There is no end token, either, which a text that may end needs
        check_error(served.http.post(CHAT, json={**body, **schema(CITY)}), 400, "response_format")
        assert served.http.post(CHAT, json=body).status_code == 200


def test_without_llguidance(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    batch = Batch.open(bundle.root, slots=1, threads=1)
    with serving(batch, TextCodec.open(bundle.root / "tokenizer")) as served:
        body = {"messages": HI, "max_tokens": 4}
        error = check_error(served.http.post(CHAT, json={**body, **schema(CITY)}), 400, "response_format")
        assert "llguidance cannot be imported" in error["message"]
        check_error(served.http.post(CHAT, json={**body, "tools": TOOLS}), 400, "tools")
        assert served.http.post(CHAT, json=body).status_code == 200


def test_a_schema_that_cannot_be_compiled_now_can_be_sent_again(
    served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the machine lacks for the process that compiles it is no error of the request, and none of the server's."""
    tool = {"type": "function", "function": {"name": "never_compiled"}}
    bodies = [{**schema({"const": "now"}), "max_tokens": 9}, {"tools": [tool], "tool_choice": "required"}]
    with monkeypatch.context() as patch:
        patch.setattr("lora_drop_runtime.grammars.trial.subprocess.run", _no_file_descriptors)
        for body in bodies:
            answer = served.http.post(CHAT, json={"messages": HI, **body})
            error = check_error(answer, 503, None)
            assert (error["code"], answer.headers["retry-after"]) == ("unavailable", "5")
            assert "cannot be compiled now" in error["message"]
            assert "Too many open files" in error["message"]
    assert "Traceback" not in capfd.readouterr().err
    assert served.http.post(CHAT, json={"messages": HI, **bodies[0]}).status_code == 200
    served.await_rows(0)


def _no_file_descriptors(*_: object, **__: object) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_what_is_compiled_counts_as_waiting(served: Served) -> None:
    """Eight places; who hangs up while a schema is compiled gives the place back."""

    async def all_of_them() -> list[int]:
        async with httpx.AsyncClient(base_url=served.address, timeout=None) as http:
            bodies = [{"messages": HI, "max_tokens": 60, **schema({**CITY, "title": f"s{n}"})} for n in range(20)]
            tasks = [asyncio.create_task(http.post(CHAT, json=body)) for body in bodies]
            answers = await asyncio.gather(*tasks)
            left = [asyncio.create_task(http.post(CHAT, json={**bodies[0], **schema({"title": str(n)})})) for n in "ab"]
            while served.driver.open_rows < 2:
                await asyncio.sleep(0.005)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            return [answer.status_code for answer in answers]

    codes = asyncio.run(all_of_them())
    assert set(codes) <= {200, 429}
    assert codes.count(200) >= 8
    await_that(lambda: served.driver.open_rows == 0)
    served.await_rows(0)


@pytest.mark.parametrize("streams", [False, True])
def test_who_hangs_up_leaves_the_compilers_to_others(
    served: Served, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    """Places are free at once, what has not begun is never compiled, and prompts are read meanwhile."""
    release, begun = threading.Event(), list[Any]()

    def stuck(_: Grammars, schema: Any) -> None:
        begun.append(schema)
        release.wait()
        raise InputError("No.", note="It is a test.", hint="None.")

    monkeypatch.setattr(Grammars, "json_schema", stuck)

    async def hang_up() -> None:
        async with httpx.AsyncClient(base_url=served.address, timeout=None) as http:
            body = {"messages": HI, "stream": streams, **schema({})}
            tasks = [asyncio.create_task(http.post(CHAT, json=body)) for _ in range(6)]
            while served.driver.open_rows < 6 or len(begun) < MOST_COMPILING:
                await asyncio.sleep(0.005)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    try:
        asyncio.run(hang_up())
        await_that(lambda: served.driver.open_rows == 0)
        assert served.http.post(CHAT, json={"messages": HI, "max_tokens": 2}).status_code == 200
        assert len(begun) == MOST_COMPILING
    finally:
        release.set()
    assert served.http.post(CHAT, json={"messages": HI, **schema({})}).status_code == 400
    assert len(begun) == MOST_COMPILING + 1


@pytest.mark.parametrize("streams", [False, True])
def test_what_is_compiled_at_the_end_is_cut_at_once(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    """What has not begun to be compiled, too."""
    release = threading.Event()
    monkeypatch.setattr(Grammars, "json_schema", lambda *_: release.wait())
    batch = Batch.open(bundle.root, slots=4, threads=1)
    with serving(batch, TextCodec.open(bundle.root / "tokenizer")) as served, ThreadPoolExecutor(4) as pool:
        try:
            body = {"messages": HI, "stream": streams, **schema({})}
            asked = [pool.submit(served.http.post, CHAT, json=body) for _ in range(4)]
            await_that(lambda: served.driver.open_rows == 4)
            drained = asyncio.run_coroutine_threadsafe(served.driver.drain(0), served.driver._loop)
            assert drained.result() == 4
            for answer in asked:
                found = answer.result(30)
                assert (found.status_code, found.json()["error"]["code"]) == (503, "closing")
        finally:
            release.set()
