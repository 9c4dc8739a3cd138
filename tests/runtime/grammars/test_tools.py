"""Tools: what may be written under each choice, the calls that are found in a text, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from lora_drop_runtime import SamplingOptions, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.constraint import Constraint
from lora_drop_runtime.grammars.grammar import Grammars
from lora_drop_runtime.grammars.tools import MOST_TOOLS, ToolCall, Tools
from lora_drop_runtime.text import TextCodec

from tests.support.bundles import make_bundle
from tests.support.decoding import assert_refused
from tests.support.tokenizers import byte_tokenizer

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% if tools %}<tool_call>name, arguments</tool_call>{% endif %}"
    "{% for message in messages %}{{ message.content }}{% endfor %}"
)
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "</tool_call>"]}, "days": {"$ref": "#/$defs/few"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"few": {"type": "integer", "minimum": 1, "maximum": 9}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'


@pytest.fixture(scope="module", params=["text", "tokens"])
def grammars(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    """Of tokenizers without and with tokens for the marks that a call stands between."""
    bundle = make_bundle("llama", tmp_path_factory.mktemp("tools") / "b", drop_ratio=0.5)
    byte_tokenizer(bundle.root, merged=True, calls=request.param == "tokens")
    return Grammars.of(Bundle.open(bundle.root))


def accepts(grammars: Grammars, constraint: Constraint, text: str) -> bool:
    """Whether a text may be written; the constraint has moved on behind it."""
    for token in grammars.tokenizer.tokenize_str(text, parse_special=True):
        if not constraint.allowed()[token]:
            return False
        constraint.accept(token)
    return True


def constraint_of(grammars: Grammars, choice: object, parallel: bool = True) -> Constraint:
    constraint = Tools(TOOLS, choice, parallel=parallel).constraint(grammars, TEMPLATE)
    assert constraint is not None
    return constraint


def may_end(grammars: Grammars, constraint: Constraint) -> bool:
    return constraint.is_over or bool(constraint.allowed()[grammars.tokenizer.eos_token])


WRONG = [
    CALL.replace("Rome", "Oslo"),
    CALL.replace("3", "10"),
    CALL.replace("weather", "nothing"),
    CALL.replace('"city": "Rome", ', ""),
    CALL.replace("}}", "}"),
]


def test_auto_is_free_until_a_call_begins(grammars: Grammars) -> None:
    for text in ("Hello {", "a <tool", "<tool_cal <tool_call", "x" * 50):
        constraint = constraint_of(grammars, "auto")
        assert accepts(grammars, constraint, text)
        assert constraint.allowed().all()
        before = constraint.fork()
        assert accepts(grammars, constraint, f" {CALL}")
        assert constraint.allowed().all()
        assert accepts(grammars, constraint, f" and {CALL}.")
        for wrong in WRONG:
            assert not accepts(grammars, before.fork(), wrong), wrong
        assert accepts(grammars, before, CALL)


def test_a_token_that_goes_beyond_the_mark_begins_a_call_or_is_text(grammars: Grammars) -> None:
    """`{"` is one token of the tokenizer, and no call goes on with it; a line's end is one of a call."""
    if grammars.token("<tool_call>") is not None:
        return
    constraint = constraint_of(grammars, "auto")
    assert accepts(grammars, constraint, "<tool_call>")
    assert np.flatnonzero(constraint.allowed()).tolist() == grammars.tokenizer.tokenize_str("\n")


@pytest.mark.parametrize(("choice", "parallel"), [("required", True), ("required", False), (NOW, True)])
def test_other_choices_write_calls_alone(grammars: Grammars, choice: object, parallel: bool) -> None:
    call = CALL if choice == "required" else '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    several = choice == "required" and parallel
    constraint = constraint_of(grammars, choice, parallel)
    assert not may_end(grammars, constraint)
    assert accepts(grammars, constraint, call)
    assert may_end(grammars, constraint)
    assert constraint.is_over != several
    assert not several or accepts(grammars, constraint, f"\n{call}")
    for wrong in ("Hello", f" {call}", *WRONG, *([CALL] if choice is NOW else [])):
        assert not accepts(grammars, constraint_of(grammars, choice, parallel), wrong), wrong


def test_a_single_call_ends_the_text(grammars: Grammars) -> None:
    constraint = constraint_of(grammars, "auto", parallel=False)
    assert accepts(grammars, constraint, f"I call {CALL}")
    assert constraint.is_over


@pytest.mark.parametrize(
    ("bundle", "choice", "policy"),
    [
        ("characters", "auto", "skip"),
        ("characters", "required", "lossless"),
        ("characters", NOW, "skip"),
        ("merges", "auto", "lossless"),
        ("merges", "required", "skip"),
        ("merges", NOW, "lossless"),
    ],
    indirect=["bundle"],
)
def test_a_model_writes_calls_that_are_valid(bundle: Bundle, policy: str, choice: object) -> None:
    """Under `auto` this model calls nothing by itself, so its prompt has the mark as its last token but one."""
    tools, grammars, codec = Tools(TOOLS, choice), Grammars.of(bundle), TextCodec.open(bundle.root / "tokenizer")
    called = 0
    with Session.open(bundle.root, k=2, policy=policy, threads=1) as session:
        for seed in range(4):
            constraint, begin = tools.constraint(grammars, TEMPLATE), ""
            assert constraint is not None
            if choice == "auto":
                begin = "Well <tool_call>"
                assert accepts(grammars, constraint, begin)
            options = {"sampling": SamplingOptions(1.0, seed=seed), "constraint": constraint}
            for row in session.generate([codec.encode("A")] * 2, 150, **options):
                text, calls = tools.calls(begin + codec.decode(row))
                for call in calls:
                    schema = WEATHER if call.name == "weather" else {"const": {}}
                    jsonschema.validate(json.loads(call.arguments), schema)
                called += len(calls)
                assert choice == "auto" or calls
                assert choice == "auto" or "<tool_call>" in text or not text
    assert called >= 8


def test_calls_are_found_in_a_text() -> None:
    tools = Tools(TOOLS)
    call = ToolCall("weather", '{"city": "</tool_call>"}')
    one = '<tool_call>\n{"name": "weather", "arguments": {"city": "</tool_call>"}}\n</tool_call>'
    other = '<tool_call>\n{"name": "now", "arguments": {"n": 1e999}}\n</tool_call>'
    assert tools.calls("No call, a <tool_call> and {.") == ("No call, a <tool_call> and {.", [])
    assert tools.calls(one) == ("", [call])
    assert tools.calls(f"I ask.\n{one}\n{other} Done.") == ("I ask.\n\n Done.", [call, ToolCall("now", '{"n": 1e999}')])
    for broken in (
        one[:-1],  # not at its end
        one.replace("weather", "nothing"),
        one.replace('": {', '": '),
        one.replace('"}}', '"'),
        one.replace("</tool_call>", "x" * 50),
        '<tool_call>\n["now"]\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": ' + "[" * 100_000,
    ):
        assert tools.calls(broken) == (broken, [])
        assert tools.calls(f"{one}{broken}") == (broken, [call])
    assert Tools(TOOLS, "none").calls(one) == (one, [])


def test_no_call_is_no_constraint(grammars: Grammars) -> None:
    tools = Tools(TOOLS, "none")
    assert tools.constraint(grammars, None) is None
    assert tools.for_template is None
    assert Tools(TOOLS).for_template == TOOLS


def test_tools_that_cannot_be_served_are_refused(grammars: Grammars) -> None:
    function = {"name": "now", "parameters": {"not": {}}}
    many = [{"type": "function", "function": {"name": f"f{n}"}} for n in range(MOST_TOOLS + 1)]
    for tools, fact in (
        ("now", "has the wrong type"),
        ([], "number of tools"),
        (many, "number of tools"),
        ([3], "A tool is none"),
        ([{"type": "function", "function": {"name": "a b"}}], "A tool is none"),
        ([*TOOLS, NOW], "Two tools have one name"),
    ):
        assert_refused(lambda tools=tools: Tools(tools), fact)
    for choice in ("some", {"type": "function", "function": {"name": "other"}}, None, {}, ["auto"]):
        assert_refused(lambda choice=choice: Tools(TOOLS, choice), "choice of a tool", "weather, now")
    unsupported = Tools([{"type": "function", "function": function}])
    assert_refused(lambda: unsupported.constraint(grammars, TEMPLATE), "cannot be followed", "not")
    others = ("<tool_call><function=now>", "<tool_call>now<arg_key>", '<tool_calls>[{"name": "now"}]</tool_calls>')
    for template in (None, "{{ messages }}", *(TEMPLATE + other for other in others)):
        assert_refused(lambda template=template: Tools(TOOLS).constraint(grammars, template), "of a known style")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "Hello <tool",
        CALL,
        f"\n Let me look. \n{CALL}",
        f"Look: {CALL}\n and{CALL}. \n",
        f"{CALL[:-3]}",
        f"So <tool_call>no</tool_call> {CALL}",
        f"<tool_call{CALL}",
    ],
)
def test_a_stream_tells_what_the_whole_text_says(text: str) -> None:
    tools = Tools(TOOLS)
    for width in (1, 2, 7, 30, 1000):
        stream = tools.stream()
        told = [stream.push(text[i : i + width]) for i in range(0, len(text), width)]
        told.append(stream.finish())
        content = "".join(content for content, _ in told)
        assert (content, [call for _, calls in told for call in calls]) == tools.calls(text)
        assert told[-1][1] == []  # each is told as it ends
        before = "".join(content for content, _ in told[:-1])
        assert before == text.partition("<tool_call>")[0].removesuffix("<tool").rstrip()
