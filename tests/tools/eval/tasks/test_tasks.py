"""`lora-drop eval --tasks`, from the command line to its tables, on a tiny bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime.decoding.batch import Batch
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.text import TextCodec
from lora_drop_tools.cli import main
from lora_drop_tools.eval.store import Store
from lora_drop_tools.eval.texts import Wish, Writer

pytest.importorskip("lm_eval", reason="lm-eval, of the extra `eval`, is not installed")

from lora_drop_tools.eval.tasks import program as programs
from lora_drop_tools.eval.tasks import run as runs
from lora_drop_tools.eval.tasks.catalogue import open_tasks
from lora_drop_tools.eval.tasks.program import runs_to_its_end, why_not_apart

from .support import define

PROBLEM = {
    "task_id": "T/0",
    "prompt": "def add(a, b):\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
    "entry_point": "add",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("definitions")
    wet = {"question": "Which is wet?", "choices": {"text": ["a stone", "the sea"], "label": ["A", "B"]}}
    dry = {"question": "Which is dry?", "choices": {"text": ["a fish", "sand"], "label": ["A", "B"]}}
    define(root, "arc_easy", "arc/arc_easy.yaml", [{**wet, "answerKey": "B"}, {**dry, "answerKey": "B"}])
    texts = ["The boat sank, so he bought a boat", "Nets are dry and ropes are dry"]
    define(root, "lambada_openai", "lambada/lambada_openai.yaml", [{"text": text} for text in texts])
    solved = [{"question": f"{i}+0?", "answer": f"#### {i}"} for i in range(6)]
    define(root, "gsm8k", "gsm8k/gsm8k.yaml", [{"question": "1+1?", "answer": "It is 2.\n#### 2"}], solved)
    for name, count in (("mmlu_anatomy", 4), ("mmlu_virology", 2)):
        rows = [
            {"question": f"Which is {i}?", "choices": ["one", "two", "six", "ten"], "answer": i} for i in range(count)
        ]
        define(root, name, f"mmlu/default/{name}.yaml", rows, rows)
    group = {"group": "biology", "task": ["mmlu_anatomy", "mmlu_virology"]}
    group |= {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (root / "biology.yaml").write_text(json.dumps(group))
    define(root, "wikitext", "wikitext/wikitext.yaml", [{"page": "The sea is wide."}, {"page": "The boat is old."}])
    define(root, "humaneval", "humaneval/humaneval.yaml", [PROBLEM])
    return root


def test_command_on_tasks(
    bundle: Path,
    directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ["arc_easy", "lambada_openai", "gsm8k", "biology", "wikitext"]
    timed = [{"bundle": "tiny", "k": k, "context": 64, "rows": 1, "speedup": 1 + k / 10} for k in (0, 1)]
    (tmp_path / "bench.json").write_text(json.dumps({"rows": timed}))
    options = ["--tasks", ",".join(names), "--include-path", str(directory), "--k", "1", "--threads", "1"]
    options += ["--out", str(tmp_path / "items"), "--bench", str(tmp_path / "bench.json")]
    options += ["--json", str(tmp_path / "figures.json"), "--plots", str(tmp_path / "plots"), "--aim", "1.5"]
    assert main(["eval", str(bundle), *options]) == 0
    printed = capsys.readouterr()
    full, ours = json.loads((tmp_path / "figures.json").read_text())["rows"]
    tasks = full["tasks"]
    assert list(tasks) == ["arc_easy", "lambada_openai", "gsm8k", "mmlu_anatomy", "mmlu_virology", "wikitext"]
    assert tasks["arc_easy"]["metrics"]["acc"]["count"] == 2
    assert set(tasks["lambada_openai"]["metrics"]) == {"perplexity", "acc"}
    assert set(tasks["gsm8k"]["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert (tasks["wikitext"]["is_share"], ours["tasks"]["wikitext"]["difference"]) == (False, None)
    parts = [tasks[name]["metrics"]["acc"]["value"] for name in ("mmlu_anatomy", "mmlu_virology")]
    group = full["groups"]["biology"]
    assert group["figure"]["value"] == pytest.approx((4 * parts[0] + 2 * parts[1]) / 6)
    # A group counts once, and a perplexity does not
    shares = [tasks[name]["metrics"][tasks[name]["metric"]]["value"] for name in names[:3]]
    assert full["average"]["value"] == pytest.approx(np.mean([*shares, group["figure"]["value"]]))
    assert full["average_difference"] is None
    differences = [ours["tasks"][name]["difference"]["value"] for name in names[:3]]
    differences.append(ours["groups"]["biology"]["difference"]["value"])
    assert ours["average_difference"]["value"] == pytest.approx(np.mean(differences))
    tests = [ours["tasks"][name]["test"] for name in names[:3]] + [ours["groups"]["biology"]["test"]]
    whole = ours["average_test"]
    assert (whole["won"], whole["lost"]) == tuple(sum(test[what] for test in tests) for what in ("won", "lost"))
    assert (full["aim"], ours["aim"], full["average_test"]) == (None, 0.015, None)
    lines = {
        tuple(line.split()[3:4]): line.split()
        for line in printed.out.splitlines()
        if line.startswith("tiny k=1 skip ") and "[" not in line
    }
    assert lines["biology",][-3:-1] == [str(ours["groups"]["biology"]["test"][what]) for what in ("won", "lost")]
    assert lines["average",][4] == f"{100 * ours['average_difference']['value']:+.1f}"
    assert lines["wikitext",][4:] == ["–"] * 6
    assert "aim        tiny k=1 skip within 1.5 pp of the full model: " in printed.out
    assert "warning: tiny k=1 skip: the interval of average − full, ±" in printed.out
    heading = next(line for line in printed.out.splitlines() if line.startswith("tasks, %"))
    assert heading.split()[2:8] == ["ρ", *names]
    for part in (
        "metrics: arc_easy acc of 2",
        "biology acc of 6 in 2 tasks",
        "within groups, %",
        "wikitext: no share",
        "average − full, pp",
        "safe zone  within 0.5 pp",
    ):
        assert part in printed.out
    assert "arc_easy, k = 0: 4 in" in printed.err
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["accuracy_kv.png", "accuracy_speedup.png"]
    monkeypatch.setattr(Session, "prefill", lambda *_, **__: pytest.fail("it was measured again"))
    monkeypatch.setattr(Batch, "tick", lambda *_: pytest.fail("it was written again"))
    assert main(["eval", str(bundle), *options]) == 0
    assert capsys.readouterr().out == printed.out


@pytest.mark.parametrize(
    ("tasks", "lenience", "said"),
    [
        ("gsm8k", "0.5", None),
        ("gsm8k,arc_easy", "1", None),
        ("gsm8k,arc_easy,biology", "0.5", "arc_easy, mmlu_anatomy, mmlu_virology, --text"),
        ("arc_easy,wikitext", "0.5", ""),
    ],
)
def test_what_a_lenience_does_not_touch_is_said(
    tasks: str, lenience: str, said: str | None, bundle: Path, directory: Path, tmp_path: Path, capsys: Any
) -> None:
    """Scores are the full schedule's, so that rows of any lenience would be without a loss."""
    (tmp_path / "text.txt").write_text("The boat sank, so he bought a boat. " * 20)
    options = ["--include-path", str(directory), "--k", "1", "--policy", "lossless", "--threads", "1"]
    options += ["--text", str(tmp_path / "text.txt"), "--window", "64", "--windows", "1"] if said else []
    code = main(["eval", str(bundle), "--tasks", tasks, "--lenience", lenience, *options])
    printed = capsys.readouterr()
    assert code == (2 if said == "" else 0)
    assert ("--lenience would change nothing." in printed.err) == (said == "")
    warned = [line for line in printed.out.splitlines() if line.startswith("warning: --lenience judges")]
    assert [line.rsplit(": ", 1)[1] for line in warned] == ([said] if said else [])


def test_a_larger_limit_measures_only_what_is_new(
    bundle: Path, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gsm8k's kind too: the examples in the prompts of the items before are the same."""
    rows = [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(8)]
    define(tmp_path, "gsm8k", "gsm8k/gsm8k.yaml", rows, rows)
    asked: list[int] = []
    plain = Writer.write

    def write(self: Writer, wishes: Sequence[Wish], *others: Any) -> None:
        asked.append(len(wishes))
        plain(self, wishes, *others)

    monkeypatch.setattr(Writer, "write", write)
    given = ["--tasks", "gsm8k", "--include-path", str(tmp_path), "--k", "0", "--threads", "1"]
    for limit in (2, 5):
        assert main(["eval", str(bundle), *given, "--limit", str(limit), "--out", str(tmp_path / "items")]) == 0
    assert asked == [2, 3]


@pytest.fixture
def solving(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The model writes these texts, in turn."""
    texts: list[str] = []

    def write(self: Writer, wishes: Sequence[Wish], k: int, slots: int, done: Any) -> None:
        for index in range(len(wishes)):
            done(index, texts.pop(0))

    monkeypatch.setattr(Writer, "write", write)
    yield texts
    assert not texts


def test_a_solved_problem_passes_and_is_run_once(
    bundle: Path, directory: Path, solving: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_drop_tools.eval.tasks.model import SessionLM

    unsafe, ran = bool(why_not_apart()), []

    def run(program: str, **options: Any) -> bool:
        ran.append(program)
        return runs_to_its_end(program, **options)

    monkeypatch.setattr(runs, "runs_to_its_end", run)
    codec = TextCodec.open(bundle / "tokenizer")
    (one,) = open_tasks(["humaneval"], [directory], unsafe=unsafe).tasks.values()
    store = Store(None, {})
    solving += ["    return a + b\n", "    return a + b\n", "    return a - b\n"]
    with Session.open(bundle, threads=1) as session, Writer(bundle, codec, session.policy) as writer:
        for k, passes in ((0, 1.0), (1, 1.0), (2, 0.0)):
            model = SessionLM(session, codec, writer, k, 0, store, {"humaneval": one.places})
            assert runs.run_task(one, model, store, unsafe).items == {0: {"pass@1,create_test": passes}}
    first, second = ran  # that of k = 1 is that of k = 0
    assert first == "def add(a, b):\n    return a + b\n\n" + PROBLEM["test"] + "\ncheck(add)"
    assert second.startswith("def add(a, b):\n    return a - b\n")


def test_programs_that_cannot_be_cut_off_are_not_run(
    bundle: Path,
    directory: Path,
    solving: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(programs, "why_not_apart", lambda: "no namespaces")
    given = ["eval", str(bundle), "--tasks", "humaneval", "--include-path", str(directory), "--k", "0"]
    plain = Session.open
    monkeypatch.setattr(Session, "open", lambda *_, **__: pytest.fail("work has begun"))
    assert main(given) == 2
    error = capsys.readouterr().err
    assert "error: Programs that a model writes cannot be cut off from this machine." in error
    assert "--unsafe-code" in error
    monkeypatch.setattr(Session, "open", plain)
    solving.append("    return a + b\n")
    assert main([*given, "--unsafe-code", "--threads", "1"]) == 0
    assert "100.0" in capsys.readouterr().out
