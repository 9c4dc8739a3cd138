"""Reasoning and content of texts in the styles of models, however the text comes in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_drop_runtime.reasoning import BETWEEN, CHANNELS, THINK, ReasoningStream, ReasoningStyle, reasoning_style

GEMMA, COHERE = BETWEEN["<channel|>"], BETWEEN["<|END_THINKING|>"]

FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"
COMMENTARY = "<|channel|>commentary<|message|>"
NEXT = "<|end|><|start|>assistant"

TEXTS = [
    (THINK, False, "<think>\nI see.\n\n</think>\n\nHello  world \n", "I see.", "Hello  world \n"),
    (THINK, False, " \n<think>a</thin b</think>c</think>", "a</thin b", "c</think>"),
    (THINK, False, "<think>\n\n</think>\n\nHi", "", "Hi"),
    (THINK, False, "Hello <think> x</think> y", "", "Hello <think> x</think> y"),
    (THINK, False, '{"a": 1}', "", '{"a": 1}'),
    (THINK, False, "\n<thi", "", "\n<thi"),
    (THINK, False, "<think>cut off \n", "cut off", ""),
    (THINK, False, "", "", ""),
    (THINK, True, "thinking\n</think>\n\nanswer", "thinking", "answer"),
    (THINK, True, "cut off", "cut off", ""),
    (CHANNELS, False, f"{ANALYSIS}We need x. {NEXT}{FINAL}Hi there \n", "We need x.", "Hi there \n"),
    (CHANNELS, False, f"{FINAL}Hi", "", "Hi"),
    (CHANNELS, False, f"<|start|>assistant{FINAL}Hi", "", "Hi"),
    (
        CHANNELS,
        False,
        f"{ANALYSIS}a{NEXT}<|channel|>commentary<|message|>b{NEXT}{ANALYSIS}c{NEXT}{FINAL}d",
        "a\nc",
        "b\nd",
    ),
    (CHANNELS, False, f"{ANALYSIS}a{NEXT}<|message|>b", "a", "b"),
    (CHANNELS, False, f"{ANALYSIS}<|channel", "<|channel", ""),
    (CHANNELS, False, "plain text <|end|>", "", "plain text <|end|>"),
    (CHANNELS, False, "<|channel|>fin", "", ""),
    (CHANNELS, False, 'to=functions.f<|channel|>commentary json<|message|>{"a": 1}', "", '{"a": 1}'),
    (CHANNELS, False, "to=", "", "to="),
    (GEMMA, False, "<|channel>thought\nI see.\n<channel|>Hi", "I see.", "Hi"),
    (GEMMA, False, "<|channel>thought\n<channel|>Hi", "", "Hi"),
    (GEMMA, False, "<|channel>other", "", "<|channel>other"),
    (GEMMA, True, "I see.<channel|>Hi", "I see.", "Hi"),
    (COHERE, False, "<|START_THINKING|>a<|END_THINKING|>b", "a", "b"),
]


def told(style: ReasoningStyle, inside: bool, pieces: list[str]) -> tuple[str, str]:
    stream = ReasoningStream(style, inside=inside)
    parts = [stream.push(piece) for piece in pieces]
    parts.append(stream.finish())
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(("style", "inside", "text", "reasoning", "content"), TEXTS, ids=map(str, range(len(TEXTS))))
@given(data=st.data())
def test_pieces(
    style: ReasoningStyle, inside: bool, text: str, reasoning: str, content: str, data: st.DataObject
) -> None:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]
    assert told(style, inside, pieces) == (reasoning, content)


CALL = '<|channel|>commentary to=functions.a.b-c <|constrain|>json<|message|>{"x": " <|e"} '


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        (CALL, "", CALL),
        (f"<|start|>assistant{CALL}<|call|>", "", CALL),
        (' to=functions.a.b-c<|channel|>commentary json<|message|>{"x": " <|e"} ', "", CALL),
        (f'{ANALYSIS}So.{NEXT} to=functions.a.b-c<|channel|>commentary<|message|>{{"x": " <|e"}} ', "So.", CALL),
        (f"{ANALYSIS}So.{NEXT}{COMMENTARY}I look. {NEXT}{CALL}<|call|>{NEXT}{FINAL}Hi", "So.", f"I look.\n{CALL}\nHi"),
        ('<|channel|>analysis to=functions.a.b-c<|message|>{"x": " <|e"} ', "", CALL),
        (f"{ANALYSIS}to=functions.f {NEXT}{FINAL}to=functions.f", "to=functions.f", "to=functions.f"),
        ("<|channel|>commentary to=functions.<|message|>a", "", "a"),
        ("<|channel|>commentary to=functions.a/b<|message|>a", "", "a"),
        ("<|channel|>analysis to=python<|message|>a", "a", ""),
        ("<|channel|>commentary to=functions.a", "", ""),
    ],
    ids=map(str, range(11)),
)
def test_a_message_to_a_function_is_a_call(text: str, reasoning: str, content: str) -> None:
    """Its header becomes one, and what it says stays as it is."""
    for width in (1, 2, 7, 1000):
        stream = ReasoningStream(CHANNELS, calls=True)
        parts = [stream.push(text[i : i + width]) for i in range(0, len(text), width)]
        assert tuple(map("".join, zip(*parts, stream.finish(), strict=True))) == (reasoning, content)


@pytest.mark.parametrize(("style", "begin"), [(THINK, ""), (THINK, "<think>a"), (CHANNELS, FINAL + "a")])
def test_endless_white_space_is_read_once(style: ReasoningStyle, begin: str) -> None:
    """A model may write nothing else in the end. To read what is held at each piece would take hours."""
    reasoning, content = told(style, False, [begin, *[" " * 100] * 50_000])
    expected = ("a", 0) if begin.startswith("<think>") else ("", 5_000_000 + len(begin[-1:]))
    assert (reasoning, len(content)) == expected


def test_text_comes_as_soon_as_it_is_sure() -> None:
    stream = ReasoningStream(THINK)
    given = ["<think>", "I", " see", " <", "3 ", "</", "think>", " Yes", " ", "no"]
    assert [stream.push(piece) for piece in given] == [
        *(("", ""), ("I", ""), (" see", ""), ("", ""), (" <3", ""), ("", ""), ("", "")),
        *(("", "Yes"), ("", " "), ("", "no")),
    ]
    assert stream.finish() == ("", "")


@pytest.mark.parametrize(
    ("template", "style"),
    [
        (None, None),
        ("{{ messages }}", None),
        ("{% if '</think>' in content %}", THINK),
        ("<|start|>assistant<|channel|>analysis<|message|>{{ thinking }}<|end|>", CHANNELS),
        ("<|channel|>", None),
        ("{{ '<|channel>thought\\n' + thinking + '<channel|>' }}", GEMMA),
        ("<|START_THINKING|>{{ plan }}<|END_THINKING|>", COHERE),
    ],
)
def test_styles(template: str | None, style: ReasoningStyle | None) -> None:
    assert reasoning_style(template) is style


def test_who_begins() -> None:
    assert THINK.begun_by("assistant\n<think>\n")
    assert not THINK.begun_by("<think>\n\n</think>\n\n")
    assert not CHANNELS.begun_by("<|start|>assistant")
    assert GEMMA.begun_by("<turn|>\n<|channel>thought\n")
