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
from lora_drop_runtime.grammars.calls import ToolCall
from lora_drop_runtime.grammars.grammar import Grammars
from lora_drop_runtime.grammars.tools import MOST_TOOLS, Tools
from lora_drop_runtime.reasoning import THINK, Thoughts
from lora_drop_runtime.text import TextCodec

from tests.support.bundles import make_bundle
from tests.support.decoding import assert_refused
from tests.support.tokenizers import END, byte_tokenizer

TEMPLATES = {
    "hermes": "{{ tools }} Return a json object within <tool_call></tool_call> XML tags.",
    "llama": '{{ tools }} Respond in the format {"name": function name, "parameters": dictionary of argument name and '
    "its value}. Do not use variables.",
    "mistral": "[AVAILABLE_TOOLS] [{{ tools }}] and {{ '[TOOL_CALLS] [' }}",
    "nemo": "[AVAILABLE_TOOLS][{{ tools }}] and {{ '[TOOL_CALLS][' }}",
    "ministral": "[AVAILABLE_TOOLS]{{ tools }} and {{ '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}",
}
BEGUN = {
    "hermes": "Well <tool_call>",
    "llama": '{"name": "weather", "parameters": ',
    "nemo": "[TOOL_CALLS]",
    "ministral": "Well [TOOL_CALLS]",
}
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
ROME = '{"city": "Rome", "days": 3}'


def written(style: str, *calls: tuple[str, str]) -> str:
    """Calls as a model of a style writes them: what the templates of such models make of messages with calls."""
    if style == "hermes":
        return "\n".join(
            f'<tool_call>\n{{"name": "{name}", "arguments": {given}}}\n</tool_call>' for name, given in calls
        )
    if style == "llama":
        ((name, given),) = calls
        return f'{{"name": "{name}", "parameters": {given}}}'
    if style == "ministral":
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{given}" for name, given in calls)
    items = ", ".join(f'{{"name": "{name}", "arguments": {given}}}' for name, given in calls)
    return f"[TOOL_CALLS] [{items}]" if style == "mistral" else f"[TOOL_CALLS][{items}]"


def wrong(style: str) -> list[str]:
    call = written(style, ("weather", ROME))
    return [
        call.replace("Rome", "Oslo"),
        call.replace("3", "10"),
        call.replace("weather", "nothing"),
        call.replace('"city": "Rome", ', ""),
        call.replace("3}", "3"),
    ]


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


def constraint_of(grammars: Grammars, style: str, choice: object, parallel: bool = True) -> Constraint:
    calls = Tools(TOOLS, choice, parallel=parallel).calls(TEMPLATES[style])
    assert calls is not None
    return calls.constraint(grammars)


def may_end(grammars: Grammars, constraint: Constraint) -> bool:
    return constraint.is_over or bool(constraint.allowed()[grammars.tokenizer.eos_token])


@pytest.mark.parametrize("style", ["hermes", "ministral"])
def test_auto_is_free_until_a_call_begins(grammars: Grammars, style: str) -> None:
    call = written(style, ("weather", ROME))
    mark = call[:11]
    for text in ("Hello {", f"a {mark[:5]}", f"{mark[:-1]} {mark[:-1]}", "x" * 50):
        constraint = constraint_of(grammars, style, "auto")
        assert accepts(grammars, constraint, text)
        assert constraint.allowed().all()
        before = constraint.fork()
        assert accepts(grammars, constraint, f" {call}")
        assert constraint.allowed().all()
        assert accepts(grammars, constraint, f" and {call}.")
        for other in wrong(style)[: None if style == "hermes" else 4]:
            assert not accepts(grammars, before.fork(), other), other
        assert accepts(grammars, before, call)


@pytest.mark.parametrize("style", ["mistral", "nemo"])
def test_a_list_of_calls_ends_the_text(grammars: Grammars, style: str) -> None:
    both = written(style, ("weather", ROME), ("now", "{}"))
    constraint = constraint_of(grammars, style, "auto")
    assert accepts(grammars, constraint, "I call [TOOL_CALL")
    before = constraint.fork()
    assert accepts(grammars, constraint, both[:-1])
    assert not may_end(grammars, constraint)
    assert accepts(grammars, constraint, "]")
    assert constraint.is_over
    for other in wrong(style):
        assert not accepts(grammars, before.fork(), other + "]"), other
    single = constraint_of(grammars, style, "auto", parallel=False)
    assert not accepts(grammars, single, both)


def test_a_whole_text_is_a_call_or_none(grammars: Grammars) -> None:
    """Llama's calls have no mark: JSON that names a tool is one, if nothing but white space is before it."""
    call = written("llama", ("weather", ROME))
    for text in ("", "\n ", "{", '{"na', call[: call.index("{", 1)], call[: call.index("ty")]):
        constraint = constraint_of(grammars, "llama", "auto")
        assert accepts(grammars, constraint, text)
        assert constraint.allowed().all() == (len(text) < len('{"name": "weather", "parameters": '))
        before = constraint.fork()
        begun = len(text.lstrip())
        assert accepts(grammars, constraint, call[begun:])
        assert constraint.is_over
        for other in wrong("llama"):
            if other.startswith(text.lstrip()) and "weather" in other:
                assert not (accepts(grammars, rest := before.fork(), other[begun:]) and rest.is_over), other
    for text in ("Here: ", '{"name": "nothing", "parameters": ', '{"name": "weather", "arguments": ', "[" + call):
        constraint = constraint_of(grammars, "llama", "auto")
        assert accepts(grammars, constraint, text)
        assert accepts(grammars, constraint, call)
        assert constraint.allowed().all()


@pytest.mark.parametrize("style", ["hermes", "llama"])
def test_special_tokens_that_no_text_has_hide_no_call(grammars: Grammars, style: str) -> None:
    """Llama 3.1 writes `<|python_tag|>` before a call at times. Here the end token is such."""
    call = written(style, ("weather", ROME))
    begin = f"{END}{call[0]}{END}" if style == "llama" or grammars.token("<tool_call>") is None else f"{END}{call[:11]}"
    rest = call[len(begin.replace(END, "")) :]
    assert accepts(grammars, constraint_of(grammars, style, "auto"), begin + rest)
    for wrong_rest in (rest.replace("Rome", "Oslo"), rest.replace('"city": "Rome", ', "")):
        assert not accepts(grammars, constraint_of(grammars, style, "auto"), begin + wrong_rest)


def test_a_token_that_goes_beyond_the_mark_begins_a_call_or_is_text(grammars: Grammars) -> None:
    """`{"` is one token of the tokenizer, and no call goes on with it; a line's end is one of a call."""
    if grammars.token("<tool_call>") is not None:
        return
    constraint = constraint_of(grammars, "hermes", "auto")
    assert accepts(grammars, constraint, "<tool_call>")
    assert np.flatnonzero(constraint.allowed()).tolist() == grammars.tokenizer.tokenize_str("\n")


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"days": 0}}\n</tool_call>'),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"days": 0}}]'),
        ("hermes", '<tool_call><tool_call>\n{"name": "weather", "arguments": {"days": 0}}\n</tool_call>'),
    ],
)
def test_calls_that_are_found_were_bound(style: str, text: str) -> None:
    """Tokens such as `>{` end a mark and go on: either the call is bound to its schema behind them, or it is text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pairs = [(">", "{"), ("]", "["), (">", "<")]
    tokens = ["Ġ", *map(chr, range(33, 127)), "Ċ", *map("".join, pairs)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    grammars = Grammars(TextCodec(tokenizer, {}, None), len(tokens) + 1, [len(tokens)])
    calls = Tools(TOOLS).calls(TEMPLATES[style])
    assert calls is not None
    constraint, is_bound = calls.constraint(grammars), False
    for token in tokenizer.encode(text).ids:
        is_bound |= not constraint.allowed()[token]
        if not is_bound:
            constraint.accept(token)
    assert is_bound or calls.find(text) == (text, [])


@pytest.mark.parametrize("style", TEMPLATES)
@pytest.mark.parametrize(("choice", "parallel"), [("required", True), ("required", False), (NOW, True)])
def test_other_choices_write_calls_alone(grammars: Grammars, style: str, choice: object, parallel: bool) -> None:
    call = ("weather", ROME) if choice == "required" else ("now", "{}")
    several = choice == "required" and parallel and style != "llama"
    constraint = constraint_of(grammars, style, choice, parallel)
    assert not may_end(grammars, constraint)
    assert accepts(grammars, constraint, written(style, call))
    assert may_end(grammars, constraint)
    assert constraint.is_over != (several and style in ("hermes", "ministral"))
    constraint = constraint_of(grammars, style, choice, parallel)
    assert style == "llama" or accepts(grammars, constraint, written(style, call, call)) == several
    for other in (
        "Hello",
        f" {written(style, call)}",
        *wrong(style)[: 4 if style in ("llama", "ministral") else None],  # whose last one is no more than cut
        *([written(style, ("weather", ROME))] if choice is NOW else []),
    ):
        assert not accepts(grammars, constraint_of(grammars, style, choice, parallel), other), other


@pytest.mark.parametrize("style", ["hermes", "ministral"])
def test_a_single_call_ends_the_text(grammars: Grammars, style: str) -> None:
    constraint = constraint_of(grammars, style, "auto", parallel=False)
    assert accepts(grammars, constraint, f"I call {written(style, ('weather', ROME))}")
    assert constraint.is_over


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("style", ["hermes", "llama", "nemo"])
def test_reasoning_is_free(grammars: Grammars, style: str, inside: bool) -> None:
    """It may name marks, and what it says is no call; behind it a call is bound."""
    calls = Tools(TOOLS, parallel=False).calls(TEMPLATES[style])
    assert calls is not None
    constraint = calls.constraint(grammars, Thoughts(THINK, inside))
    call = written(style, ("weather", ROME))
    assert accepts(grammars, constraint, f"{'' if inside else '<think>'}{call} or {call[:11]}.")
    assert constraint.allowed().all()
    for other in (one for one in wrong(style) if "weather" in one):
        rest = constraint.fork()
        assert not (accepts(grammars, rest, f"</think>\n\n{other}") and rest.is_over), other
    assert accepts(grammars, constraint, f" {call}\n</think>\n\n{call}")
    assert constraint.is_over


@pytest.mark.parametrize(
    ("bundle", "style", "choice", "policy"),
    [
        ("characters", "hermes", "auto", "skip"),
        ("characters", "hermes", "required", "lossless"),
        ("characters", "hermes", NOW, "skip"),
        ("characters", "ministral", "auto", "lossless"),
        ("characters", "mistral", NOW, "skip"),
        ("characters", "llama", "required", "lossless"),
        ("merges", "hermes", "auto", "lossless"),
        ("merges", "hermes", "required", "skip"),
        ("merges", "hermes", NOW, "lossless"),
        ("merges", "llama", "auto", "skip"),
        ("merges", "nemo", "auto", "lossless"),
        ("merges", "ministral", "required", "skip"),
    ],
    indirect=["bundle"],
)
def test_a_model_writes_calls_that_are_valid(bundle: Bundle, style: str, policy: str, choice: object) -> None:
    """Under `auto` this model calls nothing by itself, so its prompt has begun a call."""
    grammars, codec = Grammars.of(bundle), TextCodec.open(bundle.root / "tokenizer")
    calls, called = Tools(TOOLS, choice).calls(TEMPLATES[style]), 0
    assert calls is not None
    with Session.open(bundle.root, k=2, policy=policy, threads=1) as session:
        for seed in range(4):
            constraint, begin = calls.constraint(grammars), ""
            if choice == "auto":
                begin = BEGUN[style]
                assert accepts(grammars, constraint, begin)
            options = {"sampling": SamplingOptions(1.0, seed=seed), "constraint": constraint}
            for row in session.generate([codec.encode("A")] * 2, 150, **options):
                text, found = calls.find(begin + codec.decode(row, kept=calls.marks))
                for call in found:
                    schema = WEATHER if call.name == "weather" else {"const": {}}
                    jsonschema.validate(json.loads(call.arguments), schema)
                called += len(found)
                assert choice == "auto" or found
                assert choice == "auto" or "_call>" in text or "[TOOL_CALLS]" in text or not text
    assert called >= 8


@pytest.mark.parametrize("style", TEMPLATES)
def test_calls_are_found_in_a_text(style: str) -> None:
    calls = Tools(TOOLS).calls(TEMPLATES[style])
    assert calls is not None
    given = '{"city": "</tool_call>]} [TOOL_CALLS]"}'
    call, other = ToolCall("weather", given), ToolCall("now", '{"n": 1e999}')
    one = written(style, ("weather", given))
    assert calls.find("No call, a <tool_call>, [TOOL_CALLS] and {.")[1] == []
    assert calls.find(one) == ("", [call])
    for text in (one.replace("weather", "nothing"), one[:-1], one[: one.index("</")], one[:40] + "[" * 100_000):
        assert calls.find(text) == (text, [])
    if style == "llama":
        for text in (f"I ask. {one}", f"{one} Done.", f"{one}\n{one}", f"[{one}]"):
            assert calls.find(text) == (text, [])
        return
    two = written(style, ("weather", given), ("now", '{"n": 1e999}'))
    between = "\n" if style == "hermes" else ""
    assert calls.find(f"I ask.\n{two} Done.") == (f"I ask.\n{between} Done.", [call, other])
    for text in (one.replace("weather", "nothing"), one[:-1], one[: one.index("</")], one[:40] + "[" * 100_000):
        assert calls.find(f"{one}{text}") == (text, [call])


def test_what_is_no_call_is_text() -> None:
    calls = Tools(TOOLS).calls(TEMPLATES["hermes"])
    assert calls is not None
    one = written("hermes", ("weather", '{"city": "</tool_call>"}'))
    call = ToolCall("weather", '{"city": "</tool_call>"}')
    for broken in (
        one[:-1],  # not at its end
        one.replace("weather", "nothing"),
        one.replace('": {', '": '),
        one.replace('"}}', '"'),
        one.replace("</tool_call>", "x" * 50),
        '<tool_call>\n["now"]\n</tool_call>',
    ):
        assert calls.find(broken) == (broken, [])
        assert calls.find(f"{one}{broken}") == (broken, [call])


def test_no_call_is_no_constraint() -> None:
    tools = Tools(TOOLS, "none")
    assert tools.calls(TEMPLATES["hermes"]) is None
    assert tools.calls(None) is None
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
    unsupported = Tools([{"type": "function", "function": function}]).calls(TEMPLATES["llama"])
    assert unsupported is not None
    assert_refused(lambda: unsupported.constraint(grammars), "cannot be followed", "not")
    others = ("<tool_call><function=now>", "<tool_call>now<arg_key>", '<tool_call><invoke name="now">')
    others = (*others, '<tool_calls>[{"name": "now"}]</tool_calls>')
    others = (*(TEMPLATES["hermes"] + other for other in others), TEMPLATES["ministral"] + "[CALL_ID]", "[TOOL_CALLS]")
    for template in (None, "{{ messages }}", *others):
        assert_refused(lambda template=template: Tools(TOOLS).calls(template), "of a known style", "Qwen3", "Llama 3.1")


CALL = written("hermes", ("weather", ROME))
LLAMA, MINISTRAL = written("llama", ("weather", ROME)), written("ministral", ("weather", ROME), ("now", "{}"))
MISTRAL = written("mistral", ("weather", ROME), ("now", "{}"))


@pytest.mark.parametrize(
    ("style", "text", "content"),
    [
        *((style, text, text) for style in TEMPLATES for text in ("", "Hello.", "{}")),
        *((style, "Hello [TOOL", "Hello [TOOL" if style in ("hermes", "llama") else "Hello") for style in TEMPLATES),
        ("hermes", " \n", ""),
        ("hermes", "Hello <tool", "Hello"),
        ("hermes", CALL, ""),
        ("hermes", f"\n Let me look. \n{CALL}", "\n Let me look."),
        ("hermes", f"Look: {CALL}\n and{CALL}. \n", "Look:"),
        ("hermes", f"{CALL[:-3]}", ""),
        ("hermes", f"So <tool_call>no</tool_call> {CALL}", "So"),
        ("hermes", f"<tool_call{CALL}", "<tool_call"),
        ("llama", LLAMA, ""),
        ("llama", LLAMA[:-1], ""),
        ("llama", LLAMA[:20], ""),
        ("llama", f"\n {LLAMA} ", ""),
        ("llama", f"\n . {LLAMA}", f"\n . {LLAMA}"),
        ("llama", LLAMA.replace("weather", "nothing"), LLAMA.replace("weather", "nothing")),
        ("mistral", f"Let me look. {MISTRAL}", "Let me look."),
        ("mistral", MISTRAL[:-1], ""),
        ("ministral", f"Look: {MINISTRAL} and {MINISTRAL}.", "Look:"),
    ],
)
def test_a_stream_tells_what_the_whole_text_says(style: str, text: str, content: str) -> None:
    """`content` is told before the text has ended."""
    calls = Tools(TOOLS).calls(TEMPLATES[style])
    assert calls is not None
    for width in (1, 2, 7, 30, 1000):
        stream = calls.stream()
        told = [stream.push(text[i : i + width]) for i in range(0, len(text), width)]
        assert "".join(content for content, _ in told) == content.rstrip()
        if style == "hermes":
            assert [call for _, found in told for call in found] == calls.find(text)[1]  # each is told as it ends
        told.append(stream.finish())
        assert ("".join(content for content, _ in told), [call for _, found in told for call in found]) == calls.find(
            text
        )
