"""`python tools/gpu_check.py`: its stages over their stand-ins, and what it does with stages that go wrong."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gpu_check import command, decode, device, engines, speed
from gpu_check.anonymous import anonymous
from gpu_check.bundles import exported, small_checkpoint
from gpu_check.job import Failed, Job, Skip, Stage, runtime_path

from lora_drop_export.compiler import export as exporter
from lora_drop_export.targets.trt.options import BuilderOptions, compute_capability
from tests.support.bundles import first_layers, keep_trace
from tests.support.fake_gpu import FakeGpu
from tests.support.kernel_build import chooser_on_host
from tests.support.large import sparse_checkpoint
from tests.support.torch_trt import TorchTrt

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "tools" / "gpu_check.py"
USER = "who-runs-this"  # a name of one letter is left where it stands
LACKING = re.compile(r"is not installed|no C\+\+ compiler|the stage build ended with skip")


def checked(
    program: Sequence[str], out: Path, *arguments: str, **environment: str
) -> tuple[int, dict[str, dict[str, Any]], str]:
    """(exit status, stage → its entry, what was printed) of the command over stand-ins."""
    done = subprocess.run(
        [sys.executable, *program, "--stand-in", "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=1200,
    )
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["stand_in"] is True
    return done.returncode, {entry["stage"]: entry for entry in report["stages"]}, done.stdout + done.stderr


def passed_over_stand_ins(entry: dict[str, Any]) -> bool:
    """Ran to its end; or what it needs is not on this machine, of which the reason is then the test's."""
    if entry["state"] == "skip":
        assert LACKING.search(entry["reason"]), entry  # and not what the exporter refuses
        pytest.skip(f"{entry['stage']}: {entry['reason']}")
    assert (entry["state"], entry["reason"]) == ("stand-in", "")
    assert entry["stand_in"]
    return True


# ── the stages, over their stand-ins ───────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def stages_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All of them, which share a build, a checkpoint and its traces; with a sanitizer that runs what it is given.

    The traces are those of other tests.
    """
    for dtype in ("float32", "bfloat16"):
        keep_trace(first_layers("llama", 3, dtype), "gpu_check.small")
    folder = tmp_path_factory.mktemp("gpu_check")
    sanitizer = folder / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\n[ $2 = memcheck ] || exit 86\nshift 4\n"$@"\n')
    sanitizer.chmod(0o755)
    environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": runtime_path([])}
    names = [stage.name for stage in command.STAGES]
    program = ("-m", "tests.support.forked_stages")
    code, stages, said = checked(program, folder / "out.json", "--only", ",".join(names[::-1]), **environment)
    assert list(stages) == names  # as they build on each other
    assert "nothing of this says anything about a GPU" in said
    assert code == int(stages["kernel"]["state"] != "skip")  # the sanitizer's
    return stages


def test_env(stages_run) -> None:
    entry = stages_run["env"]
    assert passed_over_stand_ins(entry)
    assert entry["numbers"]["card"]["compute_capability"] == "8.9"
    assert "numpy" in entry["numbers"]["libraries"]
    assert set(entry["numbers"]) == {"python", "libraries", "nvcc", "card"}


def test_build_and_speed(stages_run) -> None:
    assert passed_over_stand_ins(stages_run["build"])
    assert passed_over_stand_ins(stages_run["speed"])
    calls = stages_run["speed"]["numbers"]["calls"]
    assert {call["layout"] for call in calls} == set(speed.LAYOUTS)
    assert {call["new_tokens"] for call in calls} == {1, 20}
    # Everything takes a millisecond here: a step and its copies have the same share of it
    assert {(call["new_tokens"], call["of_copy_rate"]) for call in calls} == {(1, 1.0), (20, None)}


def test_kernel(stages_run) -> None:
    """Some cases on host threads; the sanitizer that says it found something makes the stage fail, and alone."""
    entry = stages_run["kernel"]
    if entry["state"] == "skip":
        pytest.skip(entry["reason"])
    numbers = entry["numbers"]
    for group, least in {"cases": 15, "replays": 3, "int4_products": 3, "sizes": 11}.items():
        assert numbers[group]["cases"] >= least
        assert numbers[group]["failed"] == {}
    assert numbers["past_2_31_elements"] == "right"
    assert numbers["memcheck"] == "found nothing"
    assert entry["state"] == "fail"
    assert entry["reason"].startswith("racecheck: AssertionError: racecheck found something")


def test_device(stages_run) -> None:
    """Without ONNX Runtime, as on a Jetson, whose packages do not name it (tests/support/forked_stages.py)."""
    chooser_on_host()  # a skip without a C++ compiler, which the plugins' kernels need
    entry = stages_run["device"]
    assert "onnxruntime" not in entry["reason"]  # which would be a skip
    assert passed_over_stand_ins(entry)
    assert entry["numbers"]["bfloat16 logits"]["status"] == "passed"
    first, replayed, larger, after = entry["numbers"]["bfloat16 graphs"]["captures"]
    assert 0 < first == replayed < larger <= after
    for name in device.PLUGIN_CASES:
        assert entry["numbers"][f"{name} logits"]["status"] == "passed"
        assert "same 16 tokens" in entry["numbers"][f"{name} tokens"]


@pytest.mark.parametrize("capability", ["7.5", "8.7", "9.0", "12.0"])
def test_device_runs_on_cards_that_tensorrt_rtx_does_not_know(capability: str) -> None:
    assert compute_capability(TorchTrt(FakeGpu()), capability)


def test_ort(stages_run) -> None:
    numbers = stages_run["ort"]["numbers"]
    assert passed_over_stand_ins(stages_run["ort"])
    for name in ("float32", "int4", "int8 caches"):
        assert numbers[f"{name} logits"]["status"] == "passed"
    assert set(numbers["float32 times"]["k=3"]["step_ms"]) == {"lora", "refresh"}
    assert numbers["placement"]["CPUExecutionProvider"]["GroupQueryAttention"] > 0


@pytest.mark.parametrize("stage", ["trt", "rtx"])
def test_engines(stages_run, stage: str) -> None:
    chooser_on_host()  # a skip without a C++ compiler: no cycles then
    numbers = stages_run[stage]["numbers"]
    assert passed_over_stand_ins(stages_run[stage])
    assert numbers["native float32 logits"]["status"] == "passed"
    assert set(numbers["native float32 build"]["engine_bytes"]) == {"lora", "refresh"}
    for k, timed in numbers["native float32 times"].items():  # in the form that users get
        assert timed["timed"] == "cycles"
        assert set(timed["step_ms"]) == ({"refresh"} if k == "k=0" else {"cycle of 4"})
    assert "native int4 build" in numbers  # passed, or the exporter's own words why it does not
    assert numbers["native fp8 logits"]["status"] == "passed"


def test_what_the_exporter_refuses_is_a_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what it refuses when it has seen the checkpoint: fp8 on a card that has none."""
    monkeypatch.setattr(exporter, "trace", exporter.trace)  # which `exported` replaces
    job = Job(tmp_path, tmp_path / "report.json", stand_in=True, states={}, deadline=0)
    model, builder = small_checkpoint(job), BuilderOptions(compute_capabilities=("8.6",))
    with pytest.raises(Skip, match=r"Compute capability 8\.6 has no fp8"):
        exported(job, model, "b", builder=builder, targets=("tensorrt-rtx",), dtype="float8_e4m3fn")


def test_decode(stages_run) -> None:
    numbers = stages_run["decode"]["numbers"]
    assert passed_over_stand_ins(stages_run["decode"])
    for name in ("ρ=0.5 k=0", "ρ=0.5 k=3", "ρ=0.25 k=3"):
        assert numbers[f"ort float32 {name}"]["of_copy_rate"] > 0
    full, dropped = (numbers[f"ort float32 ρ=0.5 k={k}"]["bytes_per_token"] for k in (0, 3))
    assert dropped < full
    assert numbers["transformers"]["tokens_per_s"] > 0


def test_decode_and_speed_are_skips_where_nothing_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the copy rate was: no time is left for any part, or no memory for any call."""
    monkeypatch.setattr(decode, "small_checkpoint", lambda _: tmp_path)
    late = Job(tmp_path, tmp_path / "report.json", stand_in=True, states={}, deadline=0)
    with pytest.raises(Skip, match=r"s are left"):
        decode.run(late)
    monkeypatch.setattr(speed, "fits", lambda *_: False)
    monkeypatch.setattr(speed, "kernels", lambda *_: None)
    with pytest.raises(Skip, match="too little device memory"):
        speed.run(Job(tmp_path, tmp_path / "report.json", stand_in=True, states={}, deadline=0))


def test_engines_that_no_time_is_left_for_are_skips(tmp_path: Path) -> None:
    """Else the stage would be killed amid them, which is a fail of what was right."""
    late = Job(tmp_path, tmp_path / "report.json", stand_in=False, states={}, deadline=0)
    engines.check_bundle(late, "native bfloat16", "tensorrt", tmp_path)
    assert list(late.numbers) == ["native bfloat16 build"]
    with pytest.raises(Skip, match=r"s are left"):
        late.settle()


@pytest.mark.parametrize(
    ("free", "disk", "shape"), [(80e9, 60e9, "8B"), (80e9, 30e9, "3B"), (16e9, 60e9, "3B"), (6e9, 60e9, "1B")]
)
def test_the_largest_shape_that_fits(free: float, disk: float, shape: str) -> None:
    assert decode.chosen_shape(int(free), int(disk)) == shape


def test_no_shape_fits() -> None:
    with pytest.raises(Skip, match="too little"):
        decode.chosen_shape(int(2e9), int(60e9))


def test_random_weights_have_no_hole(tmp_path: Path) -> None:
    """In every tensor of a checkpoint that was one hole; norms are ones."""
    from safetensors.torch import load_file

    config = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    size = sparse_checkpoint(tmp_path, layers=1, vocab_size=300, **config)
    assert decode.fill(tmp_path / "model.safetensors") == size
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        values = tensor.float()
        assert values.isfinite().all()
        if "norm" in name:
            assert (values == 1).all()
        else:
            assert 0.015 < values.std() < 0.025, name
    assert decode.WEIGHT_BYTES.keys() == decode.SHAPES.keys()


def test_weight_bytes_are_those_of_the_shapes(tmp_path: Path) -> None:
    for name, sizes in decode.SHAPES.items():
        (tmp_path / name).mkdir()
        size = sparse_checkpoint(tmp_path / name, **sizes)
        assert 0.95 < size / decode.WEIGHT_BYTES[name] < 1.05, (name, size)


def test_the_functions_of_the_stand_in_are_those_of_cuda() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    for name, function in vars(FakeGpu).items():
        if name.startswith("cuda") and inspect.isfunction(function):
            theirs = list(inspect.signature(getattr(real, name)).parameters)
            assert list(inspect.signature(function).parameters)[1:] == theirs, name
    for member in FakeGpu.cudaDeviceAttr:
        assert int(getattr(real.cudaDeviceAttr, member.name)) == member
    for name in ("name", "major", "minor", "multiProcessorCount", "totalGlobalMem", "l2CacheSize"):
        assert hasattr(real.cudaDeviceProp, name), name


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({}, True),
        ({"of_copy_rate": 0.61}, False),
        ({"length": 512}, False),
        ({"new_tokens": 2048}, False),
        ({"layout": "SmolLM2-135M", "kv_bytes": 3 << 20}, True),  # however few bytes it reads
        ({"length": 32768}, True),
    ],
)
def test_a_slow_kernel_fails(changes: dict[str, Any], fails: bool) -> None:
    call = {"layout": "Llama-3-8B", "batch": 1, "length": 4096, "new_tokens": 1, "kv_bytes": 1 << 24}
    call |= {"of_copy_rate": 0.59} | changes
    if fails:
        with pytest.raises(Failed, match="59%"):
            speed.judge([call])
    else:
        speed.judge([call])


# ── what the command does with stages ──────────────────────────────────────────────────────────────────────────

GOOD = "def run(job):\n    job.numbers['n'] = 1\n    job.say('half way')\n"
STAGE_FILES = {
    "good": GOOD,
    "lacks": "from gpu_check.job import Skip\ndef run(job):\n    raise Skip('frobnicate is not installed')\n",
    "imports": "def run(job):\n    import frobnicate.parts\n",
    "wrong": "def run(job):\n    job.numbers['n'] = 2\n    open('/home/somebody/secret/file.bin')\n",
    "crashes": GOOD + "    import os, signal\n    os.kill(os.getpid(), signal.SIGSEGV)\n",
    "leaves": "import os\ndef run(job):\n    os._exit(3)\n",
    # The child would write its file at the end of its sleep, and is told of by a file that it writes before
    "hangs": GOOD + "    import os, subprocess, sys, time\n"
    "    pids = os.environ['PIDS']\n"
    "    code = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)'\n"
    "    child = subprocess.Popen([sys.executable, '-c', code])\n"
    "    open(pids, 'w').write(f'{os.getpid()} {child.pid}')\n"
    "    time.sleep(3600)\n",
    "tells": "import getpass, socket\ndef run(job):\n"
    "    job.numbers['who'] = {f'{getpass.getuser()}@{socket.gethostname()}': [__file__]}\n",
}  # fmt: skip


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes stages of STAGE_FILES by name, each with a limit."""
    for name, text in STAGE_FILES.items():
        (tmp_path / f"stage_{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    monkeypatch.setenv("LOGNAME", USER)
    return lambda *names, limit_s=900.0: [Stage(name, f"stage_{name}", limit_s, "nothing") for name in names]


def entries(file: Path) -> dict[str, dict[str, Any]]:
    return {entry["stage"]: entry for entry in json.loads(file.read_text(encoding="utf-8"))["stages"]}


def test_one_stage_never_takes_the_others_down(stages, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.json"
    names = ("good", "lacks", "imports", "wrong", "crashes", "leaves", "tells")
    assert command.main(["--out", str(out)], stages(*names)) == 1
    found, said = entries(out), capsys.readouterr().out
    assert {name: entry["state"] for name, entry in found.items()} == {
        "good": "pass", "lacks": "skip", "imports": "skip", "wrong": "fail", "crashes": "fail", "leaves": "fail",
        "tells": "pass",
    }  # fmt: skip
    assert found["good"]["numbers"] == {"n": 1}
    assert found["lacks"]["reason"] == "frobnicate is not installed"
    assert found["imports"]["reason"] == "frobnicate is not installed"
    assert found["wrong"]["numbers"] == {"n": 2}
    assert found["wrong"]["reason"].startswith("FileNotFoundError: ")
    assert found["crashes"]["reason"] == "the process was ended by SIGSEGV"
    assert found["crashes"]["numbers"] == {"n": 1}
    assert found["leaves"]["reason"] == "the process ended with status 3 and no result"
    assert "good" in said
    assert "half way" in said
    assert "Traceback" in said  # of the one that is wrong: the terminal's, not the file's
    text = out.read_text()
    assert "Traceback" not in text
    assert "somebody" not in text
    assert str(tmp_path) not in text
    assert f"{USER}@" not in text
    assert f"@{socket.gethostname()}" not in text


def test_a_stage_that_hangs_is_killed_with_its_children(stages, tmp_path: Path) -> None:
    """Its child does not end when asked to."""
    out = tmp_path / "out.json"
    assert command.main(["--out", str(out)], [*stages("hangs", limit_s=3.0), *stages("good")]) == 1
    found = entries(out)
    assert found["hangs"]["state"] == "fail"
    assert found["hangs"]["reason"] == "killed after 3 s, the most that it may take"
    assert found["good"]["state"] == "pass"
    if (tmp_path / "pids").exists():  # not on a machine so busy that it was killed before
        assert found["hangs"]["numbers"] == {"n": 1}
        for pid in (tmp_path / "pids").read_text().split():
            assert not running(int(pid))


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and one of nohup this
from gpu_check.command import end_on_signals, main
from gpu_check.job import Stage
end_on_signals()
names = ("good", "hangs", "lacks")
sys.exit(main(["--out", sys.argv[1]], [Stage(name, f"stage_{name}", 900.0, "") for name in names]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_leaves_what_was_measured(stages, tmp_path: Path, number: signal.Signals) -> None:
    """And so does a terminal that is closed; no stage goes on."""
    out = tmp_path / "out.json"
    path = os.pathsep.join([str(ROOT / "tools"), os.environ["PYTHONPATH"]])
    command_line = [sys.executable, "-c", INTERRUPTED, str(out)]
    environment = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if re.match(r"hangs .*half way", line):
                break
        process.send_signal(number)
        said = process.stdout.read()
        assert process.wait() == 130
    found = entries(out)
    assert {name: entry["state"] for name, entry in found.items()} == {"good": "pass", "hangs": "skip", "lacks": "skip"}
    assert found["hangs"]["numbers"] == {"n": 1}
    assert found["hangs"]["reason"] == "ended by Ctrl-C"
    assert "lacks   skip" in said  # the table
    if (tmp_path / "pids").exists():
        assert not any(running(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_nothing_that_could_run_is_no_success(stages, capsys) -> None:
    assert command.main([], stages("lacks")) == 2
    assert "Nothing could run here." in capsys.readouterr().out
    assert command.main([], stages("lacks", "good")) == 0


def test_what_began_before_is_not_begun_again_after_the_end(stages, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(command, "TOTAL_S", 0.0)
    out = tmp_path / "out.json"
    assert command.main(["--out", str(out)], stages("good")) == 2
    assert entries(out)["good"]["reason"] == "not begun: the 0 s of a run are over"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "env,bluid"], "there is no stage 'bluid'; stages are env, build, kernel"),
        (["--only", ""], "there is no stage ''"),
        (["--out", "{tmp}"], "it is a folder"),
        (["--out", "{tmp}/missing/out.json"], "its folder is not there"),
        (["--out", "{tmp}/other.json"], "is not a report of this command"),
        (["--wheels", "{tmp}/missing"], "is not a folder"),
        (["--wheels", "{tmp}"], "no .whl file is in"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], said: str, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"mine": 1}')
    with pytest.raises(SystemExit) as refused:
        command.main([argument.format(tmp=tmp_path) for argument in arguments])
    assert refused.value.code == 2
    assert list(tmp_path.iterdir()) == [other]
    assert other.read_text() == '{"mine": 1}'
    assert said in capsys.readouterr().err


def make_wheel(folder: Path, name: str, version: str) -> Path:
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return wheel


def test_wheels_are_what_the_stages_import(tmp_path: Path, capsys) -> None:
    """Without a network; and a file that is no wheel is refused with pip's words."""
    make_wheel(tmp_path, "tensorrt_frobnicated", "99.5")
    code, stages, _ = checked([str(COMMAND)], tmp_path / "out.json", "--only", "env", "--wheels", str(tmp_path))
    assert code == 0
    assert stages["env"]["numbers"]["libraries"]["tensorrt_frobnicated"] == "99.5"
    (tmp_path / "broken-1-py3-none-any.whl").write_text("")
    with pytest.raises(SystemExit) as refused:
        command.main(["--wheels", str(tmp_path)])
    assert refused.value.code == 2
    assert "pip cannot install them" in capsys.readouterr().err


def test_reports_say_nothing_of_who_and_where(monkeypatch) -> None:
    monkeypatch.setenv("LOGNAME", USER)
    host = socket.gethostname()
    said = {
        "/usr/lib/x86/libfoo.so.1: cannot open": "…/libfoo.so.1: cannot open",
        "in '/home/jo/a b' and C:\\Users\\jo\\x.py": "in '…/a b' and …/x.py",
        "~/models/one.bin, ~jo/models/two.bin": "…/one.bin, …/two.bin",
        "1/2 of 3 / 4, refresh.onnx, tokens/s": "1/2 of 3 / 4, refresh.onnx, tokens/s",
        f"{USER} at {host}": "… at …",
    }
    for text, expected in said.items():
        assert anonymous({"a": [text, 1.5, None]}) == {"a": [expected, 1.5, None]}
