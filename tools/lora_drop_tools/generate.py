"""`lora-drop generate` and `lora-drop chat`: text in, text out, as it is made.

Enters: a bundle and prompts. Leaves: text, printed as it comes. Token ids are the session's business.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.decoding.sampling import SamplingOptions
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.text import TextCodec


@dataclass
class Completion:
    """One prompt's result. `seconds` counts from the prefill on; the rest is what the session says at the end."""

    text: str
    tokens: int
    seconds: float
    kv_bytes: dict[str, int]
    engine_notes: list[str]


def _questions() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _stream(
    session: Session,
    codec: TextCodec,
    ids: npt.NDArray[np.int64],
    max_new_tokens: int,
    sampling: SamplingOptions | None,
    stop: Sequence[str],
    out: TextIO,
) -> Completion:
    """Print one completion as it is made; Ctrl-C ends it early and keeps what is there."""
    pieces = codec.stream(stop)
    text, tokens = [], 0
    begin = time.perf_counter()

    def emit(piece: str) -> None:
        text.append(piece)
        out.write(piece)
        out.flush()

    stream = session.stream(ids, max_new_tokens, sampling=sampling)
    try:
        for token in stream:
            tokens += 1
            emit(pieces.push(token))
            if pieces.stopped:
                break
    except KeyboardInterrupt:
        pass
    finally:
        stream.close()
    emit(pieces.finish())
    out.write("\n")
    return Completion("".join(text), tokens, time.perf_counter() - begin, session.kv_bytes(), session.engine_notes())


def chat(
    bundle: str | Path,
    *,
    system: str | None = None,
    k: int | None = None,
    policy: str | None = None,
    max_new_tokens: int = 256,
    sampling: SamplingOptions | None = None,
    stop: Sequence[str] = (),
    target: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
) -> None:
    """Talk to a model on the terminal. Ctrl-C ends a reply, end of input ends the chat."""
    with Session.open(bundle, k=k, policy=policy, target=target, provider=provider, threads=threads) as session:
        codec = TextCodec.open(session.bundle.root / "tokenizer")
        messages = [{"role": "system", "content": system}] if system else []
        for line in _questions():
            messages.append({"role": "user", "content": line})
            room = session.bundle.manifest.limits.max_seq_len - len(ids := codec.encode_chat(messages))
            if room < 1:
                raise InputError(
                    "The conversation is longer than the bundle allows.",
                    note=f"It has {len(ids)} tokens, the bundle allows {session.bundle.manifest.limits.max_seq_len}.",
                    hint="Start a new chat, or export with a larger --max-seq-len.",
                )
            reply = _stream(session, codec, ids, min(max_new_tokens, room), sampling, stop, sys.stdout)
            messages.append({"role": "assistant", "content": reply.text})


def generate(
    bundle: str | Path,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    k: int | None = None,
    policy: str | None = None,
    max_new_tokens: int = 64,
    sampling: SamplingOptions | None = None,
    stop: Sequence[str] = (),
    target: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    out: TextIO | None = None,
) -> list[Completion]:
    """Continue prompts; a single one is streamed to `out` (standard output) as it is made, several run as a batch.

    Args:
        prompts: texts; with `chat`, user messages put into the model's chat template.
        stop: strings that end a text, themselves left out.

    Raises:
        InputError, BundleError: what cannot be served.
    """
    out = out or sys.stdout
    with Session.open(bundle, k=k, policy=policy, target=target, provider=provider, threads=threads) as session:
        codec = TextCodec.open(session.bundle.root / "tokenizer")
        if not prompts:
            raise InputError(
                "There is no prompt.",
                note="None was given, at least one is needed.",
                hint='Give one with --prompt "…" or --prompt-file FILE.',
            )
        encoded = [
            codec.encode_chat([{"role": "user", "content": prompt}]) if chat else codec.encode(prompt)
            for prompt in prompts
        ]
        if len(encoded) == 1:
            return [_stream(session, codec, encoded[0], max_new_tokens, sampling, stop, out)]
        begin = time.perf_counter()
        rows = session.generate(encoded, max_new_tokens, sampling=sampling)
        seconds = time.perf_counter() - begin
        completions = []
        for prompt, row in zip(prompts, rows, strict=True):
            pieces = codec.stream(stop)
            text = "".join(pieces.push(int(token)) for token in row) + pieces.finish()
            completions.append(Completion(text, len(row), seconds, session.kv_bytes(), session.engine_notes()))
            print(f"── {prompt}\n{text}", file=out, flush=True)
        return completions
