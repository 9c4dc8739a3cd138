"""`lora-drop eval` on a text: its figures, where it goes on, what it refuses. Tasks have a folder of their own."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import Calibration
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError
from lora_drop_tools.cli import main
from lora_drop_tools.eval import scoring as eval_scoring
from lora_drop_tools.eval.calibrate import store_calibration
from lora_drop_tools.eval.eval import eval
from lora_drop_tools.eval.settings import EvalSettings
from lora_drop_tools.shared import costs

from lora_drop_export.compiler.add_target import add_target
from lora_drop_export.compiler.options import ExportOptions
from tests.support.bundles import family, make_bundle
from tests.support.tokenizers import character_tokenizer

eval_module = importlib.import_module("lora_drop_tools.eval.eval")  # the name in the package is the function
TEXT = "".join(f"{a} boats and {b} gulls; the tide is {a * b}.\n" for a in range(12) for b in range(6))
EXAMPLES = Path(__file__).parents[3] / "examples/eval"
OPTIONS = ["--window", "48", "--prompt", "8", "--windows", "5", "--threads", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(("policy", "dropped"), [("skip", 32 + 19), ("backfill", 32 + 5 * 19), ("lossless", 32 + 96)])
def test_kv_of_a_request_that_ends_within_a_cycle(policy: str, dropped: int, bundle: Path, text: Path) -> None:
    """Eq. 13: dropped layers lack the tokens since the last of 19 refreshes."""
    given = EvalSettings(text=text, k=(4,), policies=(policy,), window=48, prompt=8, windows=1, threads=1)
    result = eval(bundle, given, out=io.StringIO())
    assert result.kv_request == (32, 96)
    manifest = Bundle.open(bundle).manifest
    lacking = (128 - dropped) * len(manifest.plan.sites)
    assert result.rows[-1].kv_bytes == costs.kv_base_bytes(manifest, 128) - lacking * manifest.model.token_kv_bytes([0])


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


def test_command_on_a_text(
    bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written, plots = tmp_path / "figures.json", tmp_path / "plots"
    timed = [
        {"bundle": "tiny", "k": k, "context": context, "rows": rows, "speedup": 1 + k / 10 + context / 1000}
        for rows in (1, 2)
        for context in (8, 100)
        for k in (0, 1, 3)
    ]
    timed.append({**timed[-1], "rows": 1, "schedule": "margin"})
    (tmp_path / "bench.json").write_text(json.dumps({"rows": timed, "engine": "ort"}))
    options = [*OPTIONS, "--k", "1,3", "--policy", "skip,backfill", "--text", str(text), "--label", "ours"]
    options += ["--bench", str(tmp_path / "bench.json"), "--json", str(written), "--plots", str(plots)]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lora-drop", "eval", str(bundle), *options])
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
    assert data["kv_request"] == [32, 96]  # no more than the bundle's 128 tokens
    assert skip_3["kv_bytes"] == sum(costs.kv_bytes(manifest, 32, 96, 3))
    assert backfill_1["kv_bytes"] == full["kv_bytes"] == costs.kv_base_bytes(manifest, 128)
    assert data["command"].startswith(f"lora-drop eval {bundle.name} --window 48")
    assert str(tmp_path) not in written.read_text()  # who reads it need not know where the files lay
    assert data["arguments"]["text"] == text.name
    assert data["arguments"]["k"] == [1, 3]
    assert data["arguments"]["seed"] == data["seed"] == 0
    assert data["machine"]["versions"]["numpy"]
    printed = capsys.readouterr()
    assert "tiny" not in printed.out
    measured = "by lora-drop bench for k=1 skip, k=3 skip, k=3 skip margin over k = 0, context 100, batch 1, engine ort"
    for part in ("ours k=3 backfill", "LoRA 3", "over full", measured, "1.40×"):
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


def test_what_is_kept_of_a_bundle_outlives_a_threshold_and_another_target(
    text: Path, tmp_path: Path, count_prefills: Callable[..., list[int]]
) -> None:
    """Neither changes what its target writes."""
    root = make_bundle("llama", tmp_path / "b", drop_ratio=0.5).root
    character_tokenizer(root)
    settings = EvalSettings(k=(1,), text=text, window=48, prompt=8, windows=1, out_dir=tmp_path / "i")
    seen = count_prefills()
    before = eval(root, settings, out=io.StringIO())
    threshold = Calibration(1.0, 3, "skip", 0.9, 0.91, 0.4, 93, 0.89, 0.41, 93)
    store_calibration(Bundle.open(root), {"margin": threshold})
    add_target(root, ["openvino"], ExportOptions(verify=False))
    after = eval(root, settings, out=io.StringIO())
    assert seen == [0, 1]
    assert [row.text for row in after.rows] == [row.text for row in before.rows]
    eval(root, dataclasses.replace(settings, target="openvino"), out=io.StringIO())
    assert seen == [0, 1, 0, 1]


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
        (["--text", "TEXT", "--k", "-1"], "--k is too small."),
        (["--text", "TEXT", "--k", "x"], "The command line is not understood."),
        (["--text", "TEXT", "--policy", "none"], "Unknown refresh policy."),
        (["--text", "TEXT", "--policy", ""], "The command line is not understood."),
        (["--text", "TEXT", "--k", "9"], "A window has no room for a prompt and a whole cycle."),
        (["--text", "TEXT", "--window", "12"], "A window has no room for a prompt and a whole cycle."),
        (["--text", "TEXT", "--window", "129"], "A window is longer than a bundle allows."),
        (["--text", "TEXT", "--windows", "0"], "--windows is too small."),
        (["--text", "TEXT", "--limit", "0"], "--limit is too small."),
        (["--text", "TEXT", "--label", "a", "--label", "b"], "The labels do not fit the bundles."),
        (["--text", "TEXT", "--aim", "1"], "--aim would change nothing."),
        (["--tasks", "piqa", "--k", "0", "--aim", "1"], "--aim would change nothing."),
        (["--tasks", "piqa", "--aim", "0"], "--aim is too small."),
        (["--text", "TEXT", "--policy", "lossless", "--lenience", "0.5"], "--lenience would change nothing."),
        (["--tasks", "piqa", "--policy", "skip,backfill", "--lenience", "0.5"], "--lenience would change nothing."),
        (["--tasks", "piqa", "--k", "0", "--lenience", "0.5"], "--lenience would change nothing."),
        (["--tasks", "piqa", "--lenience", "0.5"], "The policy has no drafts."),
        (["--tasks", "piqa", "--aim", "1", "--aim", "3"], "The aims do not fit the bundles."),
        (["--text", "TEXT", "--target", "tensorrt"], "The bundle cannot run on that target."),
        (["--text", "TEXT", "--json", "nowhere/at/all.json"], "The results cannot be written."),
        (["--text", "TEXT", "--out", "TEXT"], "The results cannot be kept."),
        (["--text", "TEXT", "--bench", "nowhere.json"], "The measured speed-ups cannot be read."),
        (["--text", "TEXT", "--bench", "OTHER"], "The measured speed-ups are of other bundles."),
        (["--text", "TEXT", "--bench", "TEXT"], "The measured speed-ups cannot be read."),
        (["--text", "TEXT", "--bench", "WORDS"], "The measured speed-ups cannot be read."),
        (["--tasks", "arc_hard"], "Unknown task."),
        (["--tasks", "piqa,piqa"], "--tasks names a value twice."),
        (["--tasks", "piqa", "--include-path", "nowhere"], "There are no definitions of tasks."),
        (["--tasks", "piqa", "--include-path", "DIR"], "A definition of a task cannot be read."),
        (["--tasks", "piqa", "--num-fewshot", "-1"], "--num-fewshot is too small."),
        (["--tasks", "local_piqa", "--include-path", "EXAMPLES"], "The data of a task cannot be had."),
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
    (tmp_path / "words.json").write_text((tmp_path / "bench.json").read_text().replace("1.0", '"fast"'))
    (tmp_path / "broken.yaml").write_text("task: [")
    names = {
        "TEXT": text,
        "SHORT": tmp_path / "short",
        "OTHER": tmp_path / "bench.json",
        "WORDS": tmp_path / "words.json",
        "DIR": tmp_path,
        "EXAMPLES": EXAMPLES,
    }
    given = [str(names.get(option, option)) for option in options]
    windows = ["--window", "48", "--prompt", "8"] if "--text" in options else []
    assert main(["eval", str(bundle), *windows, *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {fact}")
    assert "\nNote: " in error
    assert "\nHint: " in error


@pytest.mark.parametrize("k", [9, 31, 63, 1000])
def test_the_hint_for_a_long_cycle_names_windows_that_have_room(k: int, text: Path) -> None:
    with pytest.raises(InputError) as raised:
        EvalSettings(text=text, k=(k,), window=24, prompt=8)
    window, prompt = map(int, re.findall(r"\d+", raised.value.hint))
    EvalSettings(text=text, k=(k,), window=window, prompt=prompt)
    with pytest.raises(InputError, match="no room"):
        EvalSettings(text=text, k=(k,), window=window - 1, prompt=prompt)


def test_a_name_with_a_line_s_end_breaks_no_table(text: Path, tmp_path: Path) -> None:
    root = make_bundle("llama", tmp_path / "one\ntwo", drop_ratio=0.5).root
    character_tokenizer(root)
    out = io.StringIO()
    eval(root, EvalSettings(k=(1,), text=text, window=48, prompt=8, windows=1), out=out)
    lines = [line for line in out.getvalue().splitlines() if "two" in line]
    assert any(line.startswith(r"one\ntwo k=1 skip") for line in lines)
    assert all(r"one\ntwo" in line for line in lines)


def test_one_token_is_no_tokens(bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(bundle), "--prompt", "a", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().err.startswith("1 token in ")
    (tmp_path / "short").write_text("a")
    assert main(["eval", str(bundle), "--text", str(tmp_path / "short")]) == 2
    assert "It has 1 token, a window takes 128." in capsys.readouterr().err


def test_the_prompt_grows_with_the_cycle_where_none_is_given(text: Path) -> None:
    assert EvalSettings(text=text).prompt_tokens == 32
    assert EvalSettings(text=text, k=(5, 63)).prompt_tokens == 64


def test_a_bundle_without_a_tokenizer_is_refused(text: Path, tmp_path: Path) -> None:
    make_bundle("llama", tmp_path / "b")
    with pytest.raises(InputError, match="no tokenizer"):
        eval(tmp_path / "b", EvalSettings(text=text, window=48, prompt=8))


def test_a_prompt_that_a_bundle_does_not_allow(text: Path, tmp_path: Path) -> None:
    root = make_bundle("llama", tmp_path / "b", drop_ratio=0.5, max_prompt_len=16).root
    character_tokenizer(root)
    with pytest.raises(InputError, match=r"A prompt is longer.*\nNote: --prompt is 17, b allows 16\.\n.*-prompt-len"):
        eval(root, EvalSettings(k=(1,), text=text, window=48, prompt=17))
