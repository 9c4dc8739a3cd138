"""The demo: a real small model from checkpoint to text, and what LoRA-Drop saves and costs. Run by `make demo`.

Files go to `.demo/`: the model (98 MB, downloaded once) and a bundle for each plan and dtype.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from fetch_model import fetch_model
from lora_drop_runtime import Session
from lora_drop_runtime.command_line import run_command
from lora_drop_runtime.errors import LoraDropError
from lora_drop_runtime.text import TextCodec
from lora_drop_tools.eval.scoring import Window, score
from lora_drop_tools.shared.table import MIB, table

from lora_drop_export import ExportOptions, export
from lora_drop_export.decoder.loaded import load_model

HERE = Path(".demo")
# Seven and thirteen of the 26 layers that may be dropped, chosen and fitted as docs/fitting.md says, for `backfill`
ADAPTERS = {
    0.25: Path(__file__).parent / "adapters" / "SmolLM2-135M-Instruct",
    0.5: Path(__file__).parent / "adapters" / "SmolLM2-135M-Instruct-0.5",
}
FORMS = {"float32": "ort", "int4": "ort", "bfloat16": "openvino"}  # dtype → target
SHOWN = ("float32", 0.25)
PROMPT = "The capital of Italy is"
K, NEW_TOKENS, WARM_UP, ROUNDS = 3, 64, 16, 3
WINDOWS, GIVEN, SCORED = 8, 32, 48  # of a text: how many, tokens that are given in each, and that are scored
CALIBRATION_BYTES = 10_000  # of text that int4 is rounded on: some 2500 tokens; the default is up to 16 384


@dataclass
class Arm:
    """A line of the table.

    Attributes:
        generate: writes so many tokens after a prompt and returns the bytes of K/V that they left.
        perplexity: of windows int64 [N, GIVEN + SCORED + 1], over the last SCORED tokens of each.
    """

    name: str
    generate: Callable[[npt.NDArray[np.int64], int], int]
    perplexity: Callable[[npt.NDArray[np.int64]], float]


def run(*command: str) -> None:
    """Run an installed command as a user would, shown first."""
    print("\n$ " + " ".join(f'"{part}"' if " " in part else part for part in command), flush=True)
    program = Path(sysconfig.get_path("scripts"), command[0])
    subprocess.run([program, *command[1:]], check=True)


def pytorch_arm(source: Path) -> Arm:
    """transformers as it comes: float32, eager, a growing cache. It has the weights of a bundle: from a GGUF file it
    takes fifteen seconds to read them."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # its `generate` names an argument as it should no longer be named
    model = load_model(str(source)).model

    def generate(ids: npt.NDArray[np.int64], count: int) -> int:
        made: Any = model.generate(
            torch.tensor(ids)[None],
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in made.past_key_values.layers)

    def perplexity(windows: npt.NDArray[np.int64]) -> float:
        with torch.no_grad():
            scores = model(torch.tensor(windows)).logits[:, GIVEN:-1].log_softmax(-1)
        targets = torch.tensor(windows)[:, GIVEN + 1 :, None]
        return float(torch.exp(-scores.gather(2, targets).mean()))

    return Arm("PyTorch (transformers), float32", generate, perplexity)


def session_arm(name: str, session: Session, k: int) -> Arm:
    """A bundle under a schedule; k = 0 runs all layers on every step."""

    def generate(ids: npt.NDArray[np.int64], count: int) -> int:
        session.generate([ids], count, k=k, stop_token_ids=())
        held = session.kv_bytes()
        return held["kept"] + held["dropped"]

    def perplexity(windows: npt.NDArray[np.int64]) -> float:
        rows = [Window(window, GIVEN, phase=0.0).row(k) for window in windows]
        return float(np.exp(-sum(one.log_prob for one in score(session, rows, k)) / (len(rows) * SCORED)))

    return Arm(name, generate, perplexity)


def docstrings(modules: str) -> list[str]:
    """Of Python's own modules whose names begin with one of `modules`, such as `s-z`."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    texts: list[str | None] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob(f"[{modules}]*.py")):
        nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, documented)]
        texts += map(ast.get_docstring, nodes)
    return list(filter(None, texts))


def bundle_of(given: Path, dtype: str, ratio: float) -> Path:
    """Export quietly, but for the bundle that the demo has shown; `given` is a bundle whose weights are taken."""
    if (dtype, ratio) == SHOWN:
        return given
    out = HERE / f"{dtype}-{ratio}"
    print(f"exporting {out}", flush=True)
    weights: dict[str, Any] = {"dtype": dtype}
    if dtype == "int4" and given != HERE / "engines":
        weights = {}  # they are int4
    elif dtype == "int4":
        text = HERE / "calibration.txt"
        text.write_text("\n\n".join(docstrings("a-r")[::16])[:CALIBRATION_BYTES], encoding="utf-8")
        weights |= {"quantization": "gptq", "calibration": text}
    options = ExportOptions(adapters=ADAPTERS[ratio], k=K, targets=(FORMS[dtype],), verify=False, force=True, **weights)
    with contextlib.redirect_stderr(io.StringIO()):
        export(str(given), out, options)
    return out


def session_arms(stack: contextlib.ExitStack) -> list[Arm]:
    """For each dtype the full schedule and both plans, of which the second takes the weights of the first."""
    arms = []
    for dtype, target in FORMS.items():
        if target == "openvino" and importlib.util.find_spec("openvino") is None:
            print("no bfloat16: openvino is not installed")
            continue
        label = f"{dtype}, {'ONNX Runtime' if target == 'ort' else 'OpenVINO'}"
        try:
            bundle = HERE / "engines"
            for ratio in ADAPTERS:
                bundle = bundle_of(bundle, dtype, ratio)
                session = stack.enter_context(Session.open(bundle))
                if ratio == min(ADAPTERS):
                    arms.append(session_arm(f"all layers, {label}", session, 0))
                arms.append(session_arm(f"LoRA-Drop ρ = {ratio}, {label}", session, K))
        except LoraDropError as error:
            print(f"no {dtype}: {error}")
    return arms


def held_out_windows(codec: TextCodec) -> npt.NDArray[np.int64]:
    """int64 [WINDOWS, GIVEN + SCORED + 1]: pieces of the docstrings of Python's own modules from s to z, on which
    nothing was fitted."""
    ids, size = codec.encode("\n\n".join(docstrings("s-z"))), GIVEN + SCORED + 1
    pieces: npt.NDArray[np.int64] = ids[: len(ids) // size * size].reshape(-1, size)
    return pieces[:: len(pieces) // WINDOWS][:WINDOWS]


def compare() -> None:
    """Speed, K/V and quality of all arms, from one run."""
    codec = TextCodec.open(HERE / "engines" / "tokenizer")
    ids = codec.encode(PROMPT)
    windows = held_out_windows(codec)
    with contextlib.ExitStack() as stack:
        arms = [pytorch_arm(HERE / "engines"), *session_arms(stack)]
        perplexities = [arm.perplexity(windows) for arm in arms]  # first: after some steps weights move to faster pages
        seconds, held = np.empty((ROUNDS + 1, len(arms))), [0] * len(arms)
        for number in range(ROUNDS + 1):  # the first warms up
            for place, arm in enumerate(arms):  # interleaved: all see the same machine
                begin = time.perf_counter()
                held[place] = arm.generate(ids, NEW_TOKENS if number else WARM_UP)
                seconds[number, place] = time.perf_counter() - begin
        rows = []
        for place, arm in enumerate(arms):
            speed = NEW_TOKENS / np.median(seconds[1:, place])
            faster = np.median(seconds[1:, 0] / seconds[1:, place])
            kv, perplexity = f"{held[place] / MIB:.2f}", f"{perplexities[place]:.1f}"
            rows.append((arm.name, f"{speed:.1f}", f"{faster:.2f}×", kv, perplexity))
    print(
        f"\n{NEW_TOKENS} tokens after «{PROMPT}», prompt included, medians of {ROUNDS} interleaved runs; "
        f"perplexity of {WINDOWS * SCORED} tokens of docstrings of Python's own modules"
    )
    print("\n".join(table(("", "tokens/s", "to PyTorch", "K/V MiB", "perplexity"), rows)))
    print(
        "\nρ is the share of the layers that may be dropped, and k = 3 of 4 steps drop them, under the policy backfill."
        "\ndocs/modes.md says which plan and policy suit what."
    )


def main() -> None:
    model = fetch_model(HERE)
    bundle, adapters = str(HERE / "engines"), os.path.relpath(ADAPTERS[SHOWN[1]])
    run("lora-drop-export", "--model", str(model), "--out", bundle, "--adapters", adapters, "--k", str(K), "--force")
    run("lora-drop", "inspect", bundle)
    length = ("--max-new-tokens", "28")
    run("lora-drop", "generate", bundle, "--prompt", PROMPT, *length)
    run("lora-drop", "generate", bundle, "--prompt", PROMPT, *length, "--k", "0")
    print()
    compare()


if __name__ == "__main__":
    sys.exit(run_command(lambda _: main(), None))
