"""`lora-drop generate`: seeds, and `--policy lossless`, `--draft` and `--k auto`: the same text, what is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding import drafter
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.text import TextCodec
from lora_drop_tools.cli import main

from lora_drop_export.check.verify import compare
from tests.support.bundles import make_bundle
from tests.support.tokenizers import character_tokenizer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_bundle("llama", tmp_path_factory.mktemp("drafts") / "bundle", drop_ratio=0.5).root
    character_tokenizer(root)
    return root


@pytest.mark.filterwarnings("error")
def test_the_text_is_the_full_schedules_and_what_was_counted_is_printed(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*options: str) -> tuple[str, str]:
        arguments = ["generate", str(bundle), "--prompt", "abcabcab", "--max-new-tokens", "24", "--threads", "1"]
        assert main([*arguments, *options]) == 0
        printed = capsys.readouterr()
        return printed.out, printed.err

    whole, counted = run("--k", "0")
    assert "tokens per refresh" not in counted
    for options in (("--draft", "lora"), ("--draft", "ngram", "--k", "5"), ("--draft", "both"), ("--k", "auto")):
        text, counted = run("--policy", "lossless", *options)
        assert text == whole
        assert "tokens per refresh" in counted
        *_, lengths = counted.split("refreshes by accepted drafts: ")
        assert all(int(part.split(": ")[1]) for part in lengths.splitlines()[0].split(", "))  # those that there were
    assert run("--policy", "lossless", "--lenience", "1")[0] == whole


def test_lenience_is_the_sessions(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafter, "CONFIDENCE", 0.0)  # a random model has less
    ids = TextCodec.open(bundle / "tokenizer").encode("abcabcab")
    with Session.open(bundle, policy="lossless", k=3, lenience=1e-6, threads=1) as session:
        wanted = TextCodec.open(bundle / "tokenizer").decode(session.generate(ids, 24)[0])
    for lenience, same in (("1e-6", True), ("1", False)):
        options = ["--policy", "lossless", "--k", "3", "--lenience", lenience, "--threads", "1"]
        assert main(["generate", str(bundle), "--prompt", "abcabcab", "--max-new-tokens", "24", *options]) == 0
        assert (capsys.readouterr().out == f"{wanted}\n") == same


def test_a_seed_makes_sampling_repeatable(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sampled(seed: int) -> str:
        options = ["--max-new-tokens", "12", "--temperature", "0.9", "--top-p", "0.9", "--seed", str(seed)]
        assert main(["generate", str(bundle), "--prompt", "abc", "--threads", "1", *options]) == 0
        return capsys.readouterr().out

    first, *others = map(sampled, (1, 1, 2))
    assert others[0] == first != others[1]


def test_the_steps_of_such_a_bundle_are_compared_one_by_one(bundle: Path) -> None:
    """LoRA steps among them, which single steps under the policy itself have none of."""
    result = compare(Bundle.open(bundle), policy="lossless", k=2)
    assert result.passed
    assert {step.kind for step in result.steps} == {"prefill", "lora", "refresh"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--draft ngram", ("The policy has no drafts", "'ngram'", "'skip'")),
        ("--k auto", ("k cannot be chosen by itself", "'auto'", "'skip'", "Use --policy lossless")),
        ("--policy backfill --draft both", ("--draft would change nothing", "both", "backfill")),
        ("--policy lossless --draft both --k 0", ("--policy would change nothing",)),
        ("--policy lossless --draft text", ("--draft", "'text'")),
        ("--lenience 0.5", ("The policy has no drafts", "0.5", "'skip'", "lossless")),
        ("--policy backfill --lenience 0.5", ("--lenience would change nothing", "0.5", "backfill")),
        ("--policy lossless --lenience 0.5 --k 0", ("--policy would change nothing",)),
        ("--policy lossless --lenience 0", ("--lenience is too small", "above 0")),
        ("--policy lossless --lenience 1.5", ("--lenience is too large", "1.5")),
    ],
)
def test_what_would_change_nothing_is_refused(
    bundle: Path, capsys: pytest.CaptureFixture[str], options: str, words: tuple[str, ...]
) -> None:
    assert main(["generate", str(bundle), "--prompt", "abc", *options.split(" ")]) == 2
    error = capsys.readouterr().err
    for word in (*words, "Note: ", "Hint: "):
        assert word in error
