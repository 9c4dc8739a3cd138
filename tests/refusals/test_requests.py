"""Refused by `lora-drop` and through Python: requests."""

from __future__ import annotations

import re
from collections.abc import Callable

import lora_drop_tools.cli
import pytest
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError

from tests.support.models import SIZES


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "t1 " * 9], ("prompt is longer", "9 tokens", "allows 8")),
        (["--prompt", "t1 " * 8, "--max-new-tokens", "25"], ("8 + 25 tokens", "allows 32")),
        (["--prompt", "t1", "--prompt", "t1 " * 9], ("prompt is longer", "9 tokens", "allows 8")),
        (["--prompt", ""], ("empty",)),
        (["--prompt", "t1", "--prompt", " "], ("empty",)),
        ([], ("no prompt", "--prompt")),
        (["--prompt", "a", "--prompt", "b", "--prompt", "c"], ("batch", "3 rows", "allows 2")),
        (["--prompt", "t1", "--max-new-tokens", "0"], ("--max-new-tokens is too small", "It is 0")),
        (["--prompt", "t1", "--max-new-tokens", "many"], ("--max-new-tokens", "many")),
        (["--prompt", "t1", "--k", "-1"], ("k", "-1")),
        (["--prompt", "t1", "--policy", "backfil"], ("--policy", "backfil", "skip")),
        (["--prompt", "t1", "--threads", "0"], ("threads", "0")),
        (["--prompt", "t1", "--target", "metal"], ("metal", "ort")),
        (["--prompt", "t1", "--target", "tensorrt"], ("tensorrt", "ort")),
        (["--prompt", "t1", "--provider", "cuda"], ("provider", "cuda", "cpu")),
        (["--prompt", "t1", "--provider", "abacus"], ("provider", "abacus", "cpu")),
        (["--prompt", "t1", "--temperature", "-1"], ("temperature", "-1")),
        (["--prompt", "t1", "--temperature", "nan"], ("temperature", "nan")),
        (["--prompt", "t1", "--top-k", "-1"], ("--top-k is too small", "-1")),
        (["--prompt", "t1", "--top-p", "0"], ("--top-p is too small", "0.0")),
        (["--prompt", "t1", "--top-p", "1.5"], ("--top-p is too large", "1.5")),
        (["--prompt", "t1", "--repetition-penalty", "0"], ("--repetition-penalty is too small", "0.0")),
        (["--prompt", "t1", "--temperature", "1", "--min-p", "1.5"], ("--min-p is too large", "1.5")),
        (["--prompt", "t1", "--presence-penalty", "-2.5"], ("--presence-penalty is too small", "-2.5")),
        (["--prompt", "t1", "--frequency-penalty", "inf"], ("--frequency-penalty is too large", "inf")),
        (["--prompt", "t1", "--seed", "-7"], ("seed", "-7")),
        (["--prompt", "t1", "--stop", ""], ("--stop is empty",)),
        (["--prompt", "t1", "--chat"], ("chat template",)),
        (["--prompt-file", "/no/such/file"], ("prompt file", "/no/such/file")),
    ],
)  # fmt: skip
def test_generate(refused, place, arguments, words):
    refused(lora_drop_tools.cli.main, "generate", place / "bundle", *arguments, words=words)


def test_prompt_file_is_not_text(refused, place, tmp_path):
    (tmp_path / "prompt.bin").write_bytes(b"t1 \xff\xfe t2")
    arguments = ("--prompt-file", tmp_path / "prompt.bin")
    refused(lora_drop_tools.cli.main, "generate", place / "bundle", *arguments, words=("prompt.bin", "UTF-8"))


@pytest.mark.parametrize("command", ["chat", "compare", "inspect"])
def test_other_commands(refused, place, tmp_path, command):
    run = lora_drop_tools.cli.main
    refused(run, command, words=("BUNDLE",))
    refused(run, command, place / "bundle", "--no-such-option", words=("--no-such-option",))
    if command != "inspect":
        for option, value in (("--target", "metal"), ("--target", "tensorrt"), ("--provider", "cuda"), ("--k", "-1")):
            refused(run, command, place / "bundle", option, value, words=(value,))
    if command == "compare":
        refused(run, command, place / "bundle", "--json", tmp_path / "no" / "dir.json", words=("dir.json",))


def test_no_command(refused):
    refused(lora_drop_tools.cli.main, words=("COMMAND",))
    refused(lora_drop_tools.cli.main, "gnerate", words=("gnerate",))


def test_requests_through_python(place):
    """What the command line cannot ask for."""
    vocab_size = SIZES["vocab_size"]
    with Session.open(place / "bundle") as session:

        def refuse(words: str, call: Callable[[], object]) -> None:
            with pytest.raises(InputError, match=words) as caught:
                call()
            assert re.fullmatch(r".+\nNote: .+\nHint: .+", str(caught.value))

        refuse("no running request", lambda: session.step([1]))
        refuse("no running request", lambda: session.next_step)
        for wrong in (vocab_size, vocab_size + 1000, -1):
            refuse(f"outside the vocabulary[^$]*{wrong}", lambda w=wrong: session.generate([[5, w]], 2))
            refuse(f"outside the vocabulary[^$]*{wrong}", lambda w=wrong: session.prefill([[w, 5]]))
            refuse(f"outside the vocabulary[^$]*{wrong}", lambda w=wrong: list(session.stream([w], 2)))
        for empty in ([], [[]], [[5], []]):
            refuse("empty", lambda e=empty: session.generate(e, 2))
        refuse("empty", lambda: list(session.stream([], 2)))
        refuse("empty", lambda: session.prefill([[1, 2], [3, 4]], [2, 0]))
        refuse("lengths do not fit", lambda: session.prefill([[1, 2], [3, 4]], [2, 3]))
        refuse("lengths do not fit", lambda: session.prefill([[1, 2], [3, 4]], [2]))
        refuse("batch is larger", lambda: session.generate([[1], [2], [3]], 2))
        refuse("longer than the bundle allows", lambda: session.generate([[1] * 9], 2))
        refuse("longer than the bundle allows", lambda: session.prefill([[1] * 8], max_new_tokens=25))
        session.prefill([[1, 2], [3, 4]], max_new_tokens=3)
        for batch in ([1], [1, 2, 3], [[1, 2]]):
            refuse("another batch", lambda b=batch: session.step(b))
        refuse("outside the vocabulary", lambda: session.step([1, vocab_size]))
        for _ in range(2):
            session.step([1, 2])
        refuse("caches are full", lambda: session.step([1, 2]))
        assert session.generate([[1] * 8], 24)[0].shape == (24,)  # refusals leave the session usable
