"""How far bundles are from the checkpoint in float32, all layers in full: KL, the most likely token, perplexity, and
the entropy of what is predicted.

    python docs/quality/against_float.py MODEL BUNDLE… --text prose=held-out.txt --text code=code.txt

MODEL is a Hugging Face directory, which runs in PyTorch; the bundles run on target `ort`. Behind the first bundle there
may be what other runtimes load: a .gguf file, a directory of onnxruntime-genai, one of OpenVINO. Each text gives some
windows, and the figures are means over them, ± half of a 95 % interval.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.open import open_engine
from lora_drop_runtime.text import TextCodec
from transformers import AutoModelForCausalLM

from lora_drop_export.check.perplexity import logits_of_window

Logits = Callable[[Any], Any]  # of each token but the last of ids [T]: float32 [T − 1, V]


def of_bundle(path: Path, threads: int) -> Logits:
    bundle = Bundle.open(path)
    engine = open_engine(bundle, "ort", None, threads)
    return lambda ids: np.concatenate([part.copy() for part in logits_of_window(engine, bundle, ids)])


def of_llama(path: Path, threads: int) -> Logits:
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=1024, logits_all=True, n_threads=threads, verbose=False)

    def logits(ids: Any) -> Any:
        model.reset()
        model.eval(ids.tolist())
        return np.array(model.scores[: len(ids) - 1], np.float32)

    return logits


def of_genai(path: Path, threads: int) -> Logits:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path / "model.onnx", options)
    decoder = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    nothing = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)

    def logits(ids: Any) -> Any:
        feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
        for given in session.get_inputs():
            if given.name.startswith("past_key_values"):
                feeds[given.name] = nothing
        return session.run(["logits"], feeds)[0][0, :-1]

    return logits


def of_openvino(path: Path, threads: int) -> Logits:
    import openvino

    model = openvino.Core().compile_model(path / "openvino_model.xml", "CPU", {"INFERENCE_NUM_THREADS": threads})
    request = model.create_infer_request()

    def logits(ids: Any) -> Any:
        request.reset_state()
        count = np.arange(len(ids))[None]
        feeds = {"input_ids": ids[None], "attention_mask": np.ones_like(count), "position_ids": count}
        return request.infer(feeds | {"beam_idx": np.zeros(1, np.int32)})["logits"][0, :-1].copy()

    return logits


def opened(path: Path, threads: int) -> Logits:
    """What a path holds."""
    if path.suffix == ".gguf":
        return of_llama(path, threads)
    if (path / "genai_config.json").exists():
        return of_genai(path, threads)
    return (of_openvino if (path / "openvino_model.xml").exists() else of_bundle)(path, threads)


def entropy(log_probabilities: Any) -> float:
    """Mean over the tokens, in nats."""
    return float(-(log_probabilities.exp() * log_probabilities).sum(-1).mean())


def compared(ours: Any, float32: Any, ids: Any) -> tuple[float, ...]:
    """KL, agreement, the negative log likelihood of the text by both, and both entropies, of log probabilities
    [T − 1, V]."""
    own = torch.from_numpy(ids[1:])[:, None]
    kl = (float32.exp() * (float32 - ours)).sum(-1).mean()
    same = (float32.argmax(-1) == ours.argmax(-1)).float().mean()
    nats = [float(-each.gather(1, own).mean()) for each in (ours, float32)]
    return float(kl), float(same), *nats, entropy(ours), entropy(float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    runtimes = [opened(path, options.threads) for path in options.bundles]
    codec, rng = TextCodec.open(options.bundles[0] / "tokenizer"), np.random.default_rng(1)
    for name, file in (text.split("=", 1) for text in options.text):
        ids = codec.encode(Path(file).read_text(encoding="utf-8")[:400_000])
        figures: list[list[tuple[float, ...]]] = [[] for _ in runtimes]
        for begin in rng.integers(0, len(ids) - options.window, options.windows):
            window = ids[begin : begin + options.window]
            with torch.no_grad():
                float32 = torch.log_softmax(model(torch.from_numpy(window)[None]).logits[0, :-1], -1)
            for place, logits in enumerate(runtimes):
                ours = torch.log_softmax(torch.from_numpy(logits(window)), -1)
                figures[place].append(compared(ours, float32, window))
        for path, rows in zip(options.bundles, figures, strict=True):
            kl, same, ours, theirs, *entropies = np.array(rows).T
            half = 1.96 / np.sqrt(len(rows))
            lost = 100 * (np.exp((ours - theirs).mean()) - 1)
            print(
                f"{name:8} {path.name:16} KL {kl.mean():.4f} ± {half * kl.std(ddof=1):.4f}, most likely token "
                f"{same.mean():.3f} ± {half * same.std(ddof=1):.3f}, perplexity {np.exp(theirs.mean()):.2f} → "
                f"{np.exp(ours.mean()):.2f} ({lost:+.1f} %), entropy {entropies[1].mean():.3f} → "
                f"{entropies[0].mean():.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
