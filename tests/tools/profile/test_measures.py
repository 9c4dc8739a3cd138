"""`lora-drop profile`: its figures from hidden states by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from lora_drop_runtime.errors import InputError
from lora_drop_tools.profile.measures import DELTAS, LEADING, SiteFigures, site_figures
from lora_drop_tools.teacher_forcing.forcing import TeacherForcing
from transformers import PreTrainedModel

from tests.support.models import FAMILIES
from tests.support.profiles import TOLERANCE, WINDOW, K, random_windows


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def streams(model: PreTrainedModel, ids: torch.Tensor) -> list[np.ndarray]:
    """The residual stream before the first layer and after each, [T, d]; transformers norms its last one."""
    last: list[torch.Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda *args: last.append(args[2]))
    with torch.no_grad():
        hidden = list(model(ids[None], output_hidden_states=True).hidden_states)
    hook.remove()
    hidden[-1] = last[0][0] if isinstance(last[0], tuple) else last[0]
    return [h[0].double().numpy()[LEADING:] for h in hidden]


def by_hand(model: PreTrainedModel, windows: torch.Tensor, layer: int, k: int) -> SiteFigures:
    similar: dict[int, list[float]] = {delta: [] for delta in DELTAS}
    centred: dict[int, list[float]] = {delta: [] for delta in DELTAS}
    kept: list[float] = []
    spread: list[float] = []
    norms: list[float] = []
    distances: dict[str, list[float]] = {"residual": [], "recurrent": [], "anchor": []}
    by_offset: dict[int, list[float]] = {offset: [] for offset in range(1, k + 1)}
    for ids in windows:
        x, y = streams(model, ids)[layer : layer + 2]
        mean = y.mean(0)
        for t in range(len(y)):
            for delta in DELTAS:
                if t + delta < len(y):
                    similar[delta].append(cosine(y[t], y[t + delta]))
                    centred[delta].append(cosine(y[t] - mean, y[t + delta] - mean))
            for offset, of_offset in by_offset.items():
                if t >= offset:
                    of_offset.append(float(np.linalg.norm(y[t] - y[t - offset])))
            kept.append(cosine(x[t], y[t]))
            distances["residual"].append(float(np.linalg.norm(y[t] - x[t])))
            spread.append(float(np.linalg.norm(y[t] - mean)))
            norms.append(float(np.linalg.norm(y[t])))
    means = {
        "residual": np.mean(distances["residual"]),
        "recurrent": np.mean(by_offset[1]),
        "anchor": np.mean([np.mean(of_offset) for of_offset in by_offset.values()]),
    }
    return SiteFigures(
        similarity={delta: float(np.mean(values)) for delta, values in similar.items()},
        centred_similarity={delta: float(np.mean(values)) for delta, values in centred.items()},
        influence_cosine=float(np.mean(kept)),
        base_errors={base: float(mean / np.mean(spread)) for base, mean in means.items()},
        base_errors_of_norm={base: float(mean / np.mean(norms)) for base, mean in means.items()},
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gemma2"])
def test_figures_by_hand(name: str) -> None:
    windows, counted = random_windows(3), []
    forcing = TeacherForcing(FAMILIES[name]())
    figures = site_figures(forcing, windows, K, lambda: counted.append(1))
    assert (len(figures), len(counted)) == (8, 3)
    for layer, found in figures.items():
        expected = dataclasses.asdict(by_hand(FAMILIES[name](), windows, int(layer), K))
        for field, value in dataclasses.asdict(found).items():
            assert value == pytest.approx(expected[field], rel=TOLERANCE, abs=1e-5), (layer, field)


def test_a_text_of_one_token_is_refused() -> None:
    """In bfloat16, where its outputs are the same to the bit; a distance over their spread would be of nothing."""
    forcing = TeacherForcing(FAMILIES["llama"]().to(torch.bfloat16))
    with pytest.raises(InputError, match="the same for all tokens") as refused:
        site_figures(forcing, torch.full((2, WINDOW), 7), K, lambda: None)
    assert "Those of 0 do not differ" in refused.value.note
