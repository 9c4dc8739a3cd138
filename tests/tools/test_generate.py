"""What `lora-drop generate` and `lora-drop chat` write."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import pytest
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.reasoning import CHANNELS, Thoughts
from lora_drop_runtime.text import TextCodec
from lora_drop_tools.cli import _prompts
from lora_drop_tools.generate import ChatSettings, GenerateSettings, _Answer, _questions, chat, generate

from tests.support.bundles import record_again
from tests.support.serving import word_bundle
from tests.support.tokenizers import character_tokenizer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("prompts", [["t1"], ["t1", "t2"]], ids=["streamed", "batch"])
def test_a_terminal_does_not_obey_a_model(prompts: list[str], tmp_path: Path) -> None:
    """A title, a colour, the clipboard: a pipe gets them as they are."""
    root = word_bundle(tmp_path / "bundle").root
    file = root / "tokenizer" / "tokenizer.json"
    decoder = {"type": "Replace", "pattern": {"String": "t"}, "content": "\x1b]0;title\x07\x9b31m\t\n"}
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"decoder": decoder}), encoding="utf-8")
    record_again(root)
    written = []
    for out in (io.StringIO(), Terminal()):
        generate(root, prompts, GenerateSettings(max_new_tokens=2, threads=1), out=out)
        written.append(out.getvalue())
    assert "\x1b]0;title\x07\x9b31m\t\n" in written[0]
    assert "\\x1b]0;title\\x07\\x9b31m\t\n" in written[1]
    assert not set("\x1b\x07\x9b") & set(written[1])


def test_a_byte_order_mark_is_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("\ufefft1 t2", encoding="utf-8")
    assert _prompts(argparse.Namespace(prompt=None, prompt_file=[file])) == ["t1 t2"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufefft1 t2"))
    assert _prompts(argparse.Namespace(prompt=None, prompt_file=[Path("-")])) == ["t1 t2"]


def test_questions_of_a_windows_editor_are_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    written = "\ufefft1 t2\r\n\r\nt3\r\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(written), encoding="utf-8", newline="\n"))
    assert list(_questions()) == ["t1 t2", "t3"]


def test_questions_in_utf_16_without_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"t1\n\0"), encoding="utf-16"))
    with pytest.raises(InputError, match="not UTF-8"):
        list(_questions())


def test_a_chat_without_a_template_asks_for_no_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = word_bundle(tmp_path / "bundle")
    (bundle.root / "tokenizer" / "chat_template.jinja").unlink(missing_ok=True)
    record_again(bundle.root)
    monkeypatch.setattr("sys.stdin", Terminal("t1\n"))
    with pytest.raises(InputError, match="no chat template") as refused:
        chat(bundle.root, ChatSettings(threads=1))
    assert "lora-drop generate" in str(refused.value)


def test_reasoning_amid_an_answer_is_marked_on_its_own(tmp_path: Path) -> None:
    """GPT-OSS may reason again after it has said something."""
    character_tokenizer(tmp_path)
    codec = TextCodec.open(tmp_path / "tokenizer")
    parts = [("analysis", "a"), ("commentary", "b"), ("analysis", "c"), ("analysis", "d"), ("final", "e")]
    text = "<|end|><|start|>assistant".join(f"<|channel|>{channel}<|message|>{said}" for channel, said in parts)
    answer = _Answer(codec, (), Thoughts(CHANNELS))
    printed = "".join(answer.push(token) for token in codec.encode(text).tolist()) + answer.finish()
    assert printed == "<think>\na\n</think>\n\nb\n<think>\nc\nd\n</think>\n\ne"
    assert (answer.reasoning, answer.text) == ("a\nc\nd", "b\ne")


def test_reasoning_is_told_from_the_answer(tmp_path: Path) -> None:
    """Of a template that begins it; it ends with a token of the tiny model's own, renamed to the mark."""
    root = word_bundle(tmp_path / "bundle", "{{ messages[-1].content.split('</think>')[-1] }} <think>").root
    file = root / "tokenizer" / "tokenizer.json"
    made = json.loads(file.read_text(encoding="utf-8"))

    def renamed(**names: str) -> None:
        vocabulary = {names.get(word, word): number for word, number in made["model"]["vocab"].items()}
        file.write_text(json.dumps(made | {"model": made["model"] | {"vocab": vocabulary}}), encoding="utf-8")
        record_again(root)

    settings, out = GenerateSettings(max_new_tokens=8, threads=1), io.StringIO()
    renamed(t130="<think>")
    (whole,) = generate(root, ["t1 t2"], settings, chat=True, out=out)
    words = whole.reasoning.split()
    assert (whole.text, len(words)) == ("", 8)
    assert out.getvalue() == f"<think>\n{whole.reasoning}\n"
    place = next(n for n in range(2, 6) if words.index(words[n]) == n and words[n] != "t1")
    renamed(t130="<think>", **{words[place]: "</think>"})
    for prompts in (["t1 t2"], ["t1 t2", "t1 t2"]):
        out = io.StringIO()
        for found in generate(root, prompts, settings, chat=True, out=out):
            assert found.reasoning.split() == words[:place]
            assert found.text.split()[: 7 - place] == [
                word if word != words[place] else "</think>" for word in words[place + 1 :]
            ]
        assert f"<think>\n{found.reasoning}\n</think>\n\n{found.text}" in out.getvalue()
