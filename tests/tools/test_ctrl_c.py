"""Ctrl-C ends a command with 130 and a reply of `chat` with nothing but the reply."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.text import TextCodec
from lora_drop_tools.cli import main

from tests.support.bundles import make_bundle, record_again
from tests.support.tokenizers import character_tokenizer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_bundle("llama", tmp_path_factory.mktemp("bundle") / "b").root
    character_tokenizer(root)
    (root / "tokenizer/chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    record_again(root)
    return root


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after two tokens of every request."""
    genuine = Session.stream

    def stream(self: Session, *given: object, **options: object) -> Iterator[int]:
        tokens = genuine(self, *given, **options)  # type: ignore[arg-type]
        try:
            yield next(tokens)
            yield next(tokens)
            raise KeyboardInterrupt
        finally:
            tokens.close()  # type: ignore[attr-defined]

    monkeypatch.setattr(Session, "stream", stream)


@pytest.mark.usefixtures("interrupted")
def test_generate(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(bundle), "--prompt", "ab", "--max-new-tokens", "9", "--threads", "1"]) == 130
    said = capsys.readouterr()
    assert said.out.endswith("\n")
    assert len(said.out) >= 1
    assert said.err.endswith("interrupted\n")
    assert "Traceback" not in said.err


@pytest.mark.usefixtures("interrupted")
def test_a_reply_of_chat(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\ncd\n"))
    assert main(["chat", str(bundle), "--threads", "1"]) == 0
    assert "interrupted" not in capsys.readouterr().err


def test_a_question_of_chat_whose_reply_has_not_begun(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is dropped, and the chat goes on as if it had not been asked."""
    genuine, asked = TextCodec.encode_chat, list[list[str]]()

    def encode_chat(self: TextCodec, messages: Sequence[dict[str, Any]], **options: Any) -> npt.NDArray[np.int64]:
        asked.append([message["content"] for message in messages if message["role"] == "user"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return genuine(self, messages, **options)

    monkeypatch.setattr(TextCodec, "encode_chat", encode_chat)
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\ncd\nef\n"))
    assert main(["chat", str(bundle), "--threads", "1", "--max-new-tokens", "3"]) == 0
    assert asked == [["ab"], ["ab", "cd"], ["ab", "ef"]]
    said = capsys.readouterr()
    assert said.out.endswith("\n")
    assert "interrupted" not in said.err


@pytest.mark.parametrize(("key", "code"), [(KeyboardInterrupt, 130), (EOFError, 0)], ids=["Ctrl-C", "Ctrl-D"])
def test_chat_between_replies(
    key: type[BaseException],
    code: int,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What comes next, such as the shell's prompt, begins a line."""

    def pressed(prompt: str) -> str:
        print(prompt, end="")
        raise key

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", pressed)
    assert main(["chat", str(bundle), "--threads", "1"]) == code
    assert capsys.readouterr().out == "> \n"


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize(
    ("question", "error"),
    [
        ("a b " * 2000, "The conversation is longer than the bundle allows."),
        ("Caf\udce9", "Question 2 is not UTF-8.\nNote: '\\udce9' stands at place 3."),
    ],
    ids=["too long", "not UTF-8"],
)
def test_a_question_that_cannot_be_asked(
    question: str,
    error: str,
    typed: bool,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Who types loses that question alone; a pipe ends there with the error."""
    questions = ["ab", question, "cd"]
    if typed:
        lines = iter(questions)

        def asked(prompt: str) -> str:
            try:
                return next(lines)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        monkeypatch.setattr("builtins.input", asked)
    else:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(questions)))
    assert main(["chat", str(bundle), "--threads", "1", "--max-new-tokens", "3"]) == (0 if typed else 2)
    said = capsys.readouterr()
    assert error in said.err
    assert said.out.count("\n") >= (2 if typed else 1)


def test_bytes_that_are_no_text_lose_who_types_that_question_alone(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In most locales Python reads strictly."""
    lines = iter([b"ab", b"Gr\xfc\xdfe", b"cd"])

    def asked(prompt: str) -> str:
        try:
            return next(lines).decode()
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", asked)
    assert main(["chat", str(bundle), "--threads", "1", "--max-new-tokens", "3"]) == 0
    said = capsys.readouterr()
    assert said.err.count("What was typed is not UTF-8.\nNote: It holds the byte 0xfc.\n") == 1
    assert said.out.count("\n") >= 2


def test_bytes_that_are_no_text_end_a_pipe(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Gr\xfc\xdfe\ncd\n"), encoding="utf-8"))
    assert main(["chat", str(bundle), "--threads", "1", "--max-new-tokens", "3"]) == 2
    assert "What was typed is not UTF-8." in capsys.readouterr().err
