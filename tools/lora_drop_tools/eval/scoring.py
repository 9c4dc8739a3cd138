"""Quality step by step: what a session's logits say of given tokens. What it writes itself is texts.py's.

Enters: a session, token ids. Leaves: log-probabilities of the tokens that were fed, sums over the windows of a text.
Knows nothing of tasks, files and bundles; needs numpy alone.

**Scoring under a schedule.** A schedule decides over decode steps, so what is scored is decoded: a row is prefilled up
to its `prompt`, every further token is fed by one `Session.step`, and a token's log-probability is read from the logits
of the step before it. Scored in one prefill, every schedule would give exactly the full model's figures.

A request begins with exact caches and the schedule's first step, and continuations are short. To see them as a long
request would, at any place of the cycle, the last c tokens of the given context are decoded too: c = ⌊u·(k+1)⌋ is
uniform in 0 … k, at least one token stays in the prefill, and u is drawn once for each item, the same for all k. With
c = 0 the first scored token comes from the prefill, which is exact for every k.

The *offset* of a step is how many LoRA steps there were since the last refresh, itself counted: 0 is a refresh, 1 … k
are the LoRA steps after it. Under the periodic schedule it is the step's number mod (k+1).

An adaptive schedule refreshes a batch as soon as one row is unsure, so what it does to a row depends on the others. To
score it as it is for one row, rows are decoded one by one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.plan.schedule import AdaptiveSchedule, StepKind

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]
WindowK = int | AdaptiveSchedule  # k of the periodic schedule, or another schedule
KEPT_BYTES = 2**30  # of the full schedule's log-probabilities, kept for one batch of windows
COLUMNS = ("tokens", "nll", "nll_full", "agree", "kl")  # of a window's sums, a row for each offset


@dataclass(frozen=True)
class Row:
    """Tokens to decode, ids [T]: the first `prompt` of them in the prefill, and the rest one by one.

    Logits are read from position `first` on; those at position p are of token p + 1, so the last are at T − 2.
    """

    ids: Ids
    prompt: int
    first: int

    @property
    def steps(self) -> int:
        return len(self.ids) - 1 - self.prompt


@dataclass(frozen=True)
class Read:
    """What one run of a batch says: `rows` [R] of it are read at `positions` [R]; `log_probs` [R, V]."""

    offset: int
    rows: Ids
    positions: Ids
    targets: Ids
    log_probs: Floats

    @property
    def target_log_probs(self) -> Floats:
        picked: Floats = np.take_along_axis(self.log_probs, self.targets[:, None], 1)[:, 0]
        return picked


@dataclass(frozen=True)
class Score:
    """Of a continuation: the sum of its tokens' log-probabilities, and whether each was the likeliest."""

    log_prob: float
    greedy: bool


def longest(k: WindowK) -> int:
    """The most LoRA steps between two refreshes."""
    return k if isinstance(k, int) else k.k


def prompt_length(context: int, phase: float, k: int) -> int:
    """How many of `context` given tokens are prefilled, for u = `phase` in [0, 1)."""
    return context - min(int(phase * (k + 1)), context - 1)


def phase_of(seed: int, *item: str | int) -> float:
    """An item's u in [0, 1): the same for every k."""
    name = hashlib.sha256(" ".join(map(str, (seed, *item))).encode()).digest()
    return int.from_bytes(name[:6], "big") / 2**48


def _check_numbers(values: npt.NDArray[np.floating]) -> None:
    if not np.isfinite(values).all():
        raise BundleError(
            "The model computed logits that are not numbers.",
            note="There is NaN or infinity among them.",
            hint="Check the bundle with: lora-drop inspect --check; or export it with a wider --dtype.",
        )


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities [R, V] of logits [R, V]; the sum over the vocabulary is taken in float64.

    Raises:
        BundleError: a row's logits are not numbers.
    """
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64))
    _check_numbers(total)
    log_probs: Floats = (shifted - total).astype(np.float32)
    return log_probs


def _by_prompt(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of the rows that have each prompt, in the order of the prompts; those with most steps first.

    Rows share no prompt of one token, since those of a prompt run one after the other: whole texts begin alike.
    """
    found: dict[bytes | int, list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(row.ids[: row.prompt].tobytes() if row.prompt > 1 else index, []).append(index)
    return [sorted(indices, key=lambda i: -rows[i].steps) for indices in found.values()]


def _decode_behind(session: Session, logits: Floats, lengths: Ids, rows: Mapping[int, Row]) -> Iterator[Read]:
    """Decode what rows of a request have behind their prompts, by the request's rows; `logits` are the prefill's.

    Rows may differ in everything: the steps are counted from each row's own prompt. A row that has no token left, or
    that nothing is asked of, is fed padding, and what comes of it is not read.
    """
    steps = max(row.steps for row in rows.values())
    ids = np.full((len(lengths), int(lengths.max()) + steps + 1), session.bundle.manifest.special_tokens.pad, np.int64)
    firsts, ends = np.zeros_like(lengths), np.zeros_like(lengths)
    for index, row in rows.items():
        ids[index, : len(row.ids)] = row.ids
        firsts[index], ends[index] = row.first, len(row.ids) - 1
    every = np.arange(len(lengths))
    offset = 0
    for step in range(steps + 1):
        positions = lengths - 1 + step
        read = np.flatnonzero((positions >= firsts) & (positions < ends))
        if read.size:
            at = positions[read]
            yield Read(offset, read, at, ids[read, at + 1], log_softmax(logits[read]))
        if step < steps:
            offset = 0 if session.next_step is StepKind.REFRESH else offset + 1
            logits = session.step(ids[every, positions + 1])


def decode(session: Session, rows: Sequence[Row], k: WindowK) -> Iterator[Read]:
    """Decode a batch under k and yield what is to be read of each step, the prefill being step 0.

    Rows with the same prompt, such as the options of a question, share its prefill: all but the last of them go on from
    a fork of it.
    """
    prompts = _by_prompt(rows)
    lengths = np.array([rows[indices[0]].prompt for indices in prompts], np.int64)
    ids = np.full((len(prompts), int(lengths.max())), session.bundle.manifest.special_tokens.pad, np.int64)
    for index, indices in enumerate(prompts):
        ids[index, : lengths[index]] = rows[indices[0]].ids[: lengths[index]]
    logits = session.prefill(ids, lengths, max_new_tokens=max(row.steps for row in rows) + 1, k=k)
    turns = max(map(len, prompts))
    for turn in range(turns):
        now = {index: indices[turn] for index, indices in enumerate(prompts) if turn < len(indices)}
        asked = {index: rows[row] for index, row in now.items()}
        goes_on = turn < turns - 1 and any(row.steps for row in asked.values())
        with session.fork() if goes_on else nullcontext(session) as branch:
            for read in _decode_behind(branch, logits, lengths, asked):
                yield dataclasses.replace(read, rows=np.array([now[index] for index in read.rows]))


def batches(session: Session, rows: Sequence[Row]) -> Iterator[list[int]]:
    """Indices of rows that run together: of alike numbers of steps and, among those, alike prompts."""
    limits = session.bundle.manifest.limits
    batch: list[list[int]] = []
    for indices in sorted(_by_prompt(rows), key=lambda those: (rows[those[0]].steps, rows[those[0]].prompt)):
        longest = max(rows[those[0]].prompt for those in (*batch, indices))
        steps = rows[indices[0]].steps
        if batch and (len(batch) == limits.max_batch or longest + steps + 1 > limits.max_seq_len):
            yield [index for those in batch for index in those]
            batch = []
        batch.append(indices)
    if batch:
        yield [index for those in batch for index in those]


def _decode_apart(session: Session, rows: Sequence[Row], k: WindowK) -> Iterator[Read]:
    """As `decode`, in as many batches as the bundle's limits make of them: prompts of other phases differ in length."""
    one_by_one = ([index] for index in range(len(rows)))
    for batch in batches(session, rows) if isinstance(k, int) else one_by_one:
        for read in decode(session, [rows[index] for index in batch], k):
            yield dataclasses.replace(read, rows=np.array(batch)[read.rows])


def score(session: Session, rows: Sequence[Row], k: int) -> list[Score]:
    """Scores of one batch, in its order: of each row the tokens after position `first`."""
    sums, greedy = np.zeros(len(rows)), np.ones(len(rows), np.bool_)
    for read in decode(session, rows, k):
        sums[read.rows] += read.target_log_probs
        greedy[read.rows] &= read.log_probs.argmax(axis=1) == read.targets
    return [Score(float(total), bool(hit)) for total, hit in zip(sums, greedy, strict=True)]


@dataclass(frozen=True)
class Window:
    """A piece of text, ids [W]; the first `context` tokens are given, those after the next one are scored.

    So all of them are scored by decode steps, for every k the same ones.
    """

    ids: Ids
    context: int
    phase: float

    def row(self, k: WindowK) -> Row:
        return Row(self.ids, prompt_length(self.context, self.phase, longest(k)), self.context)

    @property
    def scored(self) -> int:
        return len(self.ids) - 1 - self.context


def windows_at_once(session: Session, window: Window) -> int:
    """How many windows make a batch: as many as the bundle allows and KEPT_BYTES hold."""
    manifest = session.bundle.manifest
    return max(1, min(manifest.limits.max_batch, KEPT_BYTES // (window.scored * manifest.model.vocab_size * 4)))


def score_windows(
    session: Session, windows: Sequence[Window], ks: Sequence[WindowK], done: Callable[[WindowK, list[Sums]], None]
) -> None:
    """Decode a batch of equally long windows under k = 0, then under every one of `ks`; compare the same positions.

    Args:
        ks: windows k, or adaptive schedules.
        done: gets one of them and for each window float64 [k + 1, 5], the sums of `COLUMNS` for each offset: tokens
            scored, −log p of them, the same under k = 0, how often the likeliest token is that of k = 0, KL(p₀ ‖ p_k)
            in nats.
    """
    first, vocab_size = windows[0].context, session.bundle.manifest.model.vocab_size
    kept = np.empty((len(windows), windows[0].scored, vocab_size), np.float32)
    for k in (0, *(k for k in ks if k)):
        sums = np.zeros((len(windows), longest(k) + 1, len(COLUMNS)))
        for read in _decode_apart(session, [window.row(k) for window in windows], k):
            if not k:
                kept[read.rows, read.positions - first] = read.log_probs
            full = kept[read.rows, read.positions - first]
            sums[read.rows, read.offset] += np.stack(
                [
                    np.ones(len(read.rows)),
                    -read.target_log_probs,
                    -np.take_along_axis(full, read.targets[:, None], 1)[:, 0],
                    full.argmax(axis=1) == read.log_probs.argmax(axis=1),
                    (np.exp(full) * (full - read.log_probs)).sum(axis=1, dtype=np.float64),
                ],
                axis=1,
            )
        if k in ks:
            done(k, list(sums))
