"""Tools: what may be written under each choice, the calls that are found in a text, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from lora_drop_runtime import SamplingOptions, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.constraint import Constraint
from lora_drop_runtime.grammars import grammar
from lora_drop_runtime.grammars.call_styles import with_calls_in_texts
from lora_drop_runtime.grammars.calls import ToolCall
from lora_drop_runtime.grammars.grammar import Grammars
from lora_drop_runtime.grammars.tools import MOST_TOOLS, Tools
from lora_drop_runtime.reasoning import CHANNELS, THINK, Thoughts
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
    "small": "[AVAILABLE_TOOLS]{{ tools }} and {{ '[TOOL_CALLS]' + name + '[CALL_ID]' + id + '[ARGS]' + arguments }}",
    "xml": "{{ tools }} <tool_call>\n<function=example>\n<parameter=a>\nvalue\n</parameter>\n</function>\n</tool_call>",
    "seed": "{{ tools }} <seed:tool_call>\n<function=example>\n<parameter=a>value</parameter>\n</seed:tool_call>",
    "glm": "{{ tools }} <tool_call>{name}\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>",
    "glm47": "{{ tools }} <tool_call>{name}<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>",
    "gemma": "{{ tools }} {{ '<|tool_call>call:' + name + '{' + arguments + '}<tool_call|>' }}",
    "channels": "{{ tools }} {{ 'functions.' + name + '<|channel|>commentary json<|message|>' + arguments }}",
    "command": '<|START_ACTION|>[{"tool_call_id": "{{ i }}", "tool_name": "{{ name }}", "parameters": {{ given }}}]',
    "granite": "respond only with <|tool_call|> followed by a JSON list of tools used. {{ tools }}",
    "lfm2": "<|im_start|>system\nList of tools: <|tool_list_start|>{{ tools }}<|tool_list_end|>",
    "olmo": "<functions>{{ tools }}</functions> {{ '<function_calls>' + name + '(' + given + ')</function_calls>' }}",
}
BEGUN = {
    "hermes": "Well <tool_call>",
    "llama": '{"name": "weather", "parameters": ',
    "nemo": "[TOOL_CALLS]",
    "ministral": "Well [TOOL_CALLS]",
    "xml": "Well <tool_call>",
    "glm": "<tool_call>",
    "gemma": "Well <|tool_call>",
    "channels": "<|channel|>commentary to=functions.",
    "lfm2": "Well <|tool_call_start|>",
}
# A style by what it lets a text do: sections of calls amid text; a list of calls, which ends it
AMID = ["hermes", "ministral", "small", "xml", "seed", "glm", "glm47", "gemma"]
LISTS = ["mistral", "nemo", "command", "granite", "lfm2", "olmo"]
ALONE = ["llama", "channels"]  # one call
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


BEGINS = {
    **dict.fromkeys(("hermes", "xml", "glm", "glm47"), "<tool_call>"),
    **dict.fromkeys(("mistral", "nemo", "ministral", "small"), "[TOOL_CALLS]"),
    "seed": "<seed:tool_call>",
    "gemma": "<|tool_call>",
    "channels": "<|channel|>commentary to=functions.",
    "command": "<|START_ACTION|>",
    "granite": "<|tool_call|>",
    "lfm2": "<|tool_call_start|>",
    "olmo": "<function_calls>",
}


def written(style: str, *calls: tuple[str, str]) -> str:
    """Calls as a model of a style writes them: what the templates of such models make of messages with calls."""
    if style in ALONE:
        ((name, given),) = calls
        if style == "channels":
            return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{given}"
        return f'{{"name": "{name}", "parameters": {given}}}'
    if style in LISTS:
        before, key = '"name"', "arguments"
        opening, between, closing = {
            "command": ("<|START_ACTION|>[\n    ", ",\n    ", "\n]<|END_ACTION|>"),
            "granite": ("<|tool_call|>[", ", ", "]"),
            "mistral": ("[TOOL_CALLS] [", ", ", "]"),
            "nemo": ("[TOOL_CALLS][", ", ", "]"),
            "lfm2": ("<|tool_call_start|>[", ", ", "]<|tool_call_end|>"),
            "olmo": ("<function_calls>", "\n", "</function_calls>"),
        }[style]
        if style in ("lfm2", "olmo"):
            values = [(name, json.loads(given).items()) for name, given in calls]
            pairs = [(name, (f"{key}={json.dumps(value)}" for key, value in own)) for name, own in values]
            return opening + between.join(f"{name}({', '.join(own)})" for name, own in pairs) + closing
        if style == "command":
            before, key = '"tool_call_id": "{n}", "tool_name"', "parameters"
        items = (f'{{{before.format(n=n)}: "{name}", "{key}": {given}}}' for n, (name, given) in enumerate(calls))
        return opening + between.join(items) + closing
    if style == "hermes":
        return "\n".join(
            f'<tool_call>\n{{"name": "{name}", "arguments": {given}}}\n</tool_call>' for name, given in calls
        )
    if style == "ministral":
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{given}" for name, given in calls)
    if style == "small":
        return "".join(f"[TOOL_CALLS]{name}[CALL_ID]a1b2c3d4{n}[ARGS]{given}" for n, (name, given) in enumerate(calls))
    found = []
    for name, given in calls:
        values = {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in json.loads(given).items()
        }
        if style in ("xml", "seed"):
            line, mark = ("\n", "tool_call") if style == "xml" else ("", "seed:tool_call")
            pairs = "".join(f"<parameter={key}>{line}{value}{line}</parameter>\n" for key, value in values.items())
            found.append(f"<{mark}>\n<function={name}>\n{pairs}</function>\n</{mark}>")
        elif style in ("glm", "glm47"):
            line = "\n" if style == "glm" else ""
            pairs = "".join(
                f"<arg_key>{key}</arg_key>{line}<arg_value>{value}</arg_value>{line}" for key, value in values.items()
            )
            found.append(f"<tool_call>{name}{line}{pairs}</tool_call>")
        else:
            found.append(f"<|tool_call>call:{name}{gemma(json.loads(given))}<tool_call|>")
    return ("" if style in ("glm47", "gemma") else "\n").join(found)


def gemma(value: object) -> str:
    """As Gemma's template writes it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{gemma(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(gemma, value)) + "]"
    return f'<|"|>{value}<|"|>' if isinstance(value, str) else json.dumps(value)


def wrong(style: str) -> list[str]:
    call = written(style, ("weather", ROME))
    return [
        call.replace("Rome", "Oslo"),
        written(style, ("weather", ROME.replace("3", "10"))),
        call.replace("weather", "nothing"),
        written(style, ("weather", '{"days": 3}')),
        call.replace("3}", "3") if "3}" in call else call.replace("3", "3}"),
    ]


@pytest.fixture(scope="module", autouse=True)
def compiled_here() -> Iterator[None]:
    """No process is started for grammars: the form that one would get is that of `text` below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar, "compile_apart", lambda _: "")
        yield


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


@pytest.mark.parametrize("style", AMID)
def test_auto_is_free_until_a_call_begins(grammars: Grammars, style: str) -> None:
    call = written(style, ("weather", ROME))
    mark = BEGINS[style]
    for text in ("Hello {", f"a {mark[:5]}", f"{mark[:-1]} {mark[:-1]}", "x" * 50):
        constraint = constraint_of(grammars, style, "auto")
        assert accepts(grammars, constraint, text)
        assert constraint.allowed().all()
        before = constraint.fork()
        assert accepts(grammars, constraint, f" {call}")
        assert constraint.allowed().all()
        assert accepts(grammars, constraint, f" and {call}.")
        for other in wrong(style)[: 4 if style in ("ministral", "small") else None]:
            assert not accepts(grammars, before.fork(), other), other
        assert accepts(grammars, before, call)


@pytest.mark.parametrize("style", LISTS)
def test_a_list_of_calls_ends_the_text(grammars: Grammars, style: str) -> None:
    both = written(style, ("weather", ROME), ("now", "{}"))
    constraint = constraint_of(grammars, style, "auto")
    assert accepts(grammars, constraint, f"I call {BEGINS[style][:-1]}")
    before = constraint.fork()
    assert accepts(grammars, constraint, both[:-1])
    assert not may_end(grammars, constraint)
    assert accepts(grammars, constraint, both[-1])
    assert constraint.is_over
    for other in wrong(style):
        assert not (accepts(grammars, rest := before.fork(), other) and rest.is_over), other
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
    several = choice == "required" and parallel and style not in ALONE
    constraint = constraint_of(grammars, style, choice, parallel)
    assert not may_end(grammars, constraint)
    assert accepts(grammars, constraint, written(style, call))
    assert may_end(grammars, constraint)
    assert constraint.is_over != (several and style in AMID)
    constraint = constraint_of(grammars, style, choice, parallel)
    assert style in ALONE or accepts(grammars, constraint, written(style, call, call)) == several
    for other in (
        "Hello",
        f" {written(style, call)}",
        *wrong(style)[: 4 if style in (*ALONE, "ministral", "small") else None],  # whose last one is no more than cut
        *([written(style, ("weather", ROME))] if choice is NOW else []),
    ):
        assert not accepts(grammars, constraint_of(grammars, style, choice, parallel), other), other


def allowed(mode: str, *tools: object) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [*tools]}}


@pytest.mark.parametrize("style", TEMPLATES)
def test_tools_that_are_not_allowed_are_told_and_not_called(grammars: Grammars, style: str) -> None:
    weather, now = written(style, ("weather", ROME)), written(style, ("now", "{}"))
    for choice in (allowed("required", NOW), allowed("auto", NOW)):
        assert Tools(TOOLS, choice).for_template == TOOLS
        assert accepts(grammars, constraint_of(grammars, style, choice), now)
    assert not accepts(grammars, constraint_of(grammars, style, allowed("required", NOW)), weather)
    assert not accepts(grammars, constraint_of(grammars, style, allowed("required", NOW)), "Hello")
    free = constraint_of(grammars, style, allowed("auto", NOW))
    assert accepts(grammars, free, weather) == (style == "llama")  # where a text that begins no call is free
    calls = Tools(TOOLS, allowed("auto", NOW)).calls(TEMPLATES[style])
    assert calls is not None
    assert calls.find(weather) == (weather, [])
    both = allowed("required", NOW, {"type": "function", "function": {"name": "weather"}})
    assert accepts(grammars, constraint_of(grammars, style, both), weather)


@pytest.mark.parametrize("style", ["lfm2", "olmo", "hermes", "granite", "xml", "command"])
def test_calls_that_a_template_leaves_out_stand_in_the_texts(style: str) -> None:
    """As the model wrote them; but where arguments are no JSON or ids are needed, of which all templates take care."""
    asked, answered = {"role": "user", "content": "Hi"}, {"role": "tool", "content": "Rain"}
    functions = [{"name": "weather", "arguments": json.loads(ROME)}, {"name": "now", "arguments": {}}]
    calls = [{"type": "function", "function": one} for one in functions[: 1 if style == "hermes" else 2]]
    messages = [asked, {"role": "assistant", "content": "Well ", "tool_calls": calls}, answered]
    _, told, _ = with_calls_in_texts(messages, TEMPLATES[style])
    named = [(one["function"]["name"], json.dumps(one["function"]["arguments"])) for one in calls]
    left_out = style in ("xml", "command")
    assert told["content"] == ("Well " if left_out else f"Well {written(style, *named)}")
    for template in (f"{TEMPLATES[style]} {{{{ message.tool_calls }}}}", "no style"):
        assert with_calls_in_texts(messages, template) is messages
    assert with_calls_in_texts([asked], TEMPLATES[style]) == [asked]
    if not left_out:
        functions[0]["arguments"]["city"] = "Köln"
        assert "Köln" in with_calls_in_texts(messages, TEMPLATES[style])[1]["content"]


@pytest.mark.parametrize("style", AMID)
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
    "header", ["to=functions.weather<|channel|>commentary json<|message|>", written("channels", ("weather", ""))]
)
def test_a_message_to_a_function_is_bound(grammars: Grammars, header: str) -> None:
    """However its header is written, and behind what is reasoning."""
    calls = Tools(TOOLS).calls(TEMPLATES["channels"])
    assert calls is not None
    thought = '<|channel|>analysis<|message|>to=functions.weather{"days": 0}<|end|><|start|>assistant '
    for begin in ("", thought, f"{thought}<|channel|>commentary<|message|>I look.<|end|><|start|>assistant "):
        constraint = calls.constraint(grammars, Thoughts(CHANNELS))
        assert accepts(grammars, constraint, begin + header)
        for other in (ROME.replace("Rome", "Oslo"), '{"days": 3}', "x"):
            assert not accepts(grammars, constraint.fork(), other)
        assert accepts(grammars, constraint, ROME)
        assert constraint.is_over
        stream = Thoughts(CHANNELS).stream(calls=True)
        text = "".join(stream.push(begin + header + ROME)[1:] + stream.finish()[1:])
        assert calls.find(text)[1] == [ToolCall("weather", ROME)]
    constraint = calls.constraint(grammars, Thoughts(CHANNELS))
    assert accepts(grammars, constraint, f"{thought}<|channel|>final<|message|>to=functions.weather x")


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
        ("characters", "xml", "auto", "skip"),
        ("merges", "xml", "required", "lossless"),
        ("characters", "glm", "auto", "lossless"),
        ("merges", "glm47", "required", "skip"),
        ("characters", "gemma", "required", "lossless"),
        ("merges", "gemma", "auto", "skip"),
        ("characters", "channels", "auto", "skip"),
        ("merges", "channels", "required", "lossless"),
        ("characters", "command", NOW, "skip"),
        ("merges", "lfm2", "auto", "lossless"),
        ("characters", "olmo", "required", "skip"),
    ],
    indirect=["bundle"],
)
def test_a_model_writes_calls_that_are_valid(bundle: Bundle, style: str, policy: str, choice: object) -> None:
    """Under `auto` this model calls nothing by itself, so its prompt has begun a call."""
    grammars, codec = Grammars.of(bundle), TextCodec.open(bundle.root / "tokenizer")
    calls, called = Tools(TOOLS, choice).calls(TEMPLATES[style]), 0
    assert calls is not None
    with Session.open(bundle.root, k=2, policy=policy, threads=1) as session:
        for seed in range(2):
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
                assert choice == "auto" or any(mark in text for mark in calls.marks) or not text
    assert called >= 4


@pytest.mark.parametrize("style", TEMPLATES)
def test_calls_are_found_in_a_text(style: str) -> None:
    calls = Tools(TOOLS).calls(TEMPLATES[style])
    assert calls is not None
    given = '{"city": "</tool_call>]} [TOOL_CALLS]<tool_call|>"}'
    call, other = ToolCall("weather", given), ToolCall("now", '{"n": 1e999}')
    one = written(style, ("weather", given))
    assert calls.find("No call, a <tool_call>, <|tool_call|>, <|tool_call>, [TOOL_CALLS] and {.")[1] == []
    assert calls.find(one) == ("", [call])
    cut = one[: one.index("</tool_call>]}")]
    listed = one.replace(given, "[1]")  # but for arguments one by one, whose text is another
    broken = (one.replace("weather", "nothing"), one[:-1], cut, cut[:-3] + "[" * 100_000)
    for text in (*broken, *([listed] if listed != one else [])):
        assert calls.find(text) == (text, []), text[:200]
    if style == "llama":
        for text in (f"I ask. {one}", f"{one} Done.", f"{one}\n{one}", f"[{one}]"):
            assert calls.find(text) == (text, [])
        return
    two = one if style in ALONE else written(style, ("weather", given), ("now", '{"n": Infinity}'))
    two = two.replace("Infinity", "1e999")
    expected = [call] if style in ALONE else [call, other]
    between = "\n" if style in ("hermes", "xml", "seed", "glm") else ""
    assert calls.find(f"I ask.\n{two} Done.") == (f"I ask.\n{between} Done.", expected)
    for text in (one.replace("weather", "nothing"), one[:-1], cut):
        assert calls.find(f"{one}{text}") == (text.rstrip(), [call])


@pytest.mark.parametrize("style", ["xml", "glm47", "gemma"])
@pytest.mark.parametrize(
    ("parameters", "right", "others"),
    [
        (  # texts that JSON could be, too
            {"a": {"type": "string"}, "b": {"type": ["string", "null"]}, "c": {"anyOf": [{"type": "integer"}, {}]}},
            [
                {"a": "3", "b": "true", "c": 3},
                {"a": "null", "b": None},
                {"a": '"x"\n<y>', "b": "", "c": "4 "},
                {"a": " \n", "c": [1, {"d": "e"}]},
            ],
            [{"b": "no a"}],
        ),
        (
            {
                "a": {"$ref": "#/$defs/n"},
                "b": {"allOf": [{"$ref": "#/$defs/n"}], "default": 1},
                "c": {"enum": ["e <x>", 1]},
                "d": {"$ref": "#/$defs/of%5Bn%5D"},
            },
            [{"a": 1, "b": 2, "c": "e <x>"}, {"a": 0, "c": 1}, {"a": 0, "d": None}],
            [{"a": 4}, {"a": "x"}, {"a": 1, "b": -1}, {"a": 1, "c": "e"}, {"a": 1, "c": 2}, {"a": 1, "d": 2}],
        ),
        (
            {
                "a": {"type": "array", "items": {"type": "string", "maxLength": 2}, "minItems": 1, "maxItems": 3},
                "b": {
                    "type": "object",
                    "properties": {"x": {"type": "boolean"}, "y": {"type": "number"}},
                    "required": ["y"],
                },
            },
            [{"a": ["x", "", "yy"]}, {"a": ["x"], "b": {"x": True, "y": -1.5e3}}, {"a": ["x"], "b": {"y": 0}}],
            [
                {"a": []},
                {"a": ["xxx"]},
                {"a": ["", "", "", ""]},
                {"a": ["x"], "b": {"x": False}},
                {"a": ["x"], "b": {}},
            ],
        ),
        (
            {"a": {"type": "string", "minLength": 2, "maxLength": 3}},
            [{"a": "ab"}, {"a": "a\nb"}],
            [{"a": "a"}, {"a": "abcd"}],
        ),
        (None, [{}, {"x": 1}, {"x": "y z", "u-v": [True, None, {"w": "q"}]}], []),
        (
            {"a": {"$ref": "#/$defs/tree"}},
            [{"a": {"v": 1}}, {"a": {"v": 1, "next": [{"v": 2}, {"v": 3, "next": []}]}}],
            [{"a": {"v": "1"}}, {"a": {"v": 1, "next": [{}]}}],
        ),
        (
            {
                "a": {"allOf": [{"$ref": "#/$defs/n"}, {"type": "number", "minimum": 1}, {"$ref": "#/$defs/least"}]},
                "b": {
                    "type": "object",
                    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
                    "required": ["x"],
                    "anyOf": [{"required": ["y"]}, {"properties": {"z": {"type": "boolean"}}, "required": ["z"]}],
                },
                "c": {
                    "allOf": [
                        {"properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False},
                        {"properties": {"x": {"minimum": 5}, "y": {}}},
                    ],
                    "type": "object",
                },
            },
            [{"a": 2}, {"a": 3, "b": {"x": 1, "y": 2}}, {"a": 2, "b": {"x": 1, "z": True}, "c": {"x": 5}}],
            [
                {"a": 1},
                {"a": 4},
                {"a": 2, "b": {"y": 1}},
                {"a": 2, "b": {"x": 1}},
                {"a": 2, "c": {"x": 4}},
                {"a": 2, "c": {"x": 5, "y": 1}},
                {"a": 2, "c": {}},
            ],
        ),
        (
            {"a": {"type": "object", "additionalProperties": {"type": "integer"}, "propertyNames": {"type": "string"}}},
            [{"a": {}}, {"a": {"x": 1, "y": 2}}],
            [{"a": {"x": "1"}}, {"a": {"x": 1, "y": None}}],
        ),
        (
            {
                "a": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "minItems": 2},
                "b": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": False},
                "c": {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "null"}, "maxItems": 3},
                "d": {"allOf": [{"prefixItems": [{"type": "integer"}]}, {"type": "array", "items": {"minimum": 2}}]},
            },
            [
                {"a": [1, True], "d": [2]},
                {"a": [1, True]},
                {"a": [1, True, None], "b": [], "c": []},
                {"a": [1, True, 2, 3], "b": [2], "c": [3]},
            ],
            [
                {"a": [1]},
                {"a": [True, 1]},
                {"a": [1, True], "b": [1, True, 1]},
                {"a": [1, True], "c": [1, 2]},
                {"a": [1, True], "d": [1]},
                {"a": [1, True], "d": ["x"]},
                {"a": [1, True], "c": [1, None, None, None]},
            ],
        ),
        (
            {
                "a": {"type": "integer", "maximum": 5},
                "b": {"type": "array", "items": {"$ref": "#"}},
                "c": {"type": "array", "items": {"$ref": "#/properties/a"}},
            },
            [{"a": 1, "b": [{"a": 2}, {"a": 3, "b": [], "c": [4]}]}, {"a": 1, "c": [2]}],
            [{"a": 1, "b": [[]]}, {"a": 1, "b": [{"b": []}]}, {"a": 1, "c": [6]}, {"a": 1, "b": [{"a": 6}]}],
        ),
        (
            {
                "a": {"enum": ["1", "x", 2]},
                "b": {"type": "integer", "enum": [1, "2"]},
                "c": {"allOf": [{"enum": [1, "y", "zz", 5]}, {"minimum": 3, "maxLength": 1}]},
                "d": {"anyOf": [{"type": "string"}, {"type": "integer", "maximum": 3}]},
            },
            [{"a": "1"}, {"a": 2, "b": 1}, {"a": "x", "c": "y", "d": "4"}, {"a": "x", "c": 5, "d": 3}],
            [{"a": "x", "b": 2}, {"a": "x", "c": 1}, {"a": "x", "c": "zz"}],
        ),
    ],
    ids=[
        "texts",
        "references",
        "nested",
        "lengths",
        "free",
        "recursive",
        "both",
        "records",
        "tuples",
        "root",
        "constants",
    ],
)
def test_arguments_that_are_written_one_by_one(
    grammars: Grammars, style: str, parameters: dict[str, Any] | None, right: list[Any], others: list[Any]
) -> None:
    tree = {
        "type": "object",
        "properties": {"v": {"type": "integer"}, "next": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
        "required": ["v"],
    }
    definitions = {"n": {"type": "integer", "minimum": 0, "maximum": 3}, "least": {"minimum": 2}, "tree": tree}
    definitions["of[n]"] = {"type": "null"}
    schema = {"type": "object", "$defs": definitions}
    if parameters is not None:
        schema |= {"properties": parameters, "required": ["a"]}
    calls = Tools([{"type": "function", "function": {"name": "f", "parameters": schema}}], "required").calls(
        TEMPLATES[style]
    )
    assert calls is not None
    for given in right:
        jsonschema.validate(given, schema)
        text = written(style, ("f", json.dumps(given)))
        assert accepts(grammars, calls.constraint(grammars), text), text
        (call,) = calls.find(text)[1]
        assert json.loads(call.arguments) == given, text
    for given in others:
        text = written(style, ("f", json.dumps(given)))
        assert not accepts(grammars, calls.constraint(grammars), text), text


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"a b": {}}, "'a b' of a parameter is no word"),
        ({"a": {"$ref": "#/$defs/none"}}, "#/$defs/none is not in the schema"),
        ({"a": {"$ref": "#/properties/a"}}, "refers to itself"),
        ({"a": {"anyOf": [{"$ref": "#/properties/a"}] * 2}}, "refers to itself"),
        ({"a": False}, "allows no value"),
        ({"a": {"enum": "x"}}, "enum is 'x', and no list"),
        ({"a": {"type": "text"}}, "'text' is no type"),
        ({"a": {"type": "string", "maxLength": "x"}}, "maxLength is 'x'"),
        ({"a": {"const": "x\n</parameter>\n"}}, "the mark that ends it"),
    ],
)
def test_parameters_that_cannot_be_written_one_by_one(grammars: Grammars, parameters: Any, reason: str) -> None:
    schema = {"type": "object", "properties": parameters}
    calls = Tools([{"type": "function", "function": {"name": "f", "parameters": schema}}]).calls(TEMPLATES["xml"])
    assert calls is not None
    assert_refused(lambda: calls.constraint(grammars), "parameters of a tool cannot be followed", reason, "tool is f.")


def test_of_many_tools_the_one_is_named_whose_schema_cannot_be_taken(grammars: Grammars) -> None:
    large = {"type": "object", "properties": {"n": {"const": 2**60}}}
    tools = [*TOOLS, {"type": "function", "function": {"name": "count", "parameters": large}}]
    for style in ("hermes", "xml"):
        calls = Tools(tools).calls(TEMPLATES[style])
        assert calls is not None
        assert_refused(lambda calls=calls: calls.constraint(grammars), "too large", "The tool is count.")


@pytest.mark.parametrize("style", ["xml", "glm47", "gemma"])
@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [("string", {"x": "3", "y": "z"}, None), ("integer", {"x": 3}, {"x": "z"})],
    ids=["string", "integer"],
)
def test_parameters_without_names_have_a_schema(
    grammars: Grammars, style: str, kind: str, right: Any, wrong: Any
) -> None:
    schema = {"type": "object", "additionalProperties": {"type": kind}}
    calls = Tools([{"type": "function", "function": {"name": "f", "parameters": schema}}], "required").calls(
        TEMPLATES[style]
    )
    assert calls is not None
    text = written(style, ("f", json.dumps(right)))
    assert accepts(grammars, calls.constraint(grammars), text)
    assert [json.loads(call.arguments) for call in calls.find(text)[1]] == [right]
    if wrong is not None:
        assert not accepts(grammars, calls.constraint(grammars), written(style, ("f", json.dumps(wrong))))


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems is not followed"),
        ({"type": "array", "contains": {"const": 1}}, "contains is not followed"),
        ({"type": "array", "minItems": 2, "maxItems": 1}, "fewer items than it needs"),
        ({"type": "object", "patternProperties": {"^x": {}}}, "patternProperties is not followed"),
        ({"type": "object", "minProperties": 1}, "minProperties"),
        ({"type": "object", "maxProperties": 1}, "maxProperties"),
        ({"type": "string", "not": {"const": ""}}, "not is not followed"),
        ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "pattern is both 'a' and 'b'"),
        ({"allOf": [{"type": "integer"}, {"type": "string"}]}, "allows no value"),
        (
            {"anyOf": [{"type": "integer", "minimum": n} for n in range(2000)], "description": "x" * 100_000},
            "it is too large",
        ),
    ],
)
def test_what_is_not_followed_in_quotes_is_refused(grammars: Grammars, parameter: Any, reason: str) -> None:
    schema = {"type": "object", "properties": {"a": parameter}}
    calls = Tools([{"type": "function", "function": {"name": "f", "parameters": schema}}]).calls(TEMPLATES["gemma"])
    assert calls is not None
    assert_refused(lambda: calls.constraint(grammars), "parameters of a tool cannot be followed", reason)


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


@pytest.mark.parametrize("style", [style for style in AMID + LISTS if style != "gemma"])
def test_a_call_that_an_argument_quotes_is_none(style: str) -> None:
    """Neither while its call is being written, nor where that is cut. Gemma's texts have no quotes within."""
    calls = Tools([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]).calls(
        TEMPLATES[style]
    )
    assert calls is not None
    inner = written(style, ("f", "{}"))
    text = written(style, ("f", json.dumps({"a": f"So: {inner} is one."})))
    (call,) = calls.find(text)[1]
    assert inner in json.loads(call.arguments)["a"]
    for end in range(len(text)):
        assert calls.find(text[:end]) == (text[:end], []), text[:end]
    stream = calls.stream()
    told = [found for character in text for found in stream.push(character)[1]]
    assert told + stream.finish()[1] == [call]


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
    other = {"type": "function", "function": {"name": "other"}}
    few = (allowed("auto"), allowed("auto", NOW, other), allowed("none", NOW), allowed("auto", "now"))
    few = (*few, allowed("auto", *[NOW] * (MOST_TOOLS + 1)))
    for choice in ("some", other, None, {}, ["auto"], *few, {"type": "allowed_tools", "mode": "auto", "tools": [NOW]}):
        assert_refused(lambda choice=choice: Tools(TOOLS, choice), "choice of a tool", "weather, now")
    unsupported = Tools([{"type": "function", "function": function}]).calls(TEMPLATES["llama"])
    assert unsupported is not None
    assert_refused(lambda: unsupported.constraint(grammars), "cannot be followed", "not")
    others = ("<tool_call><function=now>", "<tool_call>now<arg_key>", '<tool_call><invoke name="now">')
    others = (*others, '<tool_calls>[{"name": "now"}]</tool_calls>')
    others = (*(TEMPLATES["hermes"] + other for other in others), "[TOOL_CALLS]")
    for template in (None, "{{ messages }}", *others):
        assert_refused(lambda template=template: Tools(TOOLS).calls(template), "of a known style", "Qwen3", "Llama 3.1")


CALL = written("hermes", ("weather", ROME))
LLAMA, MINISTRAL = written("llama", ("weather", ROME)), written("ministral", ("weather", ROME), ("now", "{}"))
MISTRAL = written("mistral", ("weather", ROME), ("now", "{}"))


@pytest.mark.parametrize(
    ("style", "text", "content"),
    [
        *((style, text, text) for style in TEMPLATES for text in ("", "Hello.", "{}")),
        *((style, f"Hello {mark[:6]}", "Hello") for style, mark in BEGINS.items()),
        ("llama", "Hello [TOOL", "Hello [TOOL"),
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
        *((style, f"Look: \n{written(style, ('weather', ROME))} Done.", "Look:") for style in BEGINS),
        *((style, f"Look: {written(style, ('weather', ROME), ('now', '{}'))}", "Look:") for style in AMID + LISTS),
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
        if style in ("hermes", "xml", "glm", "glm47", "seed", "gemma"):
            assert [call for _, found in told for call in found] == calls.find(text)[1]  # each is told as it ends
        told.append(stream.finish())
        assert ("".join(content for content, _ in told), [call for _, found in told for call in found]) == calls.find(
            text
        )
