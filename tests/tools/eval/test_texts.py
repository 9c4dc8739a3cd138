"""Texts through a running batch: those that each prompt alone would get, whatever runs beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lora_drop_runtime.decoding.batch import Batch
from lora_drop_runtime.decoding.sampling import SamplingOptions
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.text import TextCodec
from lora_drop_tools.eval.texts import Wish, Writer

PROMPTS = ("The tide", "a", "12 boats and", "Gulls follow the boats into the harbour; nets", "Rope", "x y")


@pytest.fixture(scope="module")
def codec(bundle: Path) -> TextCodec:
    return TextCodec.open(bundle / "tokenizer")


@pytest.fixture
def writer(bundle: Path, codec: TextCodec) -> Iterator[Writer]:
    with Writer(bundle, codec, "skip", threads=1) as opened:
        yield opened


def write(writer: Writer, wishes: list[Wish], k: int, slots: int) -> list[str]:
    texts: dict[int, str] = {}
    writer.write(wishes, k, slots, lambda index, text: texts.update({index: text}))
    assert len(texts) == len(wishes)
    return [texts[index] for index in range(len(wishes))]


@pytest.mark.parametrize("policy", ["skip", "backfill", "lossless"])
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("slots", [1, 2, 6])
def test_texts_are_those_of_a_prompt_alone(bundle: Path, codec: TextCodec, policy: str, k: int, slots: int) -> None:
    """Rows of other lengths come and go; each text is what a session of its own writes."""
    lengths = (3, 20, 9, 14, 1, 30)
    wishes = [Wish(codec.encode(text), count) for text, count in zip(PROMPTS, lengths, strict=True)]
    with Session.open(bundle, policy=policy, threads=1) as session:
        alone = [codec.decode(session.generate([wish.ids], wish.max_new_tokens, k=k)[0]) for wish in wishes]
    with Writer(bundle, codec, policy, threads=1) as writer:
        assert write(writer, wishes, k, slots) == alone


def test_drawn_texts_are_those_of_a_prompt_alone(bundle: Path, codec: TextCodec, writer: Writer) -> None:
    samplings = [SamplingOptions(temperature=0.9, top_p=0.9, seed=seed) for seed in range(len(PROMPTS))]
    wishes = [
        Wish(codec.encode(text), 15, sampling=sampling) for text, sampling in zip(PROMPTS, samplings, strict=True)
    ]
    with Session.open(bundle, policy="skip", threads=1) as session:
        alone = [
            codec.decode(session.generate([wish.ids], 15, k=2, sampling=sampling)[0])
            for wish, sampling in zip(wishes, samplings, strict=True)
        ]
    assert write(writer, wishes, 2, 3) == alone
    assert len(set(alone)) == len(alone)


def test_texts_end_at_stop_strings(bundle: Path, codec: TextCodec, writer: Writer) -> None:
    prompts = [codec.encode(text) for text in PROMPTS[:3]]
    plain = write(writer, [Wish(prompt, 12) for prompt in prompts], 1, 3)
    stop = plain[0][4:6]
    cut = write(writer, [Wish(prompt, 12, (stop,)) for prompt in prompts], 1, 3)
    assert cut == [text.split(stop)[0] for text in plain]


def test_a_batch_is_kept_and_grows_with_what_it_is_given(
    codec: TextCodec, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[int, int, int]] = []
    plain = Batch.open

    def count(path: Path, **options: int) -> Batch:
        opened.append((options["max_seq_len"], options["k"], options["slots"]))
        return plain(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Batch, "open", count)
    for new_tokens in (10, 4, 20):
        write(writer, [Wish(codec.encode("boat"), new_tokens)], 1, 1)
    assert opened == [(14, 1, 1), (24, 1, 1)]
    write(writer, [Wish(codec.encode("boat"), 20)], 3, 1)  # which needs less room in dropped layers
    write(writer, [], 0, 8)
    assert len(opened) == 2
    write(writer, [Wish(codec.encode("boat"), 20)] * 2, 0, 2)
    assert opened[2:] == [(24, 0, 2)]


def test_rows_join_when_others_end(codec: TextCodec, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight short texts beside a long one, in two slots: as many ticks as the longest takes, and few more."""
    ticks = 0
    plain = Batch.tick

    def count(batch: Batch) -> list[object]:
        nonlocal ticks
        ticks += 1
        return plain(batch)  # type: ignore[return-value]

    monkeypatch.setattr(Batch, "tick", count)
    wishes = [Wish(codec.encode("The boat"), count) for count in (40, *[4] * 8)]
    write(writer, wishes, 0, 2)
    assert 40 <= ticks <= 52
