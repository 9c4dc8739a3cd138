"""`/v1/responses`: what it says is what a chat says of the same, in the items and events of OpenAI's client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jsonschema
import openai
import pytest
from lora_drop_runtime import Batch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.grammars.calls import ToolCall
from lora_drop_runtime.plan.schedule import StepKind
from lora_drop_runtime.text import TextCodec
from lora_drop_serve.answers import ChatAnswer, Piece
from lora_drop_serve.app import _events
from lora_drop_serve.errors import ApiError
from lora_drop_serve.response_answers import ResponseAnswer
from lora_drop_serve.response_requests import ResponseRequest

from tests.support.serving import Served, serving

from .test_constraints import CITY, FORMAT, HI, TOOLS, WEATHER, City, calling_bundle, said
from .test_errors import RESPONSES, check_alive, check_error

FLAT: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
NAMED: Any = {"type": "function", "name": "weather"}
ALLOWED: Any = {"type": "allowed_tools", "mode": "required", "tools": [NAMED]}
CHOICES: Any = {  # as the chat's API has them
    id(NAMED): WEATHER,
    id(ALLOWED): {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WEATHER]}},
}
SCHEMA: Any = {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}
LOGPROBS: Any = ["message.output_text.logprobs"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return calling_bundle(tmp_path_factory.mktemp("responses") / "b")


@pytest.fixture(scope="module")
def served(bundle: Bundle) -> Iterator[Served]:
    batch = Batch.open(bundle.root, slots=4, policy="backfill", threads=1)
    with serving(batch, TextCodec.open(bundle.root / "tokenizer")) as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0, timeout=None) as client:
        yield client


def deep(levels: int) -> list[Any]:
    found = list[Any]()
    for _ in range(levels):
        found = [found]
    return found


def asked(bundle: Bundle, tokens: int = 180, seed: int = 3, **fields: Any) -> dict[str, Any]:
    extra = {"seed": seed, **fields.pop("extra_body", {})}
    given = {"model": bundle.manifest.model.name, "input": "Hi", "max_output_tokens": tokens, "extra_body": extra}
    return {**given, **fields}


def in_chat(client: openai.OpenAI, bundle: Bundle, tokens: int = 180, seed: int = 3, **fields: Any) -> Any:
    """The same as a chat's choice, and its usage."""
    given = {"model": bundle.manifest.model.name, "messages": HI, "max_tokens": tokens, "seed": seed}
    done = client.chat.completions.create(**given, **fields)
    return done.choices[0], done.usage


def summed(response: Any) -> dict[str, Any]:
    """A response in the form of `said`."""
    calls = [
        {"name": item.name, "arguments": item.arguments} for item in response.output if item.type == "function_call"
    ]
    finish = "length" if response.status == "incomplete" else "tool_calls" if calls else "stop"
    return {"content": response.output_text or None, "calls": calls, "finish": finish}


def without_ids(output: Any) -> list[dict[str, Any]]:
    items = [item if isinstance(item, dict) else item.to_dict() for item in output]
    added = "id", "call_id", "parsed_arguments"  # the last by the client
    return [{name: value for name, value in item.items() if name not in added} for item in items]


def gathered(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that events tell of, from their beginnings and deltas alone; each event is checked against them."""
    items, is_done = list[dict[str, Any]](), list[bool]()
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events[2:-1]:
        kind, place = event["type"].removeprefix("response."), event["output_index"]
        if kind == "output_item.added":
            assert place == len(items)
            assert all(is_done)  # one at a time
            items.append(json.loads(json.dumps(event["item"])))
            is_done.append(False)
            continue
        assert place == len(items) - 1
        item = items[place]
        assert event.get("item_id", item["id"]) == item["id"]
        if kind == "content_part.added":
            item["content"].append(json.loads(json.dumps(event["part"])))
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == item["arguments"]
        elif kind.endswith(".delta"):
            (part,) = item["content"]
            assert kind == f"{part['type']}.delta"
            part["text"] += event["delta"]
            if "logprobs" in event:
                part["logprobs"] += event["logprobs"]
        elif kind == "content_part.done":
            assert event["part"] == item["content"][0]
        elif kind == "output_item.done":
            item["status"] = event["item"]["status"]
            assert event["item"] == item
            is_done[place] = True
        else:
            assert kind == f"{item['content'][0]['type']}.done"
            assert event["text"] == item["content"][0]["text"]
    assert all(is_done)
    first, second, last = events[0], events[1], events[-1]
    assert [first["type"], second["type"]] == ["response.created", "response.in_progress"]
    assert first["response"]["status"] == second["response"]["status"] == "in_progress"
    assert first["response"]["output"] == []
    assert first["response"]["id"] == last["response"]["id"]
    assert last["type"] == f"response.{last['response']['status']}"
    assert last["response"]["output"] == items
    return items


def streamed(client: openai.OpenAI, fields: dict[str, Any]) -> list[dict[str, Any]]:
    with client.responses.with_streaming_response.create(**fields, stream=True) as answer:
        lines = [line for line in answer.iter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines[::2]]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert names == [event["type"] for event in events]
    return events


# ── answers ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tokens", [180, 5])
def test_a_text_is_that_of_a_chat(client: openai.OpenAI, bundle: Bundle, tokens: int) -> None:
    for fields in ({"temperature": 0}, {"top_p": 0.9}):
        response = client.responses.create(**asked(bundle, tokens, **fields))
        choice, usage = in_chat(client, bundle, tokens, **fields)
        assert summed(response) == said(choice)
        assert (response.incomplete_details is None) == (choice.finish_reason != "length")
        counted = response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens
        assert counted == (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
        assert response.usage.lora_drop == usage.lora_drop
        events = streamed(client, asked(bundle, tokens, **fields))
        assert without_ids(gathered(events)) == without_ids(response.output)
        steps = [event["lora_drop"]["step"] for event in events if event["type"] == "response.output_text.delta"]
        assert set(steps) == {"refresh", "lora"}


def test_the_clients_own_stream_ends_in_the_answer(client: openai.OpenAI, bundle: Bundle) -> None:
    with client.responses.stream(**asked(bundle, tools=FLAT, tool_choice=NAMED)) as stream:
        types = [event.type for event in stream]
        final = stream.get_final_response()
    assert types[-1] == "response.completed"
    whole = client.responses.create(**asked(bundle, tools=FLAT, tool_choice=NAMED))
    assert without_ids(final.output) == without_ids(whole.output)


def test_logprobs_are_those_of_a_chat(client: openai.OpenAI, bundle: Bundle) -> None:
    fields = asked(bundle, 20, include=LOGPROBS, top_logprobs=2)
    choice, _ = in_chat(client, bundle, 20, logprobs=True, top_logprobs=2)
    wanted = [token.model_dump() for token in choice.logprobs.content]
    (message,) = client.responses.create(**fields).output
    assert [token.model_dump() for token in message.content[0].logprobs] == wanted
    (item,) = gathered(streamed(client, fields))
    assert item["content"][0]["logprobs"] == wanted


def test_what_it_says_of_its_request(client: openai.OpenAI, bundle: Bundle) -> None:
    given: dict[str, Any] = {
        "instructions": "Be brief.", "metadata": {"a": "b"}, "parallel_tool_calls": False, "temperature": 0.5,
        "tools": FLAT, "tool_choice": NAMED, "top_p": 0.8, "max_output_tokens": 7, "text": {"format": {"type": "text"}},
    }  # fmt: skip
    response = client.responses.create(**asked(bundle, **given))
    found = json.loads(response.to_json())
    assert {name: found[name] for name in given if name != "tools"} == {n: v for n, v in given.items() if n != "tools"}
    assert [tool["parameters"] for tool in found["tools"]] == [CITY, None]
    assert (found["store"], found["previous_response_id"]) == (False, None)
    fields = asked(bundle, 1, tools=FLAT, tool_choice=ALLOWED)
    assert client.responses.create(**fields).to_dict()["tool_choice"] == ALLOWED


def test_it_says_schemas_that_are_nested_deep(served: Served) -> None:
    """Of tools that are not called no template writes them."""
    tool = {**FLAT[0], "parameters": {"default": deep(300)}}
    fields = {"input": "Hi", "max_output_tokens": 1, "tools": [tool], "tool_choice": "none"}
    assert served.http.post(RESPONSES, json=fields).json()["tools"] == [{"strict": True, **tool}]
    events = served.http.post(RESPONSES, json={**fields, "stream": True}).text
    assert events.count(json.dumps(tool["parameters"], separators=(",", ":"))) == 3


def test_schemas_are_followed(client: openai.OpenAI, bundle: Bundle) -> None:
    choice, _ = in_chat(client, bundle, response_format=FORMAT)
    response = client.responses.create(**asked(bundle, text={"format": SCHEMA}))
    jsonschema.validate(json.loads(response.output_text), CITY)
    assert summed(response) == said(choice)
    assert isinstance(client.responses.parse(**asked(bundle, text_format=City)).output_parsed, City)
    cut = client.responses.create(**asked(bundle, 9, text={"format": SCHEMA}))
    assert (cut.output_text, cut.status) == ('{"city": ', "incomplete")
    anything = client.responses.create(**asked(bundle, 9, text={"format": {"type": "json_object"}}))
    assert anything.output_text.startswith("{")


@pytest.mark.parametrize("choice", ["auto", "required", "none", NAMED, ALLOWED], ids=str)
def test_calls_are_those_of_a_chat(client: openai.OpenAI, bundle: Bundle, choice: Any) -> None:
    with_calls = 0
    for seed in range(3, 11):
        shared: dict[str, Any] = {"seed": seed, "parallel_tool_calls": seed % 2 == 1}
        fields = asked(bundle, tools=FLAT, tool_choice=choice, **shared)
        response = client.responses.create(**fields)
        wanted, _ = in_chat(client, bundle, tools=TOOLS, tool_choice=CHOICES.get(id(choice), choice), **shared)
        found = said(wanted)
        assert choice is not ALLOWED or {call["name"] for call in found["calls"]} <= {"weather"}
        assert summed(response) | {"finish": None} == found | {"finish": None}
        assert without_ids(gathered(streamed(client, fields))) == without_ids(response.output)
        with_calls += bool(found["calls"])
    assert with_calls == {"auto": with_calls or None, "none": 0}.get(str(choice), with_calls or None)


def test_reasoning_text_and_calls_are_items(bundle: Bundle) -> None:
    """Of an answer that has all of them, which a model with random weights does not write."""
    codec = TextCodec.open(bundle.root / "tokenizer")
    token = SimpleNamespace(kind=StepKind.LORA)
    pieces: list[Any] = [
        Piece("", token, None, reasoning="I "),
        Piece("", token, None, reasoning="think"),
        Piece("So", token, None, reasoning="."),
        Piece(" be it", token, None),
        Piece("", None, None, [ToolCall("now", "{}"), ToolCall("weather", '{"city": "Rome"}')]),
        Piece("cut", token, "length"),
    ]
    options: dict[str, Any] = {"logprobs": False, "includes_usage": False, "includes_usage_so_far": False}
    body = ResponseRequest(input="Hi")
    answer = ResponseAnswer(codec, "m", 2, 1, [], told=body.told, verifies=False, **options)
    counts = {"tokens": 0, "reasoned": 0, "reused": None, "steps": dict.fromkeys(StepKind, 0)}
    answer.choices = [SimpleNamespace(take=lambda piece: piece, finish="length", **counts)]
    events = [*answer.first_chunks()]
    for piece in pieces:
        told: Any = SimpleNamespace(row=0, event=piece)
        events += json.loads(json.dumps(answer.chunks(told)))  # as they are at that time
    items = gathered([*events, *answer.last_chunks()])
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call", "function_call", "message"]
    assert [item["status"] for item in items] == [*["completed"] * 4, "incomplete"]
    reasoning, message, first, second, cut = items
    assert [item["content"][0]["text"] for item in (reasoning, message, cut)] == ["I think.", "So be it", "cut"]
    assert [(call["name"], call["arguments"]) for call in (first, second)] == [
        ("now", "{}"),
        ("weather", '{"city": "Rome"}'),
    ]
    assert first["call_id"] != second["call_id"]
    (failed,) = answer.failed(ApiError(500, "It is lost."))
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"] == {"code": "server_error", "message": "It is lost."}


@pytest.mark.parametrize("kind", [ResponseAnswer, ChatAnswer])
def test_what_came_before_a_stream_breaks_off_is_told(bundle: Bundle, kind: Any) -> None:
    """Though it came together with what breaks it off."""
    pieces = [Piece(text, SimpleNamespace(kind=StepKind.LORA), None) for text in ("So", " be")]  # type: ignore[arg-type]

    def take(piece: Piece | None) -> Piece:
        if piece is None:
            raise ApiError(500, "It is lost.")
        return piece

    async def told() -> list[Any]:
        return [SimpleNamespace(row=0, event=piece) for piece in (*pieces, None)]

    async def parts() -> bytes:
        return b"".join([part async for part in _events(answer, job, record)])

    options: dict[str, Any] = {"logprobs": False, "includes_usage": False, "includes_usage_so_far": False}
    if kind is ResponseAnswer:
        options["told"] = ResponseRequest(input="Hi").told
    answer = kind(TextCodec.open(bundle.root / "tokenizer"), "m", 2, 1, [], verifies=False, **options)
    answer.choices = [SimpleNamespace(take=take, finish=None, is_over=False)]
    failures = list[Any]()
    job: Any = SimpleNamespace(told=told)
    record: Any = SimpleNamespace(fails=failures.append)
    lines = asyncio.run(parts()).decode().splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [failure["error"]["message"] for failure in failures] == ["It is lost."]
    if kind is ChatAnswer:
        *chunks, last = events
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "So be"
        assert last == failures[0]
        return
    (item,) = gathered(events)
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "So be")


def test_an_answer_without_any_text_has_an_empty_message(client: openai.OpenAI, bundle: Bundle) -> None:
    end = bundle.manifest.special_tokens.eos[0]
    fields = asked(bundle, extra_body={"logit_bias": {str(end): 100}})
    response = client.responses.create(**fields)
    assert (response.output_text, response.status, len(response.output)) == ("", "completed", 1)
    assert without_ids(gathered(streamed(client, fields))) == without_ids(response.output)


# ── requests ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_conversation_goes_to_the_template(client: openai.OpenAI, bundle: Bundle) -> None:
    items: list[Any] = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "H"}, {"type": "input_text", "text": "i"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call", "call_id": "2", "name": "weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "1", "output": "Rain"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "Snow"}]},
        {"type": "function_call", "call_id": "3", "name": "weather", "arguments": "{}"},
    ]
    text = (
        "system:Be brief.|system:Be kind.|user:Hi|assistant:Let me see. weather(Rome) weather(Oslo)|"
        "tool:Rain|tool:Snow|assistant: weather()|"
    )
    wanted = client.completions.create(
        model=bundle.manifest.model.name, prompt=text, max_tokens=20, seed=3, temperature=1
    )
    response = client.responses.create(**asked(bundle, 20, input=items, instructions="Be brief."))
    assert response.usage.input_tokens == wanted.usage.prompt_tokens == len(text)
    assert response.output_text == wanted.choices[0].text


def test_messages_of_a_template() -> None:
    """Reasoning goes with the turn of the assistant that it stands before, and text behind calls with theirs."""
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": ""}
    made = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    for items, wanted in (
        ([thought, call], [{"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [made]}]),
        (
            [{"role": "assistant", "content": "A"}, thought, call],
            [
                {"role": "assistant", "content": "A", "tool_calls": None},
                {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [made]},
            ],
        ),
        (
            [{"role": "assistant", "content": "A"}, call, {"role": "assistant", "content": " B"}],
            [{"role": "assistant", "content": "A B", "tool_calls": [made]}],
        ),
        ([thought, {"role": "user", "content": "A"}], [{"role": "user", "content": "A", "tool_calls": None}]),
    ):
        assert ResponseRequest(input=items).for_template == wanted  # type: ignore[arg-type]


def test_tools_go_to_the_template_as_those_of_a_chat_do() -> None:
    tool = {**FLAT[0], "strict": False}
    of_chats = {"type": "function", "function": {**TOOLS[0]["function"], "strict": False}}
    found = ResponseRequest(input="Hi", tools=[tool, FLAT[1]]).called_tools  # type: ignore[list-item]
    assert found == [of_chats, TOOLS[1]]


def test_an_answer_may_be_sent_back(client: openai.OpenAI, bundle: Bundle) -> None:
    fields = asked(bundle, tools=FLAT, tool_choice=NAMED)
    response = client.responses.create(**fields)
    (call,) = response.output
    items = [*HI, *response.output, {"type": "function_call_output", "call_id": call.call_id, "output": "Rain"}]
    after = client.responses.create(**asked(bundle, 1, input=items))
    city = json.loads(call.arguments)["city"]
    assert after.usage.input_tokens == len(f"user:Hi|assistant: weather({city})|tool:Rain|")


CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
WRONG = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": ["Hi"]}, "input"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
    ({"input": [{"role": "user"}]}, "input"),
    ({"input": [{"role": 1, "content": "Hi"}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
    ({"input": [{"role": "user", "content": ["Hi"]}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": ["input_text"], "text": "Hi"}]}]}, "input"),
    ({"input": [{"role": "user", "content": "\ud800"}]}, "input"),
    ({"input": [{**CALL, "arguments": "{"}]}, "input"),
    ({"input": [{**CALL, "arguments": "[1]"}]}, "input"),
    ({"input": [{**CALL, "arguments": "[" * 10**5}]}, "input"),
    ({"input": [{**CALL, "name": ""}]}, "input"),
    ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input"),
    ({"input": [{"role": "user", "content": "Hi"}] * 4097}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "H"}] * 4097}]}, "input"),
    ({"input": "Hi" * 200}, "input"),
    ({"input": ""}, None),
    ({"instructions": 1}, "instructions"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"store": True}, "store"),
    ({"truncation": "auto"}, "truncation"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 10**6}, "max_output_tokens"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"n": 2}, "n"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"reasoning": {"effort": "high"}}, "reasoning"),
    ({"reasoning": {"effort": "huge"}}, "reasoning"),
    ({"text": {"format": {"type": "xml"}}}, "text"),
    ({"text": {"format": {**SCHEMA, "description": "\ud800"}}}, "text"),
    ({"text": {"format": {**SCHEMA, "schema": {"default": deep(300)}}}}, "text"),
    ({"tools": [{**FLAT[0], "parameters": {"default": deep(300)}}]}, "tools"),
    ({"metadata": {"\ud800": "a"}}, "metadata"),
    ({"text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": "nothing"}}}}, "text"),
    ({"text": {"format": SCHEMA}, "tools": FLAT}, "text"),
    ({"text": {"format": SCHEMA}, "ignore_eos": True}, "ignore_eos"),
    ({"tools": FLAT, "ignore_eos": True}, "ignore_eos"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tools": [*FLAT, FLAT[0]]}, "tools"),
    ({"tools": [{"type": "function", "name": "f", "parameters": {"not": {}}}]}, "tools"),
    ({"tools": FLAT, "tool_choice": WEATHER}, "tool_choice"),
    ({"tools": FLAT, "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": FLAT, "tool_choice": {**ALLOWED, "tools": [{"type": "function", "name": "f"}]}}, "tool_choice"),
    ({"tools": FLAT, "tool_choice": {**ALLOWED, "tools": []}}, "tool_choice"),
    ({"tools": FLAT, "tool_choice": {**ALLOWED, "tools": [WEATHER]}}, "tool_choice"),
    ({"tools": FLAT, "tool_choice": {**ALLOWED, "mode": "none"}}, "tool_choice"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"model": "other"}, "model"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=range(len(WRONG)))
def test_what_is_refused(served: Served, fields: dict[str, Any], param: str | None) -> None:
    content = json.dumps({"input": "Hi", **fields})
    answer = served.http.post(RESPONSES, content=content, headers={"Content-Type": "application/json"})
    if param is None:  # an empty message, which a template has a place for
        assert answer.status_code == 200
        return
    check_error(answer, 404 if param == "model" else 400, param)


def test_what_is_wrong_with_a_format_is_said_of_its_field(served: Served) -> None:
    """Not of its type, too, which pydantic tells formats apart by."""
    for form, place in (({"type": "json_schema"}, "name"), ({**SCHEMA, "schema": 1}, "schema")):
        answer = served.http.post(RESPONSES, json={"input": "Hi", "text": {"format": form}})
        assert answer.json()["error"]["message"].startswith(f"text.format.{place}: ")


def test_what_changes_nothing_is_taken(served: Served) -> None:
    for name, values in ResponseRequest.changes_nothing.items():
        for value in values or ("anything", {"a": 1}, None):
            answer = served.http.post(RESPONSES, json={"input": "Hi", "max_output_tokens": 1, name: value})
            assert answer.status_code == 200, (name, value)
    check_alive(served)


def test_nothing_is_stored(served: Served) -> None:
    answer = served.http.post(RESPONSES, json={"input": "Hi", "previous_response_id": "resp_1"})
    assert "send the whole conversation" in check_error(answer, 400, "previous_response_id")["message"]
    response = served.http.post(RESPONSES, json={"input": "Hi", "max_output_tokens": 1}).json()
    check_error(served.http.get(f"{RESPONSES}/{response['id']}"), 404)
