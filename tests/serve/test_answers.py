"""Tokens that are parts of characters, in logprobs: their bytes, and where they stand in the text."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from lora_drop_runtime.decoding.row import FAILED, LENGTH, STOP, Event
from lora_drop_runtime.grammars.tools import Tools
from lora_drop_runtime.plan.schedule import StepKind
from lora_drop_runtime.reasoning import CHANNELS, THINK, ReasoningStyle, Thoughts
from lora_drop_runtime.text import TextCodec
from lora_drop_serve.answers import Answer, ChatAnswer, CompletionAnswer
from lora_drop_serve.driver import Told
from lora_drop_serve.errors import ApiError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TEXT = "aß€ 😀b\ufffdc"


def byte_level() -> TextCodec:
    """A token for each byte."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextCodec(tokenizer, {}, None)


def byte_fallback() -> TextCodec:
    """A token for each byte, and for ASCII letters."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "c"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return TextCodec(tokenizer, {}, None)


def read(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads("".join(answer.whole()))
    return found


def answered(answer: Answer, ids: list[int], **event: Any) -> dict[str, Any]:
    """The logprobs of one choice after these tokens."""
    for place, token in enumerate(ids):
        finished = LENGTH if place == len(ids) - 1 else None
        tops = tuple((other, -1.0 - place) for other in ids[:3])
        answer.take(Told(0, Event(0, token, StepKind.REFRESH, -0.5, tops, finished=finished, **event)))
    choice = read(answer)["choices"][0]
    assert (choice.get("text") or choice["message"]["content"]) == TEXT
    logprobs: dict[str, Any] = choice["logprobs"]
    return logprobs


@pytest.mark.parametrize("codec", [byte_level(), byte_fallback()], ids=["byte level", "byte fallback"])
def test_parts_of_characters(codec: TextCodec) -> None:
    ids = codec.encode(TEXT).tolist()
    assert len(ids) == len(TEXT.encode())
    options: Any = {"logprobs": True, "includes_usage": False, "includes_usage_so_far": False, "verifies": False}
    found = answered(CompletionAnswer(codec, "m", 1, 1, (), **options), ids)
    whole = [character for character in TEXT for _ in character.encode()]
    places = [place for place, character in enumerate(TEXT) for _ in character.encode()]
    assert found["text_offset"] == places
    pairs = zip(whole, TEXT.encode(), strict=True)
    assert found["tokens"] == [c if c.isascii() else f"bytes:\\x{byte:02x}" for c, byte in pairs]
    assert {len(top) for top in found["top_logprobs"]} == {3, 4}  # the token, and three that may be it
    content = answered(ChatAnswer(codec, "m", 1, 1, (), **options), ids)["content"]
    assert bytes(byte for one in content for byte in one["bytes"]) == TEXT.encode()
    assert content[1]["token"] == "\\xc3"
    assert [one["bytes"] for one in content[0]["top_logprobs"]] == [[97], [0xC3], [0x9F]]


def test_a_whole_answer_takes_little_more_than_its_bytes() -> None:
    """64 choices with 20 logprobs for each token may be 200 MB, and six times as many as objects."""
    codec = byte_level()
    tops = tuple((other, -1.5 - other) for other in range(20))
    options: Any = {"logprobs": True, "includes_usage": False, "includes_usage_so_far": False, "verifies": False}
    answer = ChatAnswer(codec, "m", 1, 64, (), **options)
    for row in range(64):
        for place in range(20):
            finished = LENGTH if place == 19 else None
            answer.take(Told(row, Event(row, 97, StepKind.REFRESH, -0.5, tops, finished=finished)))
    codec.token_bytes(97)  # which keeps what it has found out about the tokenizer
    tracemalloc.start()
    parts = [part.encode() for part in answer.whole()]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found = json.loads(b"".join(parts))
    assert [len(choice["logprobs"]["content"]) for choice in found["choices"]] == [20] * 64
    assert list(found) == ["id", "created", "model", "object", "choices", "usage"]
    assert most < 2 * sum(map(len, parts))


def test_of_tokens_with_one_text_the_likeliest_is_told() -> None:
    tokenizer = Tokenizer(models.WordLevel({"x": 0, "y": 1, "Y": 2}, unk_token="x"))
    tokenizer.decoder = decoders.Replace("Y", "y")
    options: Any = {"logprobs": True, "includes_usage": False, "includes_usage_so_far": False, "verifies": False}
    answer = CompletionAnswer(TextCodec(tokenizer, {}, None), "m", 1, 1, (), **options)
    answer.take(Told(0, Event(0, 1, StepKind.REFRESH, -0.5, ((1, -0.5), (0, -1.5), (2, -4.0)), finished=LENGTH)))
    assert read(answer)["choices"][0]["logprobs"]["top_logprobs"] == [{"y": -0.5, "x": -1.5}]


def test_a_row_that_fails_behind_a_stop_string_has_its_answer() -> None:
    """It is given up there, and one tick may still run."""
    codec = byte_fallback()
    options: Any = {"logprobs": False, "includes_usage": False, "includes_usage_so_far": False, "verifies": False}
    events = [Event(0, int(token), StepKind.REFRESH) for token in codec.encode("ab")]
    events.append(Event(0, None, StepKind.REFRESH, finished=FAILED, error=ValueError()))
    whole = CompletionAnswer(codec, "m", 1, 1, ("b",), **options)
    for event in events:
        whole.take(Told(0, event))
    assert whole.is_over
    (choice,) = read(whole)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("a", "stop")
    stream = CompletionAnswer(codec, "m", 1, 1, ("b",), **options)
    chunks = [chunk["choices"][0] for event in events for chunk in stream.chunks(Told(0, event))]
    assert ("".join(chunk["text"] for chunk in chunks), chunks[-1]["finish_reason"]) == ("a", "stop")
    with pytest.raises(ApiError, match="could not be computed"):
        CompletionAnswer(codec, "m", 1, 1, ("c",), **options).take(Told(0, events[-1]))


def _of_bytes(*marks: AddedToken) -> TextCodec:
    """A token for each byte, and the marks."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(marks))
    tokenizer.add_special_tokens(["<|end|>"])
    return TextCodec(tokenizer, {}, None)


@pytest.mark.parametrize(
    ("style", "text", "template"),
    [
        (
            THINK,
            '<think>\nSo.\n</think>\n\nOh\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
            "<tool_call>",
        ),
        (
            CHANNELS,
            "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>Oh",
            "functions.<|channel|>commentary<|message|>",
        ),
        (
            CHANNELS,
            "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>commentary<|message|>Oh<|end|><|start|>"
            "assistant to=functions.now<|channel|>commentary json<|message|>{}",
            "functions.<|channel|>commentary<|message|>",
        ),
    ],
    ids=["think", "channels", "channels-call"],
)
def test_reasoning_stands_apart(style: ReasoningStyle, text: str, template: str) -> None:
    """From the answer, from calls behind it, and in the usage."""
    codec = _of_bytes(*(AddedToken(mark, special=True) for mark in style.marks if mark != "<|end|>"))
    ids = codec.encode(text).tolist()
    options: Any = {"logprobs": False, "includes_usage": True, "includes_usage_so_far": False, "verifies": False}
    events = [Event(0, token, StepKind.REFRESH) for token in ids]
    events.append(Event(0, None, StepKind.REFRESH, finished=STOP))
    for stream in (False, True):
        calls = Tools([{"type": "function", "function": {"name": "now"}}]).calls(template)
        answer = ChatAnswer(codec, "m", 1, 1, (), calls=calls, thoughts=Thoughts(style), **options)
        if stream:
            chunks = [chunk["choices"][0]["delta"] for event in events for chunk in answer.chunks(Told(0, event))]
            found = {
                name: "".join(chunk.get(name, "") for chunk in chunks) for name in ("reasoning_content", "content")
            }
            called = any("tool_calls" in chunk for chunk in chunks)
            assert all("content" not in chunk for chunk in chunks if "reasoning_content" in chunk)
        else:
            for event in events:
                answer.take(Told(0, event))
            found = read(answer)["choices"][0]["message"]
            called = "tool_calls" in found
        assert (found["reasoning_content"], found["content"]) == ("So.", "Oh")
        assert called == ("tool_call" in text or "to=" in text)
        (details,) = [answer.usage()["completion_tokens_details"]]
        assert 3 <= details["reasoning_tokens"] <= 5 + len(style.marks)
        assert answer.usage()["completion_tokens"] == len(ids)


@pytest.mark.parametrize("special", [False, True])
def test_a_call_is_found_between_marks_that_are_special_tokens(special: bool) -> None:
    """As some models with calls in Hermes's style have them; other special tokens are no text."""
    codec = _of_bytes(*(AddedToken(mark, special=special) for mark in ("<tool_call>", "</tool_call>")))
    ids = codec.encode('Oh<|end|>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|end|>').tolist()
    options: Any = {"logprobs": False, "includes_usage": False, "includes_usage_so_far": False, "verifies": False}
    for stream in (False, True):
        calls = Tools([{"type": "function", "function": {"name": "now"}}]).calls("<tool_call>")
        answer = ChatAnswer(codec, "m", 1, 1, (), calls=calls, **options)
        events = [Event(0, token, StepKind.REFRESH) for token in ids]
        events.append(Event(0, None, StepKind.REFRESH, finished=STOP))
        if stream:
            chunks = [chunk["choices"][0] for event in events for chunk in answer.chunks(Told(0, event))]
            assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == "Oh"
            told = [call["function"] for chunk in chunks for call in chunk["delta"].get("tool_calls", ())]
            assert told == [{"name": "now", "arguments": ""}, {"arguments": "{}"}]
            assert chunks[-1]["finish_reason"] == "tool_calls"
        else:
            for event in events:
                answer.take(Told(0, event))
            choice = read(answer)["choices"][0]
            assert choice["message"]["content"] == "Oh"
            (call,) = choice["message"]["tool_calls"]
            assert call["function"] == {"name": "now", "arguments": "{}"}
            assert choice["finish_reason"] == "tool_calls"
