"""The oracle checked: against the model itself, numbers worked out by hand, and a parallel form.

The parallel form states the same algorithm in one pass over the whole sequence: dropped layers get a mask
that hides the LoRA steps' positions, and their outputs at those positions are overwritten. It shares nothing
with the oracle's token loop, lists of slots and attention function.
"""

from __future__ import annotations

from functools import cache
from unittest import mock

import pytest
import torch

from tests.support import golden, models, oracle
from tests.support.oracle import OraclePlan

# fp32 summed in another order, 8 layers that amplify: up to 5e-5 seen; the logits' standard deviation is 1.6
TOLERANCE = {"rtol": 0.0, "atol": 2e-4}
SURROGATES = ("residual", "recurrent", "anchor", "residual-delta")
INJECTIONS = ("block", "attn_mlp")
DROPPED = (3, 5)  # not windowed in gemma2


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only lose by threads, and lose badly on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


family = cache(lambda name: models.FAMILIES[name]())


def random_tokens(count, seed):
    return torch.randint(131, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def random_plan(drop_layers, surrogate="residual", injection="block", d=64, r=4):
    generator = torch.Generator().manual_seed(7)
    plan = OraclePlan(oracle.sites_of(drop_layers, injection), surrogate)
    features = 2 * d if surrogate == "residual-delta" else d
    plan.adapters = {
        key: (torch.randn(r, features, generator=generator) / d**0.5, torch.randn(d, r, generator=generator), 0.5)
        for key in plan.sites
    }
    return plan


@torch.no_grad()
def whole_sequence(model, tokens):
    """The model's ordinary forward: logits `[T, V]`."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def parallel_form(model, plan, prompt, forced, k):
    """LoRA-Drop with teacher forcing as one masked pass: logits `[len(forced) + 1, V]`."""
    holes = [len(prompt) + j - 1 for j in range(1, len(forced) + 1) if j % (k + 1) != 0]

    def adapter(key, vector, change):
        A, B, scale = plan.adapters.get(key, (torch.zeros(1, len(vector)), torch.zeros(len(vector), 1), 0.0))
        vector = torch.cat([vector, change]) if A.shape[1] == 2 * len(vector) else vector
        return vector @ A.T @ B.T * scale

    def dropped_layer(i, layer):
        own_forward, norm = layer.forward, layer.post_attention_layernorm
        if hasattr(layer, "pre_feedforward_layernorm"):
            norm = layer.pre_feedforward_layernorm

        def forward(x, attention_mask, **kwargs):
            attention_mask = attention_mask.clone()  # [1, 1, T, T], added to the scores
            attention_mask[..., holes] = torch.finfo(x.dtype).min
            seen = []
            with norm.register_forward_pre_hook(lambda _norm, args: seen.append(args[0].clone())):
                y = own_forward(x, attention_mask=attention_mask, **kwargs)
            h = seen[0]
            for t in holes:
                anchor = max(s for s in range(t) if s not in holes)
                before = {"recurrent": t - 1, "anchor": anchor}.get(plan.surrogate)
                change = y[0, anchor] - x[0, anchor]
                if f"{i}" in plan.sites:
                    y[0, t] = (x[0, t] if before is None else y[0, before]) + adapter(f"{i}", x[0, t], change)
                else:
                    h[0, t] = (x[0, t] if before is None else h[0, before]) + adapter(f"{i}.attn", x[0, t], change)
                    y[0, t] = (h[0, t] if before is None else y[0, before]) + adapter(f"{i}.mlp", h[0, t], change)
            return y

        return mock.patch.object(layer, "forward", forward)

    patches = [
        dropped_layer(i, model.model.layers[i]) for i in sorted({int(site.partition(".")[0]) for site in plan.sites})
    ]
    for patch in patches:
        patch.start()
    try:
        return whole_sequence(model, prompt + forced)[len(prompt) - 1 :]
    finally:
        for patch in patches:
            patch.stop()


# (a) against the model


@pytest.mark.parametrize("name", models.FAMILIES)
def test_no_dropped_layers_is_the_model(name):
    model, prompt, forced = family(name), random_tokens(6, 1), random_tokens(9, 2)
    logits = oracle.decode_row(model, OraclePlan(()), prompt, forced, k=3)
    torch.testing.assert_close(torch.stack(logits), whole_sequence(model, prompt + forced)[5:], **TOLERANCE)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_greedy_is_generate(name):
    model, prompt = family(name), random_tokens(7, 3)
    tokens, logits = oracle.greedy_row(model, OraclePlan(()), prompt, new_tokens=12, k=3)
    ids = torch.tensor([prompt])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert tokens == expected[0, len(prompt) :].tolist()
    assert len(logits) == 12
    assert len(set(tokens)) > 4, "the model says one thing over and over: a bad test model"


@pytest.mark.parametrize("name", models.FAMILIES)
def test_top_logits_are_apart(name):
    logits = whole_sequence(family(name), random_tokens(60, 4))
    first, second = logits.topk(2).values.T
    assert ((first - second) < 10 * TOLERANCE["atol"]).sum() <= 1  # of 60 positions


# (b) by hand


@pytest.mark.parametrize("case", golden.GOLDEN, ids=lambda case: case.name)
def test_golden(case):
    logits = oracle.decode_row(golden.golden_model(), case.plan, case.prompt, case.forced, case.k)
    torch.testing.assert_close(torch.stack(logits), torch.stack(case.logits), rtol=0.0, atol=1e-4)


def test_golden_arithmetic_of_the_layers():
    """The two tables of golden.py's docstring: every layer's input, and layer 1 with and without holes."""
    model, plan = golden.golden_model(), OraclePlan(("1",))
    row = oracle.Row(model, plan)
    inputs = []
    keep = model.model.layers[1].register_forward_pre_hook(lambda _layer, args: inputs.append(args[0][0, 0]))
    with keep:
        for token, full in zip([18, 2, 4, 0, 1, 17, 14, 24], [1, 1, 0, 0, 1, 0, 0, 1], strict=True):
            row.step(token, full=bool(full))
    by_hand = torch.tensor([[x, 1.0] for x in (18, 6, 6, 3, 3, 12, 11, 17)])
    torch.testing.assert_close(torch.stack(inputs), by_hand, rtol=0.0, atol=1e-5)
    assert [position for position, _, _ in row.slots[1]] == [0, 1, 4, 7]
    full_logits = whole_sequence(model, [18, 2, 4, 0, 1, 17, 14, 24])
    assert full_logits[4, 0].item() == pytest.approx((3 + 36 / 5) / 2)
    assert full_logits[7, 0].item() == pytest.approx((17 + 19 / 2) / 2)


# (c) against the parallel form


@pytest.mark.parametrize(
    ("name", "surrogate", "injection"),
    [
        (name, surrogate, INJECTIONS[(row + column) % 2])
        for row, name in enumerate(models.FAMILIES)
        for column, surrogate in enumerate(SURROGATES)
    ],
)
def test_parallel_form(name, surrogate, injection):
    model, prompt, forced = family(name), random_tokens(7, 5), random_tokens(9, 6)
    plan = random_plan(DROPPED, surrogate, injection)
    logits = oracle.decode_row(model, plan, prompt, forced, k=3)
    expected = parallel_form(model, plan, prompt, forced, k=3)
    torch.testing.assert_close(torch.stack(logits), expected, **TOLERANCE)


@pytest.mark.parametrize("k", [1, 2, 5, 100])
def test_parallel_form_with_neighbours_dropped(k):
    model, prompt, forced = family("llama"), random_tokens(1, 5), random_tokens(12, 6)
    plan = random_plan((3, 4, 6), "recurrent")
    del plan.adapters["4"]  # a missing adapter is zero
    logits = oracle.decode_row(model, plan, prompt, forced, k)
    expected = parallel_form(model, plan, prompt, forced, k)
    torch.testing.assert_close(torch.stack(logits), expected, **TOLERANCE)


# (d) what the oracle notices


@pytest.mark.parametrize("drop_layers", [(3,), (3, 4, 5, 6), tuple(range(8))])
def test_k_0_is_the_model(drop_layers):
    model, prompt, forced = family("llama"), random_tokens(6, 1), random_tokens(8, 2)
    logits = oracle.decode_row(model, random_plan(drop_layers), prompt, forced, k=0)
    torch.testing.assert_close(torch.stack(logits), whole_sequence(model, prompt + forced)[5:], **TOLERANCE)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_lora_steps_and_holes_change_logits(name):
    """Last layer dropped: the kept caches stay exact, so a LoRA step differs by the surrogate alone
    and a refresh by the holes alone."""
    model, prompt, forced = family(name), random_tokens(4, 1), random_tokens(6, 2)
    logits = oracle.decode_row(model, OraclePlan(("7",)), prompt, forced, k=2)
    full = whole_sequence(model, prompt + forced)[3:]
    difference = [(a - b).abs().max().item() for a, b in zip(logits, full, strict=True)]
    assert difference[0] < TOLERANCE["atol"]  # prompt
    assert min(difference[j] for j in (1, 2, 4, 5)) > 0.3  # LoRA steps
    assert min(difference[j] for j in (3, 6)) > 0.03  # refreshes


def test_surrogates_and_injections_differ():
    model, prompt, forced = family("llama"), random_tokens(4, 1), random_tokens(6, 2)
    last = [
        oracle.decode_row(model, random_plan(DROPPED, surrogate, injection), prompt, forced[:2], k=3)[-1]
        for surrogate in SURROGATES
        for injection in INJECTIONS
    ]
    for i in range(6):
        for j in range(i):
            assert (last[i] - last[j]).abs().max() > 0.1


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_backfill_forgets_what_lora_steps_wrote(surrogate):
    """`decode_row` goes on from a prompt of all tokens so far; a row takes the last of them again."""
    model, plan, k = family("llama"), random_plan(DROPPED, surrogate), 2
    prompt, forced = random_tokens(4, 1), random_tokens(7, 2)
    row, logits = oracle.prefill(model, plan, prompt)
    expected = [logits]
    for j, token in enumerate(forced, start=1):
        expected.append(row.backfill(token) if oracle.is_refresh(j, k) else row.step(token, full=False))
    found = oracle.decode_row(model, plan, prompt, forced, k, "backfill")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_slots_per_layer():
    """docs/algorithm.md, KV cache: T + m entries in a kept layer, T + floor(m / (k + 1)) in a dropped one."""
    row, _ = oracle.prefill(family("llama"), OraclePlan(oracle.sites_of(DROPPED)), random_tokens(5, 1))
    for j, token in enumerate(random_tokens(11, 2), start=1):
        row.step(token, full=oracle.is_refresh(j, k=3))
    assert [len(slots) for slots in row.slots] == [16, 16, 16, 7, 16, 7, 16, 16]


def test_rows_are_independent_and_the_model_is_left_as_it_was():
    model, plan = family("qwen3"), random_plan(DROPPED, "recurrent")
    prompts = [random_tokens(n, n) for n in (3, 8)]
    forced = [random_tokens(n, 9) for n in (6, 4)]
    before = whole_sequence(model, prompts[1])
    batch = oracle.run_batch(model, plan, prompts, forced, k=2)
    alone = oracle.decode_row(model, plan, prompts[1], forced[1], k=2)
    assert [len(row) for row in batch] == [7, 5]
    assert torch.equal(torch.stack(batch[1]), torch.stack(alone))
    assert torch.equal(before, whole_sequence(model, prompts[1]))
    assert model.config._attn_implementation == "eager"
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_greedy_feeds_its_own_tokens_back():
    model, plan, prompt = family("llama"), random_plan(DROPPED, "anchor"), random_tokens(5, 1)
    tokens, logits = oracle.greedy_row(model, plan, prompt, new_tokens=8, k=2)
    forced_logits = oracle.decode_row(model, plan, prompt, tokens[:-1], k=2)
    assert torch.equal(torch.stack(logits), torch.stack(forced_logits))
    assert tokens == [int(row.argmax()) for row in forced_logits]
