"""`python tools/gpu_check.py`: runs stages one after the other, each in a process of its own, and says what they found.

    env      the card, its driver, the libraries that are installed
    build    nvcc compiles the attention kernel for this card
    kernel   the kernel against float64: all cases, CUDA graphs, head sizes and batches, large caches, sanitizers
    speed    the kernel against the card's own copy rate, and against PyTorch's attention
    device   the device runtime: page-locked memory, CUDA graphs, buffers that grow, two engines on the same caches
    ort      ONNX Runtime's CUDA provider: placement, addresses, logits, time of a step
    trt, rtx TensorRT and TensorRT-RTX: build, compare with PyTorch, generate, time of a step
    decode   tokens a second of a model with the shape of Llama-3-8B, against the copy rate and against transformers

Prints a table. What a stage needs and does not find makes it a skip. Folders for large files are made in $TMPDIR.
Exit status: 0 what ran passed, 1 something failed, 2 a wrong option, or nothing could run, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_check.anonymous import anonymous
from gpu_check.job import ROOT, Stage, brief, runtime_path, write_json

TOTAL_S = 600.0
STAND_IN_SLACK = 10  # times the seconds: the test suite runs on busy machines
POLL_S = 0.1
KILL_S = 5.0  # between asking a stage to end and ending it

HOST_KERNEL = "the kernel on host threads, a stand-in for CUDA"
STAGES = (
    Stage("env", "gpu_check.env", 30, "a stand-in for CUDA"),
    Stage("build", "gpu_check.build", 180, "g++: the kernel for host threads"),
    Stage("kernel", "gpu_check.kernel", 150, HOST_KERNEL),
    Stage("speed", "gpu_check.speed", 90, HOST_KERNEL + "; its times mean nothing"),
    Stage("device", "gpu_check.device", 120, "PyTorch on the CPU, a stand-in for CUDA"),
    Stage("ort", "gpu_check.ort", 120, "ONNX Runtime's CPU provider"),
    Stage("trt", "gpu_check.trt", 150, "ONNX Runtime on the CPU, stand-ins for TensorRT and CUDA"),
    Stage("rtx", "gpu_check.rtx", 150, "ONNX Runtime on the CPU, stand-ins for TensorRT-RTX and CUDA"),
    Stage("decode", "gpu_check.decode", 330, "ONNX Runtime's CPU provider, a tiny shape; its times mean nothing"),
)


def end_on_signals() -> None:
    """Let SIGTERM, and SIGHUP of a terminal that is closed, end a run as Ctrl-C does: no stage is left behind. What
    `nohup` ignores stays ignored."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def say(text: str) -> None:
    print(text, flush=True)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a stage and all that it started: they are a process group of their own."""

    def send(number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)

    if not hasattr(os, "killpg"):
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False)
        process.wait()
        return
    send(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_S)
    send(signal.SIGKILL)  # also what outlived the stage's own process
    process.wait()


def how_it_ended(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with status {code} and no result"


def read_report(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else {"numbers": {}, "progress": []}


def follow(process: subprocess.Popen[bytes], report: Path, stage: Stage, deadline: float) -> bool:
    """Print what a stage says until it ends; whether it did before the deadline."""
    begin, said = time.monotonic(), 0
    while True:
        running = process.poll() is None
        lines = read_report(report)["progress"]
        for line in lines[said:]:
            say(f"{stage.name:7}{time.monotonic() - begin:5.0f} s  {line}")
        said = len(lines)
        if not running:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)


def run_stage(
    stage: Stage, work: Path, results: Sequence[dict[str, Any]], seconds: float, options: Any
) -> dict[str, Any]:
    """Run a stage; returns its entry of the report. After Ctrl-C that has `interrupted`."""
    report, settings, log = (work / f"{stage.name}.{end}" for end in ("json", "settings", "log"))
    states = {entry["stage"]: entry["state"] for entry in results}
    given = {"work": str(work), "report": str(report), "stand_in": options.stand_in, "states": states}
    write_json(settings, given | {"seconds": seconds})
    environment = os.environ | {"PYTHONPATH": runtime_path(options.sites), "PYTHONUNBUFFERED": "1"}
    begin = time.monotonic()
    reason, interrupted = "", False
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpu_check.run_stage", stage.module, str(settings)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            if not follow(process, report, stage, begin + seconds):
                reason = f"killed after {seconds:.0f} s, the most that it may take"
        except KeyboardInterrupt:
            reason, interrupted = "ended by Ctrl-C", True
        finally:
            end_process(process)
    found = read_report(report)
    state, why = found.get("state", "fail"), found.get("reason", "")
    if "state" not in found or interrupted:  # a result that was written counts, whatever came after it
        state, why = "fail", reason or how_it_ended(process.returncode)
    if state == "fail" and not interrupted:
        say(
            "".join(
                f"    | {line}\n" for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            ).rstrip("\n")
        )
    entry = {
        "stage": stage.name,
        "state": "skip" if interrupted else state,
        "seconds": round(time.monotonic() - begin, 1),
        "numbers": found["numbers"],
        "reason": why,
    }
    if options.stand_in:
        entry["stand_in"] = stage.stand_in
    return entry | {"interrupted": True} if interrupted else entry


def left_out(stage: Stage, reason: str) -> dict[str, Any]:
    return {"stage": stage.name, "state": "skip", "seconds": 0.0, "numbers": {}, "reason": reason}


def table(results: Sequence[dict[str, Any]]) -> str:
    rows = [
        ("stage", "state", "seconds", "what"),
        *((r["stage"], r["state"], r["seconds"], r["reason"]) for r in results),
    ]
    return "\n".join(f"{name:8}{state:10}{seconds!s:>8}  {brief(why)}".rstrip() for name, state, seconds, why in rows)


def chosen_stages(names: str | None, stages: Sequence[Stage], refuse: Callable[[str], Any]) -> list[Stage]:
    """In the order of the table, whatever the order in which they are named."""
    if names is None:
        return list(stages)
    wanted = [name.strip() for name in names.split(",")]
    known = [stage.name for stage in stages]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        refuse(f"--only: there is no stage {', '.join(map(repr, unknown))}; stages are {', '.join(known)}")
    return [stage for stage in stages if stage.name in wanted]


def check_writable(file: Path | None, refuse: Callable[[str], Any]) -> None:
    """Before ten minutes of measuring, not after them; only a report of this command is replaced."""
    if file is None:
        return
    folder = file.absolute().parent
    if file.is_dir():
        refuse(f"--out: {file} cannot be written: it is a folder")
    if file.is_symlink() or (file.exists() and not file.is_file()):
        refuse(f"--out: {file} cannot be written: it is no ordinary file")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        refuse(f"--out: {file} cannot be written: its folder is not there, or not writable")
    if file.exists() and file.stat().st_size and "gpu_check" not in read_report(file):
        refuse(f"--out: {file} is not a report of this command, so it will not be replaced")


def installed_wheels(folder: Path | None, work: Path, refuse: Callable[[str], Any]) -> list[str]:
    """The folder into which the wheels of another were installed, without a network; what a stage imports first."""
    if folder is None:
        return []
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        refuse(f"--wheels: no .whl file is in {folder}")
    site = work / "wheels"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    done = subprocess.run([*command, *wheels], capture_output=True, text=True, check=False)
    if done.returncode:
        refuse(f"--wheels: pip cannot install them: {(done.stderr.strip().splitlines() or ['it gave no reason'])[-1]}")
    return [str(site)]


def parsed(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    about = (__doc__ or "").partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("gpu_check.py", description=about[0], epilog=about[2], formatter_class=formatter)
    parser.add_argument("--only", metavar="STAGE,…", help="run these stages alone")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write everything that was found")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="install the wheels of this folder first, for the run"
    )
    parser.add_argument("--stand-in", action="store_true", help="run without a GPU, over stand-ins: tests this command")
    return parser, parser.parse_args(arguments)


def run_all(
    stages: Sequence[Stage], work: Path, options: Any, keep: Callable[[list[dict[str, Any]]], None]
) -> list[Any]:
    """Run stages in order; `keep` gets all entries after each that ran, and at the end."""
    slack = STAND_IN_SLACK if options.stand_in else 1
    end = time.monotonic() + slack * TOTAL_S
    results: list[dict[str, Any]] = []
    for stage in stages:
        seconds = min(slack * stage.limit_s, end - time.monotonic())
        if results and results[-1].get("interrupted"):
            results.append(left_out(stage, "not begun before Ctrl-C") | {"interrupted": True})
        elif seconds < min(stage.limit_s, 10):
            results.append(left_out(stage, f"not begun: the {TOTAL_S:.0f} s of a run are over"))
        else:
            results.append(run_stage(stage, work, results, seconds, options))
            keep(results)  # before it is said: the terminal may be gone
            entry = results[-1]
            say(f"{stage.name:7}{entry['seconds']:5.0f} s  {entry['state']}  {entry['reason']}".rstrip())
    keep(results)
    return results


def exit_status(results: Sequence[dict[str, Any]]) -> int:
    states = {entry["state"] for entry in results}
    if any(entry.get("interrupted") for entry in results):
        return 130
    if "fail" in states:
        return 1
    return 2 if states == {"skip"} else 0


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    parser, options = parsed(arguments)
    chosen = chosen_stages(options.only, stages, parser.error)
    check_writable(options.out, parser.error)
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels: {options.wheels} is not a folder")

    def keep(results: Sequence[dict[str, Any]]) -> None:
        if options.out is not None:
            entries = [{key: value for key, value in r.items() if key != "interrupted"} for r in results]
            write_json(options.out, anonymous({"gpu_check": 1, "stand_in": options.stand_in, "stages": entries}))

    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        options.sites = installed_wheels(options.wheels, Path(folder), parser.error)
        results = run_all(chosen, Path(folder), options, keep)
    say(f"\n{table(results)}")
    if options.stand_in:
        say("Stand-ins ran: nothing of this says anything about a GPU.")
    if {entry["state"] for entry in results} == {"skip"}:
        say("Nothing could run here.")
    return exit_status(results)
