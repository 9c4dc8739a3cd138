"""The exported graphs and the session against the oracle: tokens and logits, step by step.

The oracle decodes one token and one row at a time on the unmodified transformers model; the session decodes a ragged
batch on ONNX Runtime. Windows are spread over the arms so that every pair of values still meets: every family has every
window, under one of the two policies, and every two of surrogate, injection, ratio and window meet.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.request import PREFILL_CHUNK
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.plan.drop_plan import DropPlan

from tests.support import golden, oracle
from tests.support.bundles import (
    PROMPTS,
    family,
    first_layers,
    fitted_adapters,
    make_bundle,
    oracle_plan,
    rewritten,
    save_adapters,
    traced_model,
)
from tests.support.models import FAMILIES

TOLERANCE = 3e-5  # of the row's largest |logit|: both sides are float32 and differ in the order of their sums
WINDOWS = (0, 1, 2, 3, 5, 19)
SURROGATES, INJECTIONS = oracle.FORMS, ("block", "attn_mlp")
RATIOS = (0.0, 0.5, 0.75, 1.0)  # of four layers: none, two apart, a pair beside one, all
LAYERS = 5  # of a family, so that two are dropped, and all but the first and the last may be
OPTIONS = {"always_first": 1}


def half_of_windows(name: str, policy: str) -> tuple[int, ...]:
    """Every second window; a family's other half is its other policy's, and its neighbour's of the same policy.

    Gemma 2 has all of them, and alone the longest: slots of its windowed layers are what a window's length could
    disturb.
    """
    if name == "gemma2":
        return WINDOWS
    return WINDOWS[([*FAMILIES].index(name) + (policy == "backfill")) % 2 : -1 : 2]


def new_tokens(k: int) -> int:
    """Enough for two cycles, and for one and a bit where the window is long."""
    return 2 * (k + 1) + 1 if k < 5 else k + 4


def assert_same_run(session: Session, model, plan, prompts: list[list[int]], k: int) -> None:
    """Greedy tokens of the session, then its logits step by step on those tokens, equal the oracle's."""
    count = new_tokens(k)
    tokens = session.generate(prompts, count, k=k, stop_token_ids=())
    lengths = np.array([len(p) for p in prompts])
    padded = np.zeros((len(prompts), lengths.max()), np.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    ours = [session.prefill(padded, lengths, max_new_tokens=count, k=k).copy()]
    ours += [session.step([row[j] for row in tokens]).copy() for j in range(count - 1)]
    for row, prompt in enumerate(prompts):
        theirs = oracle.decode_row(model, plan, prompt, tokens[row][:-1].tolist(), k, session.policy)
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            b = b.numpy()
            error = np.abs(a[row] - b).max() / np.abs(b).max()
            assert error < TOLERANCE, f"row {row}, step {step}: {error:.1e}"
            second, first = np.sort(b)[-2:]
            if first - second > 2 * TOLERANCE * np.abs(b).max():  # else a near-tie: either token is right
                assert tokens[row][step] == b.argmax(), f"row {row}, step {step}"


@pytest.fixture(scope="module")
def half_dropped(tmp_path_factory) -> Callable[[str], Bundle]:
    """A family's bundle with its default plan at ρ = 0.5; a policy is chosen per request."""
    made: dict[str, Bundle] = {}

    def of(name: str) -> Bundle:
        if name not in made:
            source = first_layers(name, LAYERS)
            made[name] = make_bundle(source, tmp_path_factory.mktemp(name) / "b", drop_ratio=0.5, **OPTIONS)
        return made[name]

    return of


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, half_dropped):
    """Every family, batch 1 and a ragged batch, short and long windows."""
    bundle = half_dropped(name)
    assert bundle.manifest.plan.dropped_layers
    with Session.open(bundle.root, threads=1) as session:
        for k in half_of_windows(name, "skip"):
            assert_same_run(session, first_layers(name, LAYERS).model, oracle_plan(bundle), PROMPTS, k)
        assert_same_run(session, first_layers(name, LAYERS).model, oracle_plan(bundle), PROMPTS[:1], 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_backfill(name, half_dropped):
    """A refresh that fills the holes: a ragged batch, one row, long and short windows."""
    bundle = half_dropped(name)
    with Session.open(bundle.root, policy="backfill", threads=1) as session:
        for k in half_of_windows(name, "backfill"):
            assert_same_run(session, first_layers(name, LAYERS).model, oracle_plan(bundle), PROMPTS, k)
        assert_same_run(session, first_layers(name, LAYERS).model, oracle_plan(bundle), PROMPTS[:1], 3)


@pytest.mark.parametrize(("surrogate", "injection"), list(zip(SURROGATES, INJECTIONS[::-1] * 3, strict=True)))
def test_backfill_plan(surrogate, injection, tmp_path):
    """States are those of the refresh's last token; adapters that are not loaded are zero."""
    options = OPTIONS | {"surrogate": surrogate, "injection": injection, "drop_ratio": 0.75, "rank": 4}
    source = first_layers("llama", LAYERS + 1)
    bundle = make_bundle(source, tmp_path / "b", **options, policy="backfill")
    adapters = save_adapters(tmp_path / "a", bundle.manifest.plan, 64, bundle.manifest.model.fingerprint)
    with Session.open(bundle.root, threads=1) as session:
        assert session.policy == "backfill"  # the bundle's own
        assert_same_run(session, source.model, oracle_plan(bundle), PROMPTS, 2)
        session.load_adapters(adapters)
        for k in (1, 3):
            assert_same_run(session, source.model, oracle_plan(bundle, adapters), PROMPTS, k)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_caches_after_backfill_are_the_full_models(name, half_dropped):
    """After each refresh every cache and the logits equal those of the same tokens decoded with k = 0."""
    bundle = half_dropped(name)
    prompts, lengths = np.zeros((3, 5), np.int64), np.array([len(p) for p in PROMPTS])
    for row, prompt in enumerate(PROMPTS):
        prompts[row, : len(prompt)] = prompt
    tokens = np.random.default_rng(3).integers(0, 131, (9, 3))
    runs = []
    for k in (2, 0):
        with Session.open(bundle.root, policy="backfill", k=k, threads=1) as session:
            session.prefill(prompts, lengths, max_new_tokens=10)
            seen = []
            for step, column in enumerate(tokens, 1):
                logits = session.step(column)
                if step % 3 == 0:
                    caches = session._request.caches
                    valid = {
                        name: [cache[row, :, : lengths[row] + step].copy() for row in range(3)]
                        for name, cache in caches.items()
                    }
                    seen.append((logits.copy(), valid))
                    kv, dropped = session.kv_bytes(), len(bundle.manifest.plan.dropped_layers)
                    assert kv["dropped"] * (LAYERS - dropped) == kv["kept"] * dropped  # as many entries in every layer
                    assert kv["allocated"] == sum(cache.nbytes for cache in caches.values())
                    assert len({cache.shape for cache in caches.values()}) == 1
            runs.append(seen)
    assert len(runs[0]) == 3
    for (ours, our_caches), (theirs, their_caches) in zip(*runs, strict=True):
        assert np.abs(ours - theirs).max() < TOLERANCE * np.abs(theirs).max()
        for cache, rows in our_caches.items():
            for a, b in zip(rows, their_caches[cache], strict=True):
                assert np.abs(a - b).max() < TOLERANCE * max(1, np.abs(b).max()), cache


@pytest.mark.parametrize("name", ["llama", "llama_mha", "llama_mqa", "qwen2", "qwen3", "gemma2", "phi3"])
def test_fused_weights(name, tmp_path, monkeypatch):
    """Weights in the exporter's own order: q, k, v and gate, up are one product each, and attention rotates itself."""
    source = rewritten(first_layers(name, LAYERS))
    bundle = make_bundle(source, tmp_path / "b", surrogate="recurrent", rank=2, **OPTIONS)
    adapters = save_adapters(tmp_path / "a", bundle.manifest.plan, 64, bundle.manifest.model.fingerprint, rank=2)
    with Session.open(bundle.root, threads=1) as session:
        session.load_adapters(adapters)
        for k in (0, 3):
            assert_same_run(session, source.model, oracle_plan(bundle, adapters), PROMPTS, k)
        monkeypatch.setattr("lora_drop_runtime.decoding.request.PREFILL_CHUNK", 2)
        assert_same_run(session, source.model, oracle_plan(bundle, adapters), PROMPTS, 1)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_nothing_dropped_is_generate(name, tmp_path):
    """ρ = 0 gives exactly the tokens of transformers' own generate; so does the oracle, for all families."""
    source = first_layers(name, LAYERS)
    bundle, model = make_bundle(source, tmp_path / "b", drop_ratio=0.0, k=2), source.model
    with Session.open(bundle.root, threads=1) as session:
        ours = session.generate(PROMPTS, new_tokens(2), stop_token_ids=())
    for prompt, row in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=new_tokens(2), do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert row.tolist() == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("surrogate", "drop_ratio"),
    [(name, ratio) for name in SURROGATES for ratio in RATIOS if ratio or name == "recurrent"],
)
def test_plan(surrogate, drop_ratio, tmp_path):
    """All surrogates, both injections and all ratios with random adapters, a ragged batch and one row.

    Injections take turns, and so do windows, two each, three apart: a surrogate, an injection or a ratio meets all six.
    Where nothing is dropped nothing is left of a surrogate.
    """
    turn = SURROGATES.index(surrogate) + RATIOS.index(drop_ratio)
    injection, first = INJECTIONS[turn % 2], turn % 3
    options = OPTIONS | {"surrogate": surrogate, "injection": injection, "drop_ratio": drop_ratio}
    source = first_layers("llama", LAYERS + 1)
    adapters = fitted_adapters(source, tmp_path / "a", **options) if drop_ratio else None
    bundle = make_bundle(source, tmp_path / "b", **options, adapters=adapters)
    plan = oracle_plan(bundle, adapters)
    with Session.open(bundle.root, threads=1) as session:
        for k in WINDOWS[first::3]:
            assert_same_run(session, source.model, plan, PROMPTS, k)
        assert_same_run(session, source.model, plan, PROMPTS[2:], 3)


@pytest.mark.parametrize(("surrogate", "injection"), list(zip(SURROGATES, INJECTIONS * 3, strict=True)))
def test_no_adapters(surrogate, injection, tmp_path):
    """Rank 0 leaves only the base: skipping for residual, reuse for the others."""
    source = first_layers("qwen3", LAYERS)
    options = OPTIONS | {"surrogate": surrogate, "injection": injection, "rank": 0, "drop_ratio": 0.75}
    bundle = make_bundle(source, tmp_path / "b", **options)
    with Session.open(bundle.root, threads=1) as session:
        assert_same_run(session, source.model, oracle_plan(bundle), PROMPTS, 2)


def test_all_layers_dropped(tmp_path):
    """No layer is always kept: LoRA steps have no cache at all."""
    source = first_layers("llama", LAYERS)
    bundle = make_bundle(source, tmp_path / "b", always_first=0, always_last=0, drop_ratio=1.0)
    assert bundle.manifest.plan.kept_attentions == ()
    with Session.open(bundle.root, threads=1) as session:
        assert_same_run(session, source.model, oracle_plan(bundle), PROMPTS, 2)


@pytest.mark.parametrize("surrogate", ["residual", "recurrent"])
def test_long_prompts_in_chunks(surrogate, tmp_path, monkeypatch):
    """Prompts longer than a prefill chunk join without a seam; shorter ones begin with a later chunk."""
    monkeypatch.setattr("lora_drop_runtime.decoding.request.PREFILL_CHUNK", 4)
    assert PREFILL_CHUNK > 4
    prompts = [list(range(3, 16)), [5], list(range(40, 48))]
    bundle = make_bundle("gemma2" if surrogate == "residual" else "qwen2", tmp_path / "b", surrogate=surrogate)
    model = family(bundle.manifest.model.model_type).model
    with Session.open(bundle.root, threads=1) as session:
        assert_same_run(session, model, oracle_plan(bundle), prompts, 2)


@pytest.fixture(scope="module")
def golden_source():
    return traced_model(golden.golden_model())


@pytest.mark.parametrize("case", golden.GOLDEN, ids=lambda case: "-".join((case.plan.surrogate, *case.plan.sites)))
def test_golden(case, golden_source, tmp_path):
    """The hand-computed cases through export and runtime."""
    plan = case.plan
    options = {
        "drop_layers": plan.sites,
        "surrogate": plan.surrogate,
        "always_first": 1,
        "always_last": 0,
        "max_seq_len": 32,
    }
    drop_plan = DropPlan(2, plan.sites, 2, plan.surrogate, 1, always_first=1, always_last=0)
    adapters = save_adapters(tmp_path / "a", drop_plan, 2, None, 1, plan.adapters)
    bundle = make_bundle(golden_source, tmp_path / "b", adapters=adapters, **options)
    with Session.open(bundle.root, k=case.k, threads=1) as session:
        logits = [session.prefill([case.prompt], max_new_tokens=len(case.forced) + 1)[0].copy()]
        logits += [session.step([token])[0].copy() for token in case.forced]
    np.testing.assert_allclose(logits, np.stack(case.logits), rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2"])
def test_folded_attention(name, tmp_path, monkeypatch):
    """Decoding one row with query heads folded into the sequence, a form that otherwise larger groups have."""
    monkeypatch.setattr("lora_drop_export.targets.ort.attention.MIN_FOLD", 1)
    source = first_layers(name, LAYERS)
    bundle = make_bundle(source, tmp_path / "b", surrogate="recurrent", rank=2, **OPTIONS)
    adapters = save_adapters(tmp_path / "a", bundle.manifest.plan, 64, bundle.manifest.model.fingerprint, rank=2)
    with Session.open(bundle.root, threads=1) as session:
        session.load_adapters(adapters)
        for prompts, k in ((PROMPTS[:1], 0), (PROMPTS[:1], 1), (PROMPTS[:1], 3), (PROMPTS, 1)):  # a batch does not
            assert_same_run(session, source.model, oracle_plan(bundle, adapters), prompts, k)
