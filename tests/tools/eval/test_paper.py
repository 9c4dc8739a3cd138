"""The paper's tables and Fig. 3: its own worked figures, and the lines that the user gets."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.errors import InputError
from lora_drop_tools.cli import main
from lora_drop_tools.eval import paper
from lora_drop_tools.eval.intervals import Figure
from lora_drop_tools.eval.paper import KvShape, described
from lora_drop_tools.eval.result import EvalResult, EvalRow, GroupFigures, TaskFigures
from lora_drop_tools.eval.settings import EvalSettings
from lora_drop_tools.shared import costs, results

from tests.support.eval_rows import eval_row


def test_the_papers_worked_figures() -> None:
    """n = 32, a = 4, p = 0.5, w = 4 saves 32.8 %; LLaMA3-8B at 4096 tokens holds 512 MiB."""
    llama3 = KvShape(32, 4, 2 * 8 * 128 * 2)
    assert llama3.saving(0.5, 3) == 0.875 * 0.5 * 0.75
    assert llama3.bytes_of(4096, 0, 1) == 512 * 2**20
    assert llama3.bytes_of(4096, 0.5, 3) == pytest.approx(512 * 2**20 * (1 - 0.328125))


@pytest.mark.parametrize("k", [1, 3])
def test_a_bundle_saves_what_its_curve_says(bundle: Path, k: int) -> None:
    manifest = Bundle.open(bundle).manifest
    shape = KvShape.of(manifest)
    assert (shape.layers, shape.always_on) == (8, 4)
    assert shape.saving(manifest.plan.rho, k) == pytest.approx(costs.kv_saving(manifest, k))
    assert shape.bytes_of(100, 0, k) == costs.kv_base_bytes(manifest, 100)


def figure(value: float) -> Figure:
    return Figure(value, value - 0.02, value + 0.02, 50)


def row(k: int, accuracy: float, speedup: float | None = None, rho: float = 0.5, **changed: object) -> EvalRow:
    task = TaskFigures("acc", {"acc": figure(accuracy)}, None, 0)
    group = GroupFigures("acc", figure(accuracy / 2), None, 50, ("mmlu_anatomy",), True, False)
    figures = {"tasks": {"piqa": task, "mmlu_anatomy": task}, "groups": {"mmlu": group}, "average": figure(accuracy)}
    return eval_row(k, speedup, rho, **(figures | changed))


def lines(name: str, *rows: EvalRow) -> list[list[str]]:
    """The cells of a table, less its title and what stands below."""
    result = EvalResult("", {}, "", {}, "m", "float32", 0, (1, 1), "")
    result.rows = list(rows)
    found = described(name, result)
    assert found[1] == paper.PAPER[name].title
    return [[cell for cell in line.split("  ") if cell.strip()] for line in found[3:]]


def test_table_1() -> None:
    """Groups have a column, their parts have none; methods of the literature have the paper's own ranges."""
    skipping = row(3, 0.4, 1.2, method="Unified Layer Skipping")
    headings, full, own, theirs, *_ = lines("table1", row(0, 0.5), row(3, 0.45, 1.3, rho=0.27), skipping)
    assert [cell.strip() for cell in headings[5:]] == [
        *("piqa", "mmlu", "average", "speed-up", "paper's speed-up", "paper's accuracy")
    ]
    assert [cell.strip() for cell in full] == [
        *("b", "full model", "–", "0", "full", "50.0 ±2.0", "25.0 ±2.0", "50.0 ±2.0", "1.00×", "1.00×", "not at hand")
    ]
    assert [cell.strip() for cell in own[-3:]] == ["1.30×", "1.34–1.39×", "not at hand"]
    assert [cell.strip() for cell in theirs[-3:]] == ["1.20×", "1.34–1.42×", "not at hand"]


def test_the_papers_numbers_stand_beside_its_own_method_and_window() -> None:
    """Table I's are of k = 3; what the paper says of LoRA-Drop it does not say of plain skipping."""
    skipping = row(3, 0.4, 1.2, method="Unified Layer Skipping")
    for k, theirs in ((1, "–"), (3, "1.68–1.73×"), (5, "–")):
        own = lines("table1", row(0, 0.5), row(k, 0.45, 1.3))[2]
        assert [cell.strip() for cell in own[-3:]] == ["1.30×", theirs, "not at hand"]
    _, full, plain, *_ = lines("table3", row(0, 0.5, method="Unified Layer Skipping"), skipping)
    assert [cell.strip() for cell in full[-2:]] == ["64.6 / 66.4 / 67.7", "1.00 / 1.00 / 1.00"]
    assert [cell.strip() for cell in plain[-2:]] == ["–", "–"]


def test_table_3() -> None:
    """A plan takes the paper's numbers of the ρ and k that are its own, and no others."""
    rows = (row(0, 0.5), row(2, 0.5, 1.1), row(3, 0.5, None, rho=0.46), row(4, 0.5), row(3, 0.5, rho=0.6))
    _, full, two, three, four, far, models = lines("table3", *rows)
    assert [cell.strip() for cell in full[-2:]] == ["64.6 / 66.4 / 67.7", "1.00 / 1.00 / 1.00"]
    assert [cell.strip() for cell in two[-3:]] == ["1.10×", "64.6 / 66.3 / 67.5", "1.55 / 1.58 / 1.45"]
    assert [cell.strip() for cell in three[-3:]] == ["–", "64.5 / 66.3 / 67.4", "1.68 / 1.73 / 1.70"]
    assert [cell.strip() for cell in four[-2:]] == ["–", "–"]
    assert [cell.strip() for cell in far[-2:]] == ["–", "–"]
    assert models == ["paper: LLaMA2-7B / Qwen2.5-7B / LLaMA3-8B"]
    assert "--bench" in lines("table3", row(0, 0.5), row(3, 0.5))[-1][0]


def test_table_5() -> None:
    rows = (
        *(row(0, 0.5), row(2, 0.5, 1.1, rank=4), row(2, 0.5, 1.05, rank=4, sites=("4.attn", "4.mlp"))),
        *(row(3, 0.5, 1.1, rank=4), row(2, 0.5, 1.2, rank=0)),
    )
    _, _, blocks, apart, other, bare, *_ = lines("table5", *rows)
    assert [cell.strip() for cell in blocks[5:]] == ["blocks", "50.0 ±2.0", "1.10×", "1.55 / 1.58 / 1.45"]
    assert [cell.strip() for cell in apart[5:]] == ["attention and MLP", "50.0 ±2.0", "1.05×", "1.37 / 1.39 / 1.27"]
    assert other[-1].strip() == "–"
    assert [cell.strip() for cell in bare[5:]] == ["none", "50.0 ±2.0", "1.20×", "–"]


def test_table_4(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"bundle": "tiny", "rho": 0.5, "k": k, "context": context, "rows": 1, "latency_ms": {"p50": 1 + k, "p95": 9}}
        | {"kv_bytes": {"kept": 2**20, "dropped": 2**19, "allocated": 2**22}}
        for context in (128, 4096)
        for k in (0, 3)
    ]
    others = [rows[1] | {"bundle": "other", "context": 9999}, rows[3] | {"schedule": "margin"}]
    (tmp_path / "bench.json").write_text(json.dumps({"rows": [*rows, *others]}))
    assert main(["eval", str(bundle), "--paper", "table4", "--bench", str(tmp_path / "bench.json")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Table IV: latency of a token and K/V over ρ and k"
    assert [line.split() for line in printed[3:5]] == [
        *(["tiny", "–", "0", "1.00", "9.00", "1.5", "not", "at", "hand"],),
        *(["tiny", "0.50", "3", "4.00", "9.00", "1.5", "not", "at", "hand"],),
    ]
    assert printed[5] == "context 4096, batch 1"
    (tmp_path / "bench.json").write_text(json.dumps({"rows": rows, "policy": "skip", "engine": "openvino"}))
    assert main(["eval", str(bundle), "--paper", "table4", "--bench", str(tmp_path / "bench.json")]) == 0
    assert capsys.readouterr().out.splitlines()[5] == "context 4096, batch 1, policy skip, engine openvino"
    lenient = {"rows": rows, "policy": "lossless", "lenience": 0.3}
    (tmp_path / "bench.json").write_text(json.dumps(lenient))
    assert main(["eval", str(bundle), "--paper", "table4", "--bench", str(tmp_path / "bench.json")]) == 0
    assert capsys.readouterr().out.splitlines()[5] == "context 4096, batch 1, policy lossless, lenience 0.3"
    (tmp_path / "bench.json").write_text(json.dumps({"rows": others}))
    assert main(["eval", str(bundle), "--paper", "table4", "--bench", str(tmp_path / "bench.json")]) == 2
    assert "has other; asked for are tiny" in capsys.readouterr().err


def test_fig_3(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(bundle), "--paper", "fig3", "--plots", str(tmp_path / "plots")]) == 0
    printed = capsys.readouterr().out
    assert "8 layers, 4 always on" in printed
    (half,) = (line.split() for line in printed.splitlines() if line.startswith("ρ = 0.50"))
    assert half[3:7] == ["12.5%", "16.7%", "18.8%", "20.8%"]  # ½ · ½ · k / (k + 1)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["paper_fig3_tiny.png"]
    assert (tmp_path / "plots/paper_fig3_tiny.png").read_bytes().startswith(b"\x89PNG")
    assert (
        main(["eval", str(bundle), "--paper", "fig3", "--plots", str(tmp_path / "plots")]) == 0
    )  # its own is replaced


@pytest.fixture
def not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """To draw a figure takes longer than all else."""
    monkeypatch.setattr(results, "figure_bytes", lambda _: b"")


@pytest.mark.usefixtures("not_drawn")
def test_figures_of_directories_of_one_name(bundle: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tiny").symlink_to(bundle)
    both = [str(tmp_path / name / "tiny") for name in ("a", "b")]
    assert main(["eval", *both, "--paper", "fig3", "--plots", str(tmp_path / "plots")]) == 0
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert len(names) == 2
    assert all(name.startswith("paper_fig3_") and name.endswith(("a-tiny.png", "b-tiny.png")) for name in names)


@pytest.mark.usefixtures("not_drawn")
def test_figures_of_names_that_differ_in_signs(bundle: Path, tmp_path: Path) -> None:
    """Which a file's name does not have: the second figure does not replace the first."""
    both = [str(shutil.copytree(bundle, tmp_path / name)) for name in ("rho=0.5", "rho 0.5")]
    assert main(["eval", *both, "--paper", "fig3", "--plots", str(tmp_path / "plots")]) == 0
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["paper_fig3_rho-0.5.png", "paper_fig3_rho-0.5_.png"]


def test_tasks_and_windows_of_a_table() -> None:
    settings = EvalSettings(paper="table3")
    assert settings.tasks == paper.TABLE_1
    assert settings.ks == [0, 1, 2, 3, 5]
    own = EvalSettings(paper="table3", tasks=("piqa",), k=(1,))
    assert (own.tasks, own.ks) == (("piqa",), [0, 1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--paper", "table4"), "--bench was not given"),
        (("--paper", "table4", "--tasks", "piqa"), "--paper table4 measures nothing"),
        (("--paper", "table4", "--target", "ort"), "--paper table4 measures nothing"),
        (("--paper", "fig3", "--k", "3"), "--paper fig3 measures nothing"),
        (("--paper", "fig3", "--threads", "1"), "--paper fig3 measures nothing"),
        (("--paper", "fig3", "--bench", "x.json"), "--paper fig3 measures nothing"),
        (("--paper", "table4", "--bench", "absent.json"), "absent.json"),
        (("--paper", "table9"), "table9"),
        (("--paper", "table1", "--calibrate", "0.9", "--text", "x"), "--paper"),
    ],
)
def test_refusals(bundle: Path, options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(bundle), *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Hint:" in error


def test_eval_in_python_measures(bundle: Path) -> None:
    from lora_drop_tools.eval.eval import eval

    with pytest.raises(InputError, match="reproduce"):
        eval(bundle, EvalSettings(paper="fig3"))


def test_reproduce_in_python_takes_one_bundle(bundle: Path) -> None:
    from lora_drop_tools.eval.eval import reproduce

    reproduce(str(bundle), EvalSettings(paper="fig3"), out=(out := io.StringIO()))
    assert "8 layers, 4 always on" in out.getvalue()


def test_reproduce_in_python_prints_no_other_table(bundle: Path) -> None:
    from lora_drop_tools.eval.eval import reproduce

    for settings in (EvalSettings(paper="table1"), EvalSettings(text=Path("x"))):
        with pytest.raises(InputError, match="reproduce measures nothing"):
            reproduce(bundle, settings)
