"""`lora-drop bench --peers`: the protocol with a peer's process, and every way in which it may fail."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lora_drop_runtime.errors import InputError
from lora_drop_tools.bench.bench import bench
from lora_drop_tools.bench.judge import MeasurementError
from lora_drop_tools.bench.peers import options as peer_options_module
from lora_drop_tools.bench.peers import peer as bench_peers
from lora_drop_tools.bench.peers import worker as peer_worker
from lora_drop_tools.bench.peers.options import check_named, check_same_model, peer_options, reason_against
from lora_drop_tools.bench.peers.peer import Peer, PeerError
from lora_drop_tools.bench.peers.worker import timed
from lora_drop_tools.bench.settings import BenchSettings

FAKE_WORKER = """
import json, sys
command, name, argument = sys.argv[1:4]
arguments = json.loads(argument)
say = lambda value: print(json.dumps(value), flush=True)
if command == "prepare":
    print("preparing", file=sys.stderr)
    made = {"model": arguments["source"], "built": "as given"}
    say({"error": "RuntimeError: cannot"} if name == "llama.cpp" else made)
    raise SystemExit
say({"ready": arguments["model"], "version": "1.2"})
for line in sys.stdin:
    request = json.loads(line)
    if request["new_tokens"] == 13 or len(request["prompt"]) == 7:
        print("out of luck", file=sys.stderr)
        raise SystemExit(3)
    steps = [0.002] * (request["new_tokens"] - 1)
    say({"tokens": [1] * request["new_tokens"], "prefill_seconds": 0.004, "step_seconds": steps})
"""


@pytest.fixture
def hf_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(FAKE_WORKER)
    return path


def test_reasons_against_peers(hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setattr(peer_options_module, "_is_installed", lambda module: False)
    both = peer_options((), [hf_directory, gguf], None, ())
    assert both.names == tuple(bench_peers.PEERS)
    reasons = {name: reason_against(name, both, "float32") for name in both.names}
    assert reasons["llama.cpp"] == "not installed: pip install llama-cpp-python"
    assert "transformers < 4.58" in str(reasons["optimum-onnx"])
    assert "pip install openvino-genai optimum-intel; " in str(reasons["openvino-genai"])
    assert "weights are int4" in str(reason_against("transformers", both, "int4"))
    monkeypatch.setattr(peer_options_module, "_is_installed", lambda module: True)
    assert [reason_against(name, both, "float32") for name in both.names] == [None] * 5
    assert reason_against("onnxruntime-genai", both, "int4") is None
    alone = peer_options(("transformers",), [gguf], None, ())
    assert reason_against("transformers", alone, "float32") == (
        "it loads a Hugging Face directory, --model gives a .gguf file"
    )
    model: Any = SimpleNamespace(num_layers=8, hidden_size=64, vocab_size=131)
    for config, note in (
        ({"num_hidden_layers": 8, "hidden_size": 64, "vocab_size": 131}, None),
        ({"n_layer": 8}, None),  # as some families call it
        ({"num_hidden_layers": 9}, "num_hidden_layers is 9 in "),
        ({"text_config": {"num_hidden_layers": 8, "hidden_size": 32}}, "hidden_size is 32 in "),
    ):
        (hf_directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        refused = pytest.raises(InputError, match=f"another one.\nNote: {note}")
        with contextlib.nullcontext() if note is None else refused:
            check_same_model(both, model)
        check_same_model(alone, model)  # of a .gguf file nothing is read
    with pytest.raises(InputError, match="two models of one kind"):
        peer_options((), [gguf, gguf], None, ())
    with pytest.raises(InputError, match="Python of a peer"):
        peer_options((), [gguf], None, ["optimum-onnx"])
    for path in (tmp_path, tmp_path / "nowhere", gguf):
        with pytest.raises(InputError, match="cannot be run") as caught:
            peer_options((), [gguf], None, [f"optimum-onnx={path}"])
        assert caught.value.note == f"{path} is not a program."
    with pytest.raises(InputError, match="cannot be kept there"):
        peer_options((), [gguf], gguf, ())
    for damaged in ("", "[]", '{"model_type"', "{}", '{"model_type": 1}'):
        (hf_directory / "config.json").write_text(damaged)
        with pytest.raises(InputError, match="damaged") as caught:
            peer_options((), [hf_directory], None, ())
        assert caught.value.note.startswith(f"{hf_directory}/config.json: ")
    found = peer_options((), [gguf], None, [f"optimum-onnx={sys.executable}"])
    assert found.pythons == {"optimum-onnx": sys.executable}
    check_named(found, {"llama.cpp": None})
    check_named(found, {"llama.cpp": "not there"})  # no peer was named
    with pytest.raises(InputError, match="that was named") as caught:
        check_named(alone, {"llama.cpp": None, "transformers": "not there"})
    assert caught.value.note == "transformers: not there."


def test_the_extra_brings_all_that_its_peers_need() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    brought = {package.partition(">=")[0] for package in project["optional-dependencies"]["bench-peers"]}
    beside = {"optimum-onnx", "openvino-genai"}  # in environments of their own
    kinds = [kind for name, kind in bench_peers.PEERS.items() if name not in beside]
    assert brought == {package for kind in kinds for package in kind.package.split()}
    assert "onnx-ir" in brought  # which onnxruntime-genai's builder imports


def test_what_is_not_installed_is_found_missing() -> None:
    assert peer_options_module._is_installed("numpy")
    assert not peer_options_module._is_installed("no_such_package_anywhere")
    assert not peer_options_module._is_installed("no_such_package_anywhere.inside")


def test_protocol(worker: Path, hf_directory: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(worker)]
    arguments = (hf_directory, "float32", tmp_path / "cache", 1, 64)
    with Peer("transformers", command, *arguments) as peer:
        peer.warm_up([1, 2, 3], 2)
        assert peer.pss is None or peer.pss["total"] > 0
        answer = peer.generate([1, 2, 3], 4)
        assert (len(answer["tokens"]), answer["step_seconds"]) == (4, [0.002] * 3)
        assert (peer.built, peer.model_bytes, peer.version) == ("as given", 23, "1.2")
        with pytest.raises(PeerError, match="ended with code 3: out of luck"):
            peer.generate([1], 13)
        with pytest.raises(PeerError, match="ended with code 3"):
            peer.generate([1], 4)
    record = tmp_path / "cache/transformers.json"
    prepared = json.loads(record.read_text())
    record.write_text(json.dumps(prepared | {"built": "earlier"}))
    with Peer("transformers", command, *arguments) as peer:
        assert peer.built == "earlier"  # what is there already is not made again
    for damaged in ('{"iden', "[]", json.dumps({"identity": prepared["identity"]})):
        record.write_text(damaged)
        with Peer("transformers", command, *arguments) as peer:
            assert peer.built == "as given"
    (hf_directory / "more").write_text("changed")
    with Peer("transformers", command, *arguments) as peer:
        assert peer.built == "as given"
    program = FAKE_WORKER.replace('say({"ready"', 'print("hello", {"ready"').replace('"1.2"})', '"1.2"}, flush=True)')
    worker.write_text(program, encoding="utf-8")
    with pytest.raises(PeerError, match="its answer is not understood: hello"):
        Peer("transformers", command, *arguments)
    with pytest.raises(PeerError, match="RuntimeError: cannot"):
        Peer("llama.cpp", command, *arguments)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print(5)", "its answer is not understood: 5"),
        ("print('{}')", "its answer is not understood: {}"),
        ("import sys; sys.stdout.buffer.write(bytes([200, 10]))", "its answer is not understood: \ufffd"),
        ("""print('{"error": null}')""", "None"),
        ("print('half', end='', flush=True); import time; time.sleep(600)", "no answer within 1 s"),
        ("import os, time; os.close(1); time.sleep(600)", "it says nothing more"),
    ],
)
def test_interpreters_that_are_no_worker(
    program: str, reason: str, hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_peers, "PREPARE_SECONDS", 1.0 if "half" in program else 600.0)
    monkeypatch.setattr(bench_peers, "STOP_SECONDS", 0.5)
    command = [sys.executable, "-c", program]
    with pytest.raises(PeerError) as caught:
        Peer("transformers", command, hf_directory, "float32", tmp_path / "cache", 1, 64)
    assert str(caught.value) == reason
    assert not (tmp_path / "cache/transformers.json").exists()


def test_command_with_peers(
    bundles: list[Path],
    worker: Path,
    hf_directory: Path,
    tmp_path: Path,
    scripted: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that answers, one that cannot be prepared, one that dies, one that is not there: only the first has a row."""
    scripted({0: 0.0040, 3: 0.0039})
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    left_out = {"optimum.onnxruntime", "openvino_genai"}
    monkeypatch.setattr(bench_peers, "WORKER", worker)
    monkeypatch.setattr(peer_options_module, "_is_installed", lambda module: module not in left_out)
    out = io.StringIO()
    options: dict[str, Any] = {"k": (3,), "contexts": (8,), "batches": (1, 2), "repeats": 2, "peers": ()}
    options |= {"model": (hf_directory, tmp_path / "model.gguf"), "peer_cache": tmp_path / "cache"}
    result = bench(bundles[1], BenchSettings(new_tokens=12, **options), out=out)
    assert {row.name for row in result.peer_rows} == {"onnxruntime-genai", "transformers"}
    assert {row.version for row in result.peer_rows} == {"1.2"}
    assert set(result.peers_left_out) == {"llama.cpp", "optimum-onnx", "openvino-genai"}
    assert result.peers_left_out["llama.cpp"] == "RuntimeError: cannot"
    (peer,) = [row for row in result.peer_rows if row.name == "transformers"]
    assert (peer.tokens_per_second, peer.p50_ms, peer.prefill_tokens_per_second) == pytest.approx((500, 2, 2000))
    full, dropping, *batch_2 = result.rows
    assert full.over_peers["transformers"] == pytest.approx(0.5)
    assert dropping.over_peers["transformers"] == pytest.approx(20 / 39)
    assert all(row.over_peers == {} for row in batch_2)  # peers run one row
    assert "transformers" in out.getvalue()
    assert "llama.cpp: RuntimeError: cannot" in out.getvalue()

    result = bench(bundles[1], BenchSettings(new_tokens=13, **options), out=out)
    assert not result.peer_rows
    assert result.peers_left_out["transformers"] == "it ended with code 3: out of luck"

    for named, new_tokens in {"optimum-onnx": 12, "llama.cpp": 12, "transformers": 13}.items():
        options |= {"peers": ("onnxruntime-genai", named)}  # not installed; cannot be prepared; dies when it is loaded
        with pytest.raises(InputError, match="cannot take part"):
            bench(bundles[1], BenchSettings(new_tokens=new_tokens, **options), out=out)
    options |= {"contexts": (7, 8), "json_file": tmp_path / "bench.json"}
    with pytest.raises(MeasurementError, match="before it was measured") as error:
        bench(bundles[1], BenchSettings(new_tokens=12, **options), out=out)
    reason = "it ended with code 3: out of luck"
    assert error.value.note == f"onnxruntime-genai: {reason}; transformers: {reason}."
    assert json.loads((tmp_path / "bench.json").read_text())["rows"]


def test_a_worker_times_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.accumulate(itertools.chain([2, 5], itertools.repeat(3)))
    monkeypatch.setattr(peer_worker, "time", SimpleNamespace(perf_counter=ticks.__next__))

    def generate(prompt: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        for token in range(new_tokens):
            emit(token)

    answer = timed(generate, [5], 4)
    assert answer["tokens"] == [0, 1, 2, 3]
    assert (answer["prefill_seconds"], answer["step_seconds"]) == (5, [3, 3, 3])
    with pytest.raises(RuntimeError, match="2 tokens came, 3 were asked for"):
        timed(lambda prompt, n, emit: generate(prompt, n - 1, emit), [5], 3)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "head_dim", "size"), [(896, 4864, 64, 128), (576, 1536, None, 64), (288, 768, 48, 32)]
)
def test_openvinos_groups_fill_every_row(
    hidden: int, intermediate: int, head_dim: int | None, size: int, hf_directory: Path
) -> None:
    """Its exporter refuses a model whose rows its 128 does not divide."""
    config = {"hidden_size": hidden, "intermediate_size": intermediate, "head_dim": head_dim}
    (hf_directory / "config.json").write_text(json.dumps(config | {"num_attention_heads": hidden // (head_dim or 64)}))
    assert peer_worker._group_size(str(hf_directory)) == size


def test_a_builder_that_fails_has_the_last_word(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = "import sys; print('begun', flush=True); print('No module named optimum', file=sys.stderr); sys.exit(3)"
    (tmp_path / "builder.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"^builder ended with code 3: No module named optimum$"):
        peer_worker._build([*peer_worker.PYTHON, "-m", "builder", "--of", "a model"])
    assert capfd.readouterr().err.splitlines() == ["begun", "No module named optimum"]


@pytest.mark.skipif(
    sys.platform != "linux", reason="Linux kills a process when its parent dies; others have no such call"
)
def test_a_builder_ends_with_the_command(tmp_path: Path) -> None:
    """A bench that is killed leaves nothing behind that writes into the peers' cache."""
    marker, ended = tmp_path / "pid", tmp_path / "ended"
    begin = f"import os, time; open({str(marker)!r}, 'w').write(str(os.getpid()))"
    builder = f"{begin}; time.sleep(600); open({str(ended)!r}, 'w')"
    worker = f"""
import sys
sys.path.insert(0, {str(bench_peers.WORKER.parent)!r})
import worker
worker.PEERS["slow"] = (lambda **_: worker._build([sys.executable, "-c", {builder!r}]), None)
worker.main("prepare", "slow", "{{}}")
"""
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}], stdin=subprocess.PIPE)"
    with subprocess.Popen([sys.executable, "-c", command]) as bench_command:
        pid = None
        while not pid:
            time.sleep(0.02)
            pid = marker.read_text() if marker.exists() else None
        bench_command.kill()
    with contextlib.suppress(OSError):  # it is gone
        while " Z " not in Path("/proc", pid, "stat").read_text(encoding="utf-8"):
            time.sleep(0.02)
    assert not ended.exists()


def test_no_file_beside_the_worker_hides_a_module_of_pythons() -> None:
    """It runs as a file, so its directory is the first place where a peer's imports are looked for."""
    beside = {path.stem for path in bench_peers.WORKER.parent.iterdir()}
    of_peers = {kind.module.partition(".")[0] for kind in peer_options_module.PEERS.values()}
    assert not beside & (sys.stdlib_module_names | of_peers)


def test_the_real_worker_says_what_is_wrong(hf_directory: Path, tmp_path: Path) -> None:
    """An unknown name stands for every failure inside a worker."""
    command = [sys.executable, str(bench_peers.WORKER)]
    with pytest.raises(PeerError, match="KeyError: 'nobody'"):
        Peer("nobody", command, hf_directory, "float32", tmp_path / "cache", 1, 64)


def test_measurement_errors_end_with_1() -> None:
    assert MeasurementError("x").exit_code == 1
