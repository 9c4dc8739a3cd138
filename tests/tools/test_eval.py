"""`lora-drop eval`: what is scored at which step, against naive loops and PyTorch; intervals by hand; the command.

Tasks have their own file, test_eval_tasks.py.
"""

from __future__ import annotations

import importlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import BundleError, InputError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import StepKind
from lora_drop_tools.cli import main
from lora_drop_tools.eval import scoring as eval_scoring
from lora_drop_tools.eval.eval import KV_REQUEST, eval
from lora_drop_tools.eval.intervals import Figure, average, bootstrap, paired_difference, share
from lora_drop_tools.eval.result import EvalRow, safe_zones, task_figures, text_figures
from lora_drop_tools.eval.scoring import (
    Row,
    Window,
    batches,
    decode,
    generate_texts,
    log_softmax,
    phase_of,
    prompt_length,
    score,
    score_windows,
    windows_at_once,
)
from lora_drop_tools.eval.settings import EvalSettings
from lora_drop_tools.eval.store import Store
from lora_drop_tools.shared import costs
from lora_drop_tools.shared.progress import Progress

from tests.bundles import family, make_bundle
from tests.runtime.fake_engine import VOCAB, FakeEngine, Run, open_session

eval_module = importlib.import_module("lora_drop_tools.eval.eval")  # the name in the package is the function
PLAN = DropPlan(num_layers=8, drop_layers=(4, 6))
TEXT = "".join(f"{a} boats and {b} gulls; the tide is {a * b}.\n" for a in range(12) for b in range(6))


class LogitsEngine(FakeEngine):
    """Logits that depend on the position alone, and on the kind of the step."""

    def __init__(self, positions: int = 200) -> None:
        super().__init__(PLAN)
        generator = np.random.default_rng(3)
        self.full = generator.standard_normal((positions, VOCAB)).astype(np.float32) * 2
        self.lora = self.full + generator.standard_normal((positions, VOCAB)).astype(np.float32)

    def _predict(self, run: Run) -> None:
        index = np.zeros(len(run.len_kept), np.int64) if run.logits_index is None else run.logits_index[:, 0]
        table = self.full if run.kind is StepKind.REFRESH else self.lora
        run.binding.outputs["logits"][:, 0] = table[run.len_kept + index]


def log_probs(logits: Any) -> Any:
    """In float64, the plain way."""
    exact = np.asarray(logits, np.float64)
    return exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 tokens, batches of 8, half of the eligible layers dropped; the tokenizer has a token for each character."""
    root = tmp_path_factory.mktemp("eval") / "tiny"
    make_bundle("llama", root, drop_ratio=0.5)
    character_tokenizer(root)
    return root


def character_tokenizer(root: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, []))
    tokenizer.decoder = decoders.Fuse()
    (root / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(root / "tokenizer/tokenizer.json"))


# ── what is scored ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", [0, 1, 3])
def test_every_place_of_the_cycle_comes_as_often(k: int) -> None:
    """c = ⌊u (k+1)⌋ is uniform in 0 … k; at least one token stays in the prefill."""
    phases = [phase_of(7, "task", item) for item in range(4000)]
    assert all(0 <= phase < 1 for phase in phases)
    decoded = [20 - prompt_length(20, phase, k) for phase in phases]
    assert sorted(set(decoded)) == list(range(k + 1))
    assert all(abs(decoded.count(c) / 4000 - 1 / (k + 1)) < 0.03 for c in range(k + 1))
    assert {prompt_length(1, phase, k) for phase in phases} == {1}
    assert phase_of(7, "task", 1) != phase_of(8, "task", 1)


def test_a_ragged_batch_reads_each_row_at_its_own_positions() -> None:
    """Rows differ in prompt, in the first position read and in length; the offset is the step's, not the position's."""
    session, engine = open_session(PLAN, engine=LogitsEngine())
    assert isinstance(engine, LogitsEngine)
    generator = np.random.default_rng(0)
    rows = [
        Row(generator.integers(0, VOCAB, length), prompt, first)
        for length, prompt, first in ((9, 3, 4), (14, 8, 7), (5, 1, 3), (7, 6, 5))
    ]
    seen: dict[tuple[int, int], int] = {}
    for read in decode(session, rows, 2):
        for row, position, target, own in zip(read.rows, read.positions, read.targets, read.log_probs, strict=True):
            seen[int(row), int(position)] = read.offset
            assert target == rows[row].ids[position + 1]
            table = engine.lora if read.offset else engine.full
            np.testing.assert_allclose(own, log_probs(table[position]), atol=1e-5)
    expected = {}
    for index, row in enumerate(rows):
        for position in range(row.first, len(row.ids) - 1):
            expected[index, position] = (position - (row.prompt - 1)) % 3
    assert seen == expected
    # What each row was fed, over the steps: its own tokens, then padding
    fed = np.stack([run.input_ids[:, 0] for run in engine.runs[1:]], axis=1)
    for index, row in enumerate(rows):
        rest = row.ids[row.prompt :]
        assert fed[index, : len(rest)].tolist() == rest[: fed.shape[1]].tolist()
        assert not fed[index, len(rest) :].any()


def test_scores_of_a_batch() -> None:
    session, engine = open_session(PLAN, engine=LogitsEngine())
    assert isinstance(engine, LogitsEngine)
    likeliest = engine.full[4:7].argmax(axis=1)
    rows = [
        Row(np.array([1, 2, 3, 4, 5, *likeliest]), 5, 4),  # position 4 by the prefill, then two refreshes
        Row(np.array([1, 2, 3, 4, 5, 6]), 3, 4),
    ]
    first, second = score(session, rows, 0)
    full = log_probs(engine.full)
    assert first.greedy
    assert first.log_prob == pytest.approx(sum(full[4 + i, token] for i, token in enumerate(likeliest)), abs=1e-5)
    assert not second.greedy
    assert second.log_prob == pytest.approx(full[4, 6], abs=1e-5)
    (under_lora,) = score(session, rows[1:], 3)
    assert under_lora.log_prob == pytest.approx(log_probs(engine.lora)[4, 6], abs=1e-5)


def test_batches_hold_what_the_bundle_allows() -> None:
    from lora_drop_runtime.bundle.manifest import Limits

    session, _ = open_session(PLAN, limits=Limits(max_seq_len=20, max_prompt_len=19, max_batch=3))
    lengths = ((10, 5), (20, 19), (20, 2), (6, 5), (7, 6), (8, 7), (9, 8))
    rows = [Row(np.zeros(length, np.int64), prompt, prompt - 1) for length, prompt in lengths]
    found = list(batches(session, rows))
    assert sorted(index for batch in found for index in batch) == list(range(len(rows)))
    for batch in found:
        assert len(batch) <= 3
        assert max(rows[i].prompt for i in batch) + max(rows[i].steps for i in batch) + 1 <= 20
    assert len(found) == 4  # 20 tokens of which 2 are a prompt do not go with a prompt of 19


def test_log_softmax_of_large_and_of_no_numbers() -> None:
    logits = np.array([[1e4, 1e4 - 1, 0], [-3e38, 0, 1]], np.float32)
    found = log_softmax(logits)
    assert found[0, :2] == pytest.approx([-math.log1p(math.exp(-1)), -1 - math.log1p(math.exp(-1))], rel=1e-6)
    assert np.exp(found).sum(axis=1) == pytest.approx([1, 1])
    with pytest.raises(BundleError, match="not numbers"):
        log_softmax(np.array([[0, np.nan]], np.float32))


@pytest.mark.parametrize("k", [1, 3])
def test_sums_of_windows(k: int) -> None:
    """Against a loop over positions in float64: tokens, −log p, the full schedule's, agreement, KL, for each offset."""
    session, engine = open_session(PLAN, engine=LogitsEngine())
    assert isinstance(engine, LogitsEngine)
    generator = np.random.default_rng(1)
    windows = [Window(generator.integers(0, VOCAB, 30), 6, phase) for phase in (0.0, 0.4, 0.99)]
    found: dict[int, list[Any]] = {}
    score_windows(session, windows, [0, k], lambda k, sums: found.update({k: sums}))
    full, lora = log_probs(engine.full), log_probs(engine.lora)
    for window, own, own_full in zip(windows, found[k], found[0], strict=True):
        expected = np.zeros((k + 1, 5))
        prompt = 6 - int(window.phase * (k + 1))
        for position in range(6, 29):
            step = position - (prompt - 1)
            assert step >= 1  # never the prefill
            here = full[position] if step % (k + 1) == 0 else lora[position]
            token = window.ids[position + 1]
            expected[step % (k + 1)] += (
                1,
                -here[token],
                -full[position][token],
                here.argmax() == full[position].argmax(),
                (np.exp(full[position]) * (full[position] - here)).sum(),
            )
        np.testing.assert_allclose(own, expected, atol=1e-4)
        assert own[0, 3] == own[0, 0]
        assert own[0, 4] == pytest.approx(0, abs=1e-9)  # this engine's refresh is exact
        np.testing.assert_allclose(own_full, [[23, expected[:, 2].sum(), expected[:, 2].sum(), 23, 0]], atol=1e-4)
    # Perplexities and means from the sums
    figures = text_figures(found[k], seed=0)
    total = np.sum(found[k], axis=(0, 1))
    assert figures.tokens == 69
    assert figures.perplexity.value == pytest.approx(math.exp(total[1] / 69))
    assert figures.ratio.value == pytest.approx(math.exp((total[1] - total[2]) / 69))
    assert figures.agreement.value == total[3] / 69
    lora_sums = np.sum([sums[1:] for sums in found[k]], axis=(0, 1))
    assert figures.lora_agreement is not None
    assert figures.lora_kl is not None
    assert figures.lora_agreement.value == lora_sums[3] / lora_sums[0]
    assert figures.lora_kl.value == pytest.approx(lora_sums[4] / lora_sums[0])
    assert [one.offset for one in figures.offsets] == list(range(k + 1))
    assert figures.offsets[0].ratio == pytest.approx(1)


def test_windows_at_once_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    session, _ = open_session(PLAN)
    window = Window(np.zeros(30, np.int64), 6, 0.0)
    assert windows_at_once(session, window) == 8  # the bundle's
    monkeypatch.setattr(eval_scoring, "KEPT_BYTES", 2 * 23 * VOCAB * 4)
    assert windows_at_once(session, window) == 2
    monkeypatch.setattr(eval_scoring, "KEPT_BYTES", 1)
    assert windows_at_once(session, window) == 1


def test_the_full_schedule_scores_what_pytorch_does(bundle: Path) -> None:
    """Continuations of ragged rows under k = 0, whatever part of the context is decoded, against one forward pass."""
    generator = np.random.default_rng(2)
    rows, expected = [], []
    for context, continuation, decoded in ((7, 4, 0), (12, 1, 3), (3, 9, 2), (20, 2, 1)):
        ids = generator.integers(0, 131, context + continuation)
        with torch.no_grad():
            logits = family("llama").model(torch.tensor(ids[None])).logits[0].double()
        by_torch = torch.log_softmax(logits, -1)[context - 1 : -1].gather(1, torch.tensor(ids[context:, None]))
        rows.append(Row(ids, context - decoded, context - 1))
        expected.append(float(by_torch.sum()))
    with Session.open(bundle, threads=1) as session:
        assert [one.log_prob for one in score(session, rows, 0)] == pytest.approx(expected, abs=1e-3)
        under_lora = score(session, rows, 3)
        assert under_lora[0].log_prob != pytest.approx(expected[0], abs=1e-3)


def test_generated_texts_end_at_stop_strings_and_end_tokens(bundle: Path) -> None:
    from lora_drop_runtime.text import TextCodec

    codec = TextCodec.open(bundle / "tokenizer")
    prompts = [codec.encode(text) for text in ("The tide", "a", "12 boats and")]
    with Session.open(bundle, threads=1) as session:
        plain = [codec.decode(row) for row in session.generate(prompts, 12, k=1)]
        assert generate_texts(session, codec, prompts, [], 12, 1) == plain
        stop = plain[0][4:6]
        cut = generate_texts(session, codec, prompts, [stop], 12, 1)
        assert cut == [text.split(stop)[0] for text in plain]
        assert len(generate_texts(session, codec, prompts, [plain[0][0]], 1, 1)[1]) == 1


# ── intervals ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_share() -> None:
    """Wilson's interval of 8 of 10 and of 0 of 20, as in textbooks."""
    figure = share(8, 10)
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert (share(0, 20).low, share(0, 20).high) == pytest.approx((0, 0.1611), abs=1e-4)


def test_paired_difference_by_hand() -> None:
    """10 items, 3 lost, 1 won: −0.2; ½ in each cell: −2/12 ± 1.96 √(4 + 1 − 4/12) / 12."""
    full = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    ours = [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    figure = paired_difference(ours, full)
    half = 1.959964 * math.sqrt(5 - 4 / 12) / 12
    assert (figure.value, figure.low, figure.high) == pytest.approx((-0.2, -1 / 6 - half, -1 / 6 + half))
    same = paired_difference(full, full)
    assert same.value == 0
    assert same.low < 0 < same.high  # nothing lost in ten items is no proof


def test_bootstrap() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(3, 2, 400)
    figure = bootstrap(values, np.ones(400), seed=1)
    assert figure.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert (figure.value - figure.low, figure.high - figure.value) == pytest.approx((half, half), rel=0.15)
    assert bootstrap(values, np.ones(400), seed=1) == figure
    assert bootstrap([2.0, 4.0], [1.0, 3.0], 0).value == 1.5  # a ratio of sums
    assert bootstrap([0.0, 0.0], [1.0, 1.0], 0, np.exp) == Figure(1, 1, 1, 2)


def test_average_and_perplexity_of_items() -> None:
    mean = average([Figure(0.5, 0.4, 0.6, 10), Figure(0.7, 0.5, 0.9, 10)])
    half = math.hypot(0.1, 0.2) / 2
    assert (mean.value, mean.low, mean.high, mean.count) == pytest.approx((0.6, 0.6 - half, 0.6 + half, 2))
    items = {4: {"perplexity": -1.0, "acc": 1.0}, 9: {"perplexity": -3.0, "acc": 0.0}}
    full = {4: {"perplexity": -1.0, "acc": 1.0}, 9: {"perplexity": -2.0, "acc": 1.0}}
    figures = task_figures("acc", items, full, 0, 0)
    assert figures.metrics["perplexity"].value == pytest.approx(math.exp(2))
    assert figures.figure.value == 0.5
    assert figures.difference is not None
    assert figures.difference.value == -0.5


def row(k: int, speedup: float | None, difference: float | None, half: float = 0.001) -> EvalRow:
    figure = None if difference is None else Figure(difference, difference - half, difference + half, 3)
    return EvalRow(
        "b", "b", "residual", 0, (4,), 0.25, "skip" if k else "full", k, 1000, speedup, None, {}, None, figure
    )


def test_safe_zone_by_hand() -> None:
    rows = [row(0, 1.0, None), row(1, 1.1, -0.002), row(2, 1.2, -0.004), row(3, 1.3, -0.009), row(5, 1.5, -0.02)]
    half, one = safe_zones(rows)
    assert (half.threshold, half.row, half.certain) == (0.005, rows[2], True)
    assert (one.threshold, one.row, one.certain) == (0.01, rows[3], True)
    wide = [row(0, 1.0, None), row(1, 1.1, 0.003, half=0.02)]
    assert [(zone.row, zone.certain) for zone in safe_zones(wide)] == [(wide[1], False)] * 2
    assert [zone.row for zone in safe_zones([row(0, 1.0, None), row(3, 1.3, -0.5), row(1, 0.9, 0.0)])] == [None, None]
    assert safe_zones([row(0, None, None), row(3, None, 0.0)]) == []  # nothing was timed
    assert safe_zones([row(0, 1.0, None), row(3, 1.3, None)]) == []  # no task


# ── what is kept ───────────────────────────────────────────────────────────────────────────────────────────────


def test_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "a/b", {"bundle": "x"})
    store["skip", 3, "task", 5] = [1.5, True]
    store["skip", 3, "task", 6] = "text\nof two lines"
    (path,) = (tmp_path / "a/b").iterdir()
    assert json.loads(path.read_text().splitlines()[0])["bundle"] == "x"
    again = Store(tmp_path / "a/b", {"bundle": "x"})
    assert again["skip", 3, "task", 5] == [1.5, True]
    assert again["skip", 3, "task", 6] == "text\nof two lines"
    other = Store(tmp_path / "a/b", {"bundle": "y"})
    assert ("skip", 3, "task", 5) not in other
    # A run that was killed while it wrote
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    cut = Store(tmp_path / "a/b", {"bundle": "x"})
    assert ("skip", 3, "task", 5) in cut
    assert ("skip", 3, "task", 6) not in cut
    cut["skip", 3, "task", 6] = "text\nof two lines"
    assert path.read_bytes() == whole
    path.write_bytes(whole[:20])  # in its first line
    assert ("skip", 3, "task", 5) not in Store(tmp_path / "a/b", {"bundle": "x"})
    path.write_bytes(whole.replace(b'"task", 5]', b'"task", 5'))
    with pytest.raises(InputError, match="damaged"):
        Store(tmp_path / "a/b", {"bundle": "x"})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be kept"):
        Store(tmp_path / "file", {})
    memory = Store(None, {})
    memory["a", 1] = 2
    assert memory["a", 1] == 2


def test_progress_in_lines_and_as_a_bar() -> None:
    lines = io.StringIO()
    with Progress("text", 3, lines) as progress:
        progress.advance(3)
    assert lines.getvalue().startswith("text: 3 in ")
    nothing = io.StringIO()
    with Progress("text", 0, nothing):
        pass
    assert nothing.getvalue() == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    with Progress("text", 4, terminal) as progress:
        progress.advance()
    assert "█" * 6 + "░" * 18 + " 1 of 4" in terminal.getvalue()


# ── the command ────────────────────────────────────────────────────────────────────────────────────────────────

OPTIONS = ["--window", "48", "--prompt", "8", "--windows", "5", "--threads", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def count_prefills(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Notes the k of each prefill; with `interrupt_at`, Ctrl-C is pressed in one."""

    def install(interrupt_at: int = -1) -> list[int]:
        seen: list[int] = []
        plain = Session.prefill

        def prefill(self: Session, *arguments: Any, **options: Any) -> Any:
            seen.append(options["k"])
            if len(seen) == interrupt_at:
                raise KeyboardInterrupt
            return plain(self, *arguments, **options)

        monkeypatch.setattr(Session, "prefill", prefill)
        return seen

    return install


def test_command_on_a_text(bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, plots = tmp_path / "figures.json", tmp_path / "plots"
    timed = [
        {"bundle": "tiny", "k": k, "context": context, "rows": rows, "speedup": 1 + k / 10 + context / 1000}
        for rows in (1, 2)
        for context in (8, 100)
        for k in (0, 1, 3)
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"rows": timed}))
    options = [*OPTIONS, "--k", "1,3", "--policy", "skip,backfill", "--text", str(text), "--label", "ours"]
    options += ["--bench", str(tmp_path / "bench.json"), "--json", str(written), "--plots", str(plots)]
    assert main(["eval", str(bundle), *options]) == 0
    data = json.loads(written.read_text())
    assert [(one["policy"], one["k"]) for one in data["rows"]] == [
        ("full", 0),
        ("skip", 1),
        ("skip", 3),
        ("backfill", 1),
        ("backfill", 3),
    ]
    full, skip_1, skip_3, backfill_1, _ = data["rows"]
    assert full["text"]["ratio"]["value"] == 1
    assert full["text"]["tokens"] == skip_3["text"]["tokens"] == 5 * 39
    assert skip_1["text"]["perplexity"]["value"] == pytest.approx(
        full["text"]["perplexity"]["value"] * skip_1["text"]["ratio"]["value"]
    )
    # A refresh under backfill is exact, under skip it sees holes
    assert backfill_1["text"]["offsets"][0]["agreement"] == 1
    assert backfill_1["text"]["offsets"][0]["kl"] == pytest.approx(0, abs=1e-4)
    assert skip_1["text"]["offsets"][0]["kl"] > 1e-3
    assert [one["speedup"] for one in data["rows"]] == pytest.approx([1.1, 1.2, 1.4, None, None])
    manifest = Session.open(bundle, threads=1).bundle.manifest
    assert skip_3["kv_bytes"] == sum(costs.kv_bytes(manifest, *KV_REQUEST, 3))
    assert backfill_1["kv_bytes"] == full["kv_bytes"] == costs.kv_base_bytes(manifest, sum(KV_REQUEST))
    assert data["arguments"]["k"] == [1, 3]
    assert data["arguments"]["seed"] == data["seed"] == 0
    assert data["machine"]["versions"]["numpy"]
    printed = capsys.readouterr()
    assert "tiny" not in printed.out
    for part in ("ours k=3 backfill", "LoRA 3", "over full", "context 100, batch 1", "1.40×"):
        assert part in printed.out
    assert "text, k = 0, 1, 3: 15 in" in printed.err
    assert sorted(path.name for path in plots.iterdir()) == [
        "offsets.png",
        "perplexity_kv.png",
        "perplexity_speedup.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots.iterdir())


def test_the_full_schedule_on_a_text_is_pytorch(bundle: Path, text: Path) -> None:
    """One window that is the whole text: its perplexity by one forward pass."""
    short = text.parent / "short.txt"
    short.write_text(TEXT[:100])
    result = eval(bundle, EvalSettings(k=(0,), text=short, window=100, prompt=20, threads=1), out=io.StringIO())
    from lora_drop_runtime.text import TextCodec

    ids = torch.tensor(TextCodec.open(bundle / "tokenizer").encode(TEXT[:100]))
    with torch.no_grad():
        logits = family("llama").model(ids[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[20:-1].double(), ids[21:]).exp()
    (only,) = result.rows
    assert only.text is not None
    assert only.text.tokens == 79
    assert only.text.perplexity.value == pytest.approx(float(expected), rel=1e-4)


def test_goes_on_where_it_was_cut_off(
    bundle: Path, text: Path, tmp_path: Path, count_prefills: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_scoring, "KEPT_BYTES", 2 * 39 * 131 * 4)  # two windows at once
    kept = ["--k", "1", "--text", str(text), "--out", str(tmp_path / "items")]
    arguments = ["eval", str(bundle), *OPTIONS, *kept]
    with monkeypatch.context() as patch:
        patch.setattr(eval_module, "describe", lambda result: results.append(result) or [])
        results: list[Any] = []
        assert main(["eval", str(bundle), *OPTIONS, *kept[:-2]]) == 0
        seen = count_prefills(interrupt_at=4)
        assert main(arguments) == 130
        assert seen == [0, 1, 0, 1]
        (path,) = (tmp_path / "items").iterdir()
        path.write_bytes(path.read_bytes()[:-9])  # and the last line is half written
        patch.undo()
        patch.setattr(eval_module, "describe", lambda result: results.append(result) or [])
        seen = count_prefills()
        assert main(arguments) == 0
        assert seen == [0, 1, 0, 1]  # two windows of the five were whole
        first, second = (result.rows for result in results)
        for a, b in zip(first, second, strict=True):
            assert a.text is not None
            assert b.text is not None
            assert a.text.perplexity.value == pytest.approx(b.text.perplexity.value, rel=1e-5)
        seen.clear()
        assert main(arguments) == 0
        assert seen == []
        assert main([*arguments, "--windows", "3"]) == 0  # a subset of what is there
        assert seen == []
        assert main([*arguments, "--seed", "1", "--windows", "1"]) == 0  # another seed is another evaluation
        assert seen == [0, 1]


def test_another_bundle_is_not_taken_for_this_one(
    bundle: Path, text: Path, tmp_path: Path, count_prefills: Callable[..., list[int]]
) -> None:
    other = tmp_path / "other"
    make_bundle("llama", other, drop_ratio=0.25)
    character_tokenizer(other)
    seen = count_prefills()
    for path in (bundle, other, bundle):
        settings = EvalSettings(k=(1,), text=text, window=48, prompt=8, windows=1, out_dir=tmp_path / "i")
        eval(path, settings, out=io.StringIO())
    assert seen == [0, 1, 0, 1]
    assert len(list((tmp_path / "i").iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ([], "There is nothing to evaluate."),
        (["--text", "nowhere.txt"], "The text cannot be read."),
        (["--text", "SHORT"], "The text is too short."),
        (["--text", "TEXT", "--k", "-1"], "k must be a whole number"),
        (["--text", "TEXT", "--k", "x"], "The command line is not understood."),
        (["--text", "TEXT", "--policy", "none"], "Unknown refresh policy."),
        (["--text", "TEXT", "--policy", ""], "There is no refresh policy."),
        (["--text", "TEXT", "--k", "9"], "A window has no room for a prompt and a whole cycle."),
        (["--text", "TEXT", "--window", "12"], "A window has no room for a prompt and a whole cycle."),
        (["--text", "TEXT", "--window", "129"], "A window is longer than a bundle allows."),
        (["--text", "TEXT", "--windows", "0"], "There is nothing to evaluate."),
        (["--text", "TEXT", "--limit", "0"], "There is nothing to evaluate."),
        (["--text", "TEXT", "--label", "a", "--label", "b"], "The labels do not fit the bundles."),
        (["--text", "TEXT", "--target", "tensorrt"], "The bundle cannot run on that target."),
        (["--text", "TEXT", "--json", "nowhere/at/all.json"], "The results cannot be written."),
        (["--text", "TEXT", "--out", "TEXT"], "The results cannot be kept."),
        (["--text", "TEXT", "--bench", "nowhere.json"], "The measured speed-ups cannot be read."),
        (["--text", "TEXT", "--bench", "OTHER"], "The measured speed-ups are of other bundles."),
        (["--text", "TEXT", "--bench", "TEXT"], "The measured speed-ups cannot be read."),
        (["--tasks", "arc_hard", "--data", "."], "Unknown task."),
        (["--tasks", "piqa,piqa", "--data", "."], "A task is named twice."),
        (["--tasks", "piqa"], "A task's data file is missing."),
        (["--tasks", "piqa", "--data", "DIR"], "A task's data file is not what the task takes."),
        (["--tasks", "arc_easy", "--data", "DIR"], "A task's data file is not what the task takes."),
        (["--tasks", "hellaswag", "--data", "DIR"], "A task's data file is not what the task takes."),
        (["--tasks", "humaneval", "--data", "DIR"], "A task's data file cannot be read."),
    ],
)
def test_refused_before_any_work(
    options: list[str],
    fact: str,
    bundle: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr(Session, "open", work)
    (tmp_path / "short").write_text("a few words")
    (tmp_path / "bench.json").write_text(
        json.dumps({"rows": [{"bundle": "else", "k": 0, "context": 1, "rows": 1, "speedup": 1.0}]})
    )
    (tmp_path / "piqa.jsonl").write_text(
        '{"choices": ["a", "b"], "gold": 0, "query": "Question: c\\n"}\n{"choices": 1}\n'
    )
    (tmp_path / "arc_easy.jsonl").write_text("{")
    (tmp_path / "hellaswag_val.txt").write_text("A: b\n3\na\nb\nc\n")
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(b"\x1f\x8bnothing")
    names = {"TEXT": text, "SHORT": tmp_path / "short", "OTHER": tmp_path / "bench.json", "DIR": tmp_path}
    given = [str(names.get(option, option)) for option in options]
    assert main(["eval", str(bundle), "--window", "48", "--prompt", "8", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {fact}")
    assert "\nNote: " in error
    assert "\nHint: " in error


def test_a_bundle_without_a_tokenizer_is_refused(text: Path, tmp_path: Path) -> None:
    make_bundle("llama", tmp_path / "b")
    with pytest.raises(InputError, match="no tokenizer"):
        eval(tmp_path / "b", EvalSettings(text=text, window=48, prompt=8))
