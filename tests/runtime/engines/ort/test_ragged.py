"""Rows with different numbers of new tokens in one call, against each row alone in calls without padding.

At the level of the engine: buffers are bound as a session binds them, and every row has a past of its own, with holes
in the caches of dropped layers where the plan leaves them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.ort.engine import OrtEngine
from lora_drop_runtime.plan.schedule import StepKind

from tests.support import export_array as array
from tests.support import oracle
from tests.support.bundles import Family, first_layers, heads_of, make_adapted_bundle, oracle_plan, rewritten

TOLERANCE = 1e-5  # of the largest number, at least of 1
PASTS, COUNTS = (7, 12, 20, 0), (0, 1, 4, 3)
SLOTS = 32  # as many as a row of these bundles has tokens at most
PADDING = 99  # a token


@dataclass
class Rows:
    """The buffers of some rows, and steps on them; what no step has written yet is NaN, or noise in int8."""

    bundle: Bundle
    engine: OrtEngine
    caches: dict[str, np.ndarray]
    states: dict[str, np.ndarray]
    kept: np.ndarray
    dropped: np.ndarray

    @classmethod
    def empty(cls, bundle: Bundle, engine: OrtEngine, rows: int, slots: int = SLOTS) -> Rows:
        generator = np.random.default_rng(0)

        def buffer(shape: tuple[int, ...], dtype: str) -> np.ndarray:
            if dtype == "int8":
                return generator.integers(-128, 128, shape, np.int8)
            return np.full(shape, np.nan, dtype)

        sizes = {"batch": rows, "slots_kept": slots, "slots_dropped": slots}
        inputs = bundle.manifest.io(StepKind.REFRESH, "ort").inputs
        made = {
            part: {s.name: buffer(s.sized(sizes), s.dtype) for s in inputs if s.name.startswith(part)}
            for part in ("past_key.", "past_value.", "past_state.")
        }
        lengths = np.zeros((2, rows), np.int64)
        return cls(bundle, engine, made["past_key."] | made["past_value."], made["past_state."], *lengths)

    def row(self, row: int) -> Rows:
        """One of the rows, in the same memory."""
        one = slice(row, row + 1)
        caches, states = ({name: a[one] for name, a in part.items()} for part in (self.caches, self.states))
        return Rows(self.bundle, self.engine, caches, states, self.kept[one], self.dropped[one])

    def alone(self, row: int) -> Rows:
        """A copy of one of the rows."""
        one = self.row(row)
        arrays = copy.deepcopy((one.caches, one.states, one.kept, one.dropped))
        return Rows(self.bundle, self.engine, *arrays)

    def run(self, kind: StepKind, fed: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """One call over the new tokens of each row; logits [count, V] of each. A row without any stands still."""
        plan = self.bundle.manifest.plan
        counts = np.array([len(tokens) for tokens in fed])
        width = int(counts.max())
        ids = np.full((len(fed), width), PADDING, np.int64)
        for row, tokens in enumerate(fed):
            ids[row, : len(tokens)] = tokens
        index = np.minimum(np.arange(width), counts[:, None] - 1)  # [B, S], −1 in rows without tokens
        inputs: dict[str, Any] = {"input_ids": ids, "logits_index": index, **self.caches, **self.states}
        inputs |= {"len_kept": self.kept, "len_dropped": self.dropped}
        logits = np.full((len(fed), width, self.bundle.manifest.model.vocab_size), np.nan, np.float32)
        outputs: dict[str, Any] = {"logits": logits}
        outputs |= {name.replace("past_", "present_"): cache for name, cache in self.caches.items()}
        for name, state in self.states.items():
            renewed = kind is StepKind.LORA and name.partition(".")[2] in plan.updated_states
            outputs[name.replace("past_", "present_")] = np.full_like(state, np.nan) if renewed else state
        io = self.bundle.manifest.io(kind, "ort")
        step = self.engine.prepare(
            kind, {s.name: inputs[s.name] for s in io.inputs}, {s.name: outputs[s.name] for s in io.outputs}
        )
        step()
        for name, state in self.states.items():
            state[:] = outputs[name.replace("past_", "present_")]
        self.kept += counts
        if kind is StepKind.REFRESH or plan.refresh_policy.fills:
            self.dropped += counts
        return [logits[row, :count] for row, count in enumerate(counts)]

    def length(self, name: str, row: int) -> int:
        """Valid slots of a row in a cache."""
        is_dropped = int(name.rpartition(".")[2]) in self.bundle.manifest.plan.dropped_attentions
        return int((self.dropped if is_dropped else self.kept)[row])


def tokens_of(pasts: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 131, past).tolist() for past in pasts]


def with_pasts(bundle: Bundle, engine: OrtEngine, pasts: Sequence[Sequence[int]], drafts: Sequence[int]) -> Rows:
    """Rows that have their pasts, each from calls of its own, the last tokens of each from LoRA steps."""
    rows = Rows.empty(bundle, engine, len(pasts))
    for row, (past, last) in enumerate(zip(pasts, drafts, strict=True)):
        begin = len(past) - last
        if begin:
            rows.row(row).run(StepKind.REFRESH, [past[:begin]])
        for token in past[begin:]:
            rows.row(row).run(StepKind.LORA, [[token]])
    return rows


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype
    if ours.size:
        largest = max(1.0, float(np.abs(theirs.astype(np.float32)).max()))
        assert np.abs(ours.astype(np.float32) - theirs).max() <= TOLERANCE * largest


def run_and_compare(rows: Rows, kind: StepKind, fed: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """One call; each row that has tokens is as in a call of its own, of others no bit changes. Returns the logits."""
    before = [rows.alone(row) for row in range(len(fed))]
    found = rows.run(kind, fed)
    for row, tokens in enumerate(fed):
        apart, old = copy.deepcopy((before[row].caches, before[row].states)), before[row].alone(0)
        if tokens:
            close(found[row], before[row].run(kind, [tokens])[0])
        for name, cache in rows.caches.items():
            length = rows.length(name, row)
            assert length == before[row].length(name, 0)
            first = old.length(name, 0)
            close(cache[row, :, first:length], before[row].caches[name][0, :, first:length])
            # Neither slots from before nor those past the new tokens
            for untouched in (slice(0, first), slice(length, None)):
                assert cache[row, :, untouched].tobytes() == apart[0][name][0, :, untouched].tobytes(), name
        for name, state in rows.states.items():
            if tokens:
                close(state[row], before[row].states[name][0])
            else:
                assert state[row].tobytes() == apart[1][name][0].tobytes(), name
    return found


FLOATS = ("float32", "float32")  # a checkpoint's and its trace's
LAYERS = 5  # and what is dropped, unless a form says otherwise
PLAN = {"drop_layers": (1, 3), "always_first": 1}


def one_product() -> Family:
    return rewritten(first_layers("llama", LAYERS))


SOURCES: dict[str, Any] = {
    "llama": functools.partial(first_layers, "llama", LAYERS),
    "one more": functools.partial(first_layers, "llama", LAYERS + 1),
    "one product": one_product,  # for q, k and v, which the attention rotates itself
    "folded": functools.partial(first_layers, "llama_mqa", LAYERS),
    "biases": functools.partial(first_layers, "qwen2", LAYERS),
    "windows": functools.partial(first_layers, "gemma2", LAYERS),  # and soft caps
    "padded heads": functools.partial(heads_of, 4, 2),  # of 4 values, which the caches hold as 8
    "padded and folded heads": functools.partial(array.source, array.model_with(head_dim=100, kv_heads=1), *FLOATS),
}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "one product": ("one product", {}),
    "folded": ("folded", {}),
    "biases": ("biases", {}),
    "windows": ("windows", {"drop_layers": (1,)}),
    "padded heads": ("padded heads", {"drop_layers": (1,)}),
    "padded and folded heads": ("padded and folded heads", {"drop_layers": (1,)}),
    "padded heads, fill": ("padded heads", {"drop_layers": (1,), "policy": "fill"}),
    "int8 caches": ("llama", {"kv_dtype": "int8"}),
    "int8 caches, one product": ("one product", {"kv_dtype": "int8"}),
    "int4": ("one product", {"dtype": "int4", "quantization": "rtn"}),
    "fill": ("llama", {"policy": "fill"}),
    "fill, int8 caches": ("llama", {"policy": "fill", "kv_dtype": "int8"}),
    "fill, windows": ("windows", {"drop_layers": (1, 2), "policy": "fill"}),
    "recurrent": ("llama", {"surrogate": "recurrent", "rank": 4}),
    "recurrent, folded, halves": ("folded", {"surrogate": "recurrent", "rank": 4, "injection": "attn_mlp"}),
    "change": ("one more", {"surrogate": "residual-delta", "drop_layers": (1, 2, 4), "rank": 4}),
    "gated": ("one more", {"surrogate": "residual-delta-gated", "drop_layers": (1, 2, 4), "rank": 4}),
    "recurrent, fill": ("llama", {"surrogate": "recurrent", "rank": 4, "policy": "fill"}),
    "recurrent, rank 0": ("llama", {"surrogate": "recurrent"}),
    "anchor": ("llama", {"surrogate": "anchor", "rank": 4}),
    "halves": ("llama", {"drop_layers": ("2.attn", "3.mlp"), "surrogate": "recurrent", "rank": 4}),
}
Opened = tuple[Bundle, OrtEngine]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bundle with adapters and its engine, by the name of a form; each is made once."""

    @functools.cache
    def make(form: str) -> Opened:
        name, options = FORMS[form]
        options = PLAN | {"max_seq_len": SLOTS} | options
        bundle = make_adapted_bundle(SOURCES[name](), tmp_path_factory.mktemp("ragged"), **options)
        return bundle, OrtEngine(bundle, threads=1)

    return make


@pytest.mark.parametrize("form", FORMS)
def test_one_call_is_each_row_alone(opened: Any, form: str) -> None:
    """A refresh over rows with different pasts and counts, LoRA steps and single tokens with rows that stand still."""
    bundle, engine = opened(form)
    rows = with_pasts(bundle, engine, tokens_of(PASTS), (2, 0, 3, 0))
    run_and_compare(rows, StepKind.REFRESH, tokens_of(COUNTS, 1))
    run_and_compare(rows, StepKind.LORA, [[5], [], [9], [11]])
    run_and_compare(rows, StepKind.LORA, [[], [], [], [3]])
    run_and_compare(rows, StepKind.REFRESH, [[8], [3], [], []])
    run_and_compare(rows, StepKind.REFRESH, tokens_of((0, 0, 2, 0), 2))


@pytest.mark.parametrize("form", ["llama", "folded", "windows", "recurrent", "change", "int8 caches"])
def test_tokens_that_are_taken_again(opened: Any, form: str) -> None:
    """`backfill`: rows go back over their LoRA steps, as many as each has."""
    bundle, engine = opened(form)
    pasts, drafts = tokens_of(PASTS), (2, 3, 0, 0)
    rows = with_pasts(bundle, engine, pasts, drafts)
    rows.kept -= drafts
    run_and_compare(
        rows, StepKind.REFRESH, [[*past[len(past) - n :], 6] for past, n in zip(pasts, drafts, strict=True)]
    )


@pytest.mark.parametrize("form", ["llama", "one product", "folded", "windows", "padded heads", "recurrent"])
def test_full_rows_are_the_same_with_and_without_packing(opened: Any, form: str) -> None:
    """Rows with as many tokens each are not packed, unless a further row stands still."""
    bundle, engine = opened(form)
    pasts = [*tokens_of(PASTS), []]
    packed = with_pasts(bundle, engine, pasts, (0,) * 5)
    dense = with_pasts(bundle, engine, pasts[:4], (0,) * 4)
    fed = tokens_of((3,) * 4, 1)
    for ours, theirs in zip(packed.run(StepKind.REFRESH, [*fed, []]), dense.run(StepKind.REFRESH, fed), strict=False):
        close(ours, theirs)
    for row in range(4):
        for name, cache in dense.caches.items():
            written = cache[row, :, : dense.length(name, row)]
            close(packed.caches[name][row, :, : dense.length(name, row)], written)
        for name, state in dense.states.items():
            close(packed.states[name][row], state[row])


@pytest.mark.parametrize("form", FORMS)
def test_rows_at_their_last_slots(opened: Any, form: str) -> None:
    """A row whose chunk ends with its last slot, one that is full and stands still, in refreshes and a LoRA step."""
    bundle, engine = opened(form)
    rows = with_pasts(bundle, engine, tokens_of((SLOTS - 4, SLOTS, 5, SLOTS - 2)), (0,) * 4)
    run_and_compare(rows, StepKind.REFRESH, tokens_of((4, 0, 2, 0), 1))
    run_and_compare(rows, StepKind.REFRESH, [[], [], [4], [7]])
    run_and_compare(rows, StepKind.LORA, [[], [], [4], [7]])
    run_and_compare(rows, StepKind.LORA, [[], [], [8], []])


@pytest.mark.parametrize("form", ["llama", "windows", "recurrent, folded, halves", "change"])
def test_against_the_oracle(opened: Any, form: str) -> None:
    bundle, engine = opened(form)
    pasts, drafts, fed = tokens_of((5, 8, 0)), (1, 0, 0), tokens_of((0, 2, 3), 1)
    rows = with_pasts(bundle, engine, pasts, drafts)
    ours = [rows.run(StepKind.REFRESH, fed), rows.run(StepKind.LORA, [[5], [9], []])]
    adapters = bundle.root.parent / "adapters"
    plan = oracle_plan(bundle, adapters if adapters.exists() else None)
    for row, (past, last, tokens) in enumerate(zip(pasts, drafts, fed, strict=True)):
        theirs = oracle.Row(SOURCES[FORMS[form][0]]().model, plan)
        with theirs.installed():
            for place, token in enumerate(past):
                theirs.step(token, full=place < len(past) - last)
            wanted = [[theirs.step(token, full=True).numpy() for token in tokens], []]
            if row < 2:
                wanted[1] = [theirs.step((5, 9)[row], full=False).numpy()]
        for found, want in zip(ours, wanted, strict=True):
            assert len(found[row]) == len(want)
            for a, b in zip(found[row], want, strict=True):
                assert np.abs(a - b).max() < 3e-5 * np.abs(b).max()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data(), form=st.sampled_from(["one product", "folded", "recurrent", "windows"]))
def test_any_pasts_and_counts(opened: Any, data: st.DataObject, form: str) -> None:
    """At most four rows, each with any past, some of it from LoRA steps, and any number of new tokens."""
    bundle, engine = opened(form)
    counts = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), "counts")
    most = SLOTS - max(counts)  # a chunk has room in every row that has tokens
    pasts = [data.draw(st.integers(0, most if count else SLOTS), "past") for count in counts]
    drafts = [data.draw(st.integers(0, min(3, max(past - 1, 0))), "drafts") for past in pasts]
    rows = with_pasts(bundle, engine, tokens_of(pasts), drafts)
    run_and_compare(rows, StepKind.REFRESH, tokens_of(counts, 1))
    going = [length < SLOTS and data.draw(st.booleans(), "goes on") for length in rows.kept.tolist()]
    if any(going):
        run_and_compare(rows, data.draw(st.sampled_from(StepKind), "kind"), [[7] if goes else [] for goes in going])
