"""How far bundles are from the checkpoint in float32, all layers in full: KL, the most likely token, perplexity, and
the entropy of what is predicted.

    python docs/quality/against_float.py MODEL BUNDLE… --text prose=held-out.txt --text code=code.txt

MODEL is a Hugging Face directory, which runs in PyTorch; the bundles run on target `ort`. Each text gives some windows,
and the figures are means over them, ± half of a 95 % interval.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.engine import Engine
from lora_drop_runtime.engines.open import open_engine
from lora_drop_runtime.text import TextCodec
from transformers import AutoModelForCausalLM

from lora_drop_export.check.perplexity import logits_of_window


def log_probabilities(bundle: Bundle, engine: Engine, ids: Any) -> Any:
    """Of the token behind each but the last of ids [T]: float32 [T − 1, V]."""
    logits = np.concatenate([part.copy() for part in logits_of_window(engine, bundle, ids)])
    return torch.log_softmax(torch.from_numpy(logits), -1)


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
    opened = [Bundle.open(path) for path in options.bundles]
    engines = [open_engine(bundle, "ort", None, options.threads) for bundle in opened]
    codec, rng = TextCodec.open(options.bundles[0] / "tokenizer"), np.random.default_rng(1)
    for name, file in (text.split("=", 1) for text in options.text):
        ids = codec.encode(Path(file).read_text(encoding="utf-8")[:400_000])
        figures: list[list[tuple[float, ...]]] = [[] for _ in opened]
        for begin in rng.integers(0, len(ids) - options.window, options.windows):
            window = ids[begin : begin + options.window]
            with torch.no_grad():
                float32 = torch.log_softmax(model(torch.from_numpy(window)[None]).logits[0, :-1], -1)
            for place, (bundle, engine) in enumerate(zip(opened, engines, strict=True)):
                figures[place].append(compared(log_probabilities(bundle, engine, window), float32, window))
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
