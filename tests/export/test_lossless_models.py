"""The policy `lossless` on tiny models: greedy tokens are the full schedule's, by the oracle's logits.

Random models are unsure of everything, so drafts here are verified whatever their confidence: accepted ones, rejected
ones and such that end inside a row all occur.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from lora_drop_runtime.decoding import drafter
from lora_drop_runtime.decoding.sampling import SamplingOptions
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.plan.schedule import PeriodicSchedule

from tests.support import oracle
from tests.support.bundles import PROMPTS, family, make_bundle, oracle_plan, save_adapters

TOLERANCE = 3e-5  # of the row's largest |logit|: both sides are float32 and differ in the order of their sums
MOST_NEAR_TIES = 2  # over all models and plans
COUNT = 17
PLANS = [
    ("llama", {"surrogate": "residual"}),
    ("qwen3", {"surrogate": "recurrent", "rank": 4}),
    ("llama", {"surrogate": "anchor", "injection": "attn_mlp", "drop_ratio": 0.25}),
    ("gemma2", {"surrogate": "residual", "rank": 4}),
    ("llama", {"surrogate": "recurrent"}),
]
near_ties: list[str] = []


@pytest.fixture(autouse=True)
def whatever_the_confidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafter, "CONFIDENCE", 0.0)


@pytest.fixture(
    scope="module", params=range(len(PLANS)), ids=lambda number: f"{PLANS[number][0]}-{PLANS[number][1]['surrogate']}"
)
def opened(request: pytest.FixtureRequest, tmp_path_factory) -> Iterator[tuple[Session, list[np.ndarray]]]:
    """A session, and the oracle's logits [COUNT, V] of each prompt, along the session's own tokens at k = 0."""
    name, options = PLANS[request.param]
    tmp_path = tmp_path_factory.mktemp("lossless")
    bundle = make_bundle(name, tmp_path / "b", **({"drop_ratio": 0.5} | options))
    plan = oracle_plan(bundle)
    with Session.open(bundle.root, policy="lossless", threads=1) as session:
        if options.get("rank"):
            facts = bundle.manifest
            adapters = save_adapters(tmp_path / "a", facts.plan, facts.model.hidden_size, facts.model.fingerprint)
            session.load_adapters(adapters)
            plan = oracle_plan(bundle, adapters)
        logits = []
        for prompt, tokens in zip(PROMPTS, session.generate(PROMPTS, COUNT, k=0, stop_token_ids=()), strict=True):
            steps = oracle.decode_row(family(name).model, plan, prompt, tokens[:-1].tolist(), 0)
            logits.append(np.stack([step.numpy() for step in steps]))
        yield session, logits


def assert_full_schedules(tokens: list[int], logits: np.ndarray, what: str) -> None:
    """Equal up to a near-tie, after which the texts may part; those are counted."""
    for step, (token, row) in enumerate(zip(tokens, logits, strict=True)):
        if token != row.argmax():
            second, first = np.sort(row)[-2:]
            assert first - second <= 2 * TOLERANCE * np.abs(row).max(), f"{what}, step {step}: no near-tie"
            near_ties.append(f"{what}, step {step}: {first:.6f} and {second:.6f}")
            break
    assert len(near_ties) <= MOST_NEAR_TIES, near_ties


def test_greedy_tokens_are_the_full_schedules(opened) -> None:
    session, logits = opened
    accepted: set[int] = set()
    for draft in ("lora", "ngram", "both"):
        for k in (0, 1, 3, 5):
            for rows in ([0, 1, 2], [2]):
                prompts = [PROMPTS[row] for row in rows]
                out = session.generate(prompts, COUNT, k=k, draft=draft, stop_token_ids=())
                for row, tokens in zip(rows, out, strict=True):
                    assert_full_schedules(tokens.tolist(), logits[row], f"{draft}, k = {k}, row {row} of {len(rows)}")
                counted = session.statistics()
                if not k:  # the full schedule itself
                    assert counted is None
                    continue
                assert counted.tokens == len(rows) * (COUNT - 1)
                accepted |= {length for length, count in enumerate(counted.accepted_lengths) if count}
    assert {0} < accepted, "drafts are all accepted, or none"


def test_greedy_under_penalties_is_the_full_schedules(opened) -> None:
    """The oracle's logits belong to another text here; so the session's own, of k = 0, at which nothing is drafted."""
    session, _ = opened
    sampling = SamplingOptions(presence_penalty=0.3, frequency_penalty=0.2, logit_bias={5: 0.5, 17: -100})
    full = session.generate(PROMPTS, COUNT, k=0, sampling=sampling, stop_token_ids=())
    plain = session.generate(PROMPTS, COUNT, k=0, stop_token_ids=())
    assert any(ours.tolist() != theirs.tolist() for ours, theirs in zip(full, plain, strict=True))
    for draft in ("lora", "ngram", "both"):
        for k in (1, 3):
            out = session.generate(PROMPTS, COUNT, k=k, draft=draft, sampling=sampling, stop_token_ids=())
            assert [row.tolist() for row in out] == [row.tolist() for row in full], (draft, k)


def test_lenience_takes_greedy_tokens_of_its_share_of_the_likeliest_ones_probability(
    opened, request: pytest.FixtureRequest
) -> None:
    """By the oracle along the text itself."""
    session, _ = opened
    name, bundle = PLANS[request.node.callspec.params["opened"]][0], session.bundle
    strict = session.generate(PROMPTS, COUNT, k=3, draft="both", stop_token_ids=())
    parted = 0
    for lenience in (0.9, 0.5):
        options = {"k": 3, "draft": "both", "stop_token_ids": ()}
        out = session.generate(PROMPTS, COUNT, lenience=lenience, **options)
        for prompt, tokens in zip(PROMPTS, out, strict=True):
            plan = oracle_plan(bundle)  # of full steps alone, so without any adapters
            rows = oracle.decode_row(family(name).model, plan, prompt, tokens[:-1].tolist(), 0)
            for token, row in zip(tokens, rows, strict=True):
                share = float((row[token] - row.max()).exp())
                assert share >= lenience * (1 - 1e-3)
        parted += sum(ours.tolist() != theirs.tolist() for ours, theirs in zip(out, strict, strict=True))
    assert parted


def test_a_seeded_draw_does_not_depend_on_the_other_rows(opened) -> None:
    session, _ = opened
    sampling = SamplingOptions(0.8, top_k=20, repetition_penalty=1.1, seed=3)
    options = {"k": 3, "draft": "both", "sampling": sampling, "stop_token_ids": ()}
    together = session.generate(PROMPTS, 9, **options)
    alone = session.generate(PROMPTS[:1], 9, **options)
    assert together[0].tolist() == alone[0].tolist()
    assert session.generate(PROMPTS, 9, **options)[2].tolist() == together[2].tolist()


def test_caches_are_those_of_a_plain_run(opened) -> None:
    """After roll-backs each valid slot holds what refreshes of one token leave there."""
    session, _ = opened
    engine, bundle = session._engine, session.bundle
    whole = Session(bundle, engine, PeriodicSchedule(0), "backfill")
    tokens = session.generate(PROMPTS[:1], COUNT, k=4, draft="lora", stop_token_ids=())[0]
    ours = {name: np.array(cache) for name, cache in session._running().caches.items()}
    lengths = session._running().len_kept.tolist(), session._running().len_dropped.tolist()
    whole.prefill(np.array(PROMPTS[:1]), max_new_tokens=COUNT)
    for token in tokens[:-1]:
        whole.step([token])
    plain = whole._running()
    assert lengths == (plain.len_kept.tolist(), plain.len_dropped.tolist())
    for name, cache in plain.caches.items():
        valid = slice(None), slice(None), slice(lengths[0][0])
        np.testing.assert_allclose(ours[name][valid], np.array(cache)[valid], atol=1e-4, err_msg=name)
    assert dataclasses.asdict(session.statistics())["cycles"]
