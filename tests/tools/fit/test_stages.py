"""Which adapters a fit keeps: those that are better on held-out text, and none where the figures are not finite."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_tools.fit import distill, stages
from lora_drop_tools.fit.distill import DistillOptions, Divergence
from lora_drop_tools.fit.fit import fit
from lora_drop_tools.fit.settings import FitSettings
from lora_drop_tools.fit.texts import Source
from lora_drop_tools.teacher_forcing import closed_form
from safetensors.numpy import load_file

SMALL = {"window": 32, "batch": 2, "rank": 3, "closed_form_tokens": 512}


def settings(text: Path, out: Path, **options) -> FitSettings:
    return FitSettings(text=(text,), out=out, drop_layers=(3, 5), **(SMALL | options))


def same_adapters(a: Path, b: Path) -> bool:
    ours, theirs = load_file(a / "adapter_model.safetensors"), load_file(b / "adapter_model.safetensors")
    return ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def test_distillation_that_makes_them_worse_is_not_kept(
    model_dir: Path,
    words: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit(str(model_dir), settings(words, tmp_path / "closed", steps=0))
    capsys.readouterr()
    result = fit(str(model_dir), settings(words, tmp_path / "spoilt", steps=3, learning_rate=30.0))
    assert result.stages["distillation"]["kl"] > result.stages["closed form"]["kl"]
    assert result.kept == json.loads((tmp_path / "spoilt/fit.json").read_text())["kept"] == "closed form"
    assert same_adapters(tmp_path / "spoilt", tmp_path / "closed")
    said = capsys.readouterr().err
    assert "distillation made the adapters worse" in said
    assert said.count("warning: distillation learns too fast") == 1
    assert "--learning-rate 8 may help (it is 30)" in said
    result = fit(str(model_dir), settings(words, tmp_path / "better", steps=12))
    assert result.kept == "distillation"
    assert "too fast" not in capsys.readouterr().err
    assert not same_adapters(tmp_path / "better", tmp_path / "closed")


@pytest.mark.parametrize(
    ("policies", "what"),
    [
        (("backfill",), "(LoRA steps, held-out text)"),
        (("fill",), "(LoRA steps and inexact refreshes, held-out text)"),
        (("backfill", "skip"), "(LoRA steps and inexact refreshes, held-out text)"),
    ],
)
def test_figures_say_which_steps_they_count(
    policies: tuple[str, ...],
    what: str,
    model_dir: Path,
    words: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit(str(model_dir), settings(words, tmp_path / "out", steps=0, policies=policies))
    assert capsys.readouterr().err.replace("\n", " ").count(what) == 2  # the base, and the closed form


def test_distillation_learns_where_the_closed_form_found_nothing(
    model_dir: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does without a closed form: of a single layer, and of neighbours as one."""
    genuine = closed_form.solve

    def nothing(site: closed_form.Site, rank: int) -> closed_form.Solution:
        found = genuine(site, rank)
        return dataclasses.replace(found, b=torch.zeros_like(found.b))

    monkeypatch.setattr(closed_form, "solve", nothing)
    for layers in ((3,), (3, 4)):
        asked = settings(words, tmp_path / f"{len(layers)}", steps=8, learning_rate=0.3)
        asked = dataclasses.replace(asked, drop_layers=layers)
        reached = fit(str(model_dir), asked).stages
        assert reached["closed form"] == reached["base"]
        assert reached["distillation"]["kl"] != pytest.approx(reached["base"]["kl"], rel=1e-4)


def test_the_rate_by_layers_and_rank(words: Path, tmp_path: Path) -> None:
    """Never above that of 7 layers apart of rank 64; neighbours are one; what is asked for is taken as it is."""
    own = settings(words, tmp_path / "out")

    def rates(*plans: tuple[Sequence[int], int], **changes: float) -> list[float]:
        asked = dataclasses.replace(own, **changes)
        return [asked.rate(DropPlan(40, tuple(map(str, layers)), rank=rank)) for layers, rank in plans]

    apart = {count: range(3, 3 + 2 * count, 2) for count in (1, 7, 14)}
    assert rates(*((apart[count], 64) for count in apart)) == pytest.approx([0.015, 0.015, 0.0075])
    assert rates(*((apart[7], rank) for rank in (16, 64, 256))) == pytest.approx([0.015, 0.015, 0.0075])
    neighbours = range(3, 19)
    assert rates((neighbours, 64), (neighbours, 784)) == pytest.approx([0.015, 0.0075])
    assert rates((range(3, 30), 512), learning_rate=0.3) == [0.3]


def test_distillation_that_diverges_fails_and_leaves_nothing(
    model_dir: Path,
    words: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With more than --learning-rate takes, so that a few steps are enough."""
    monkeypatch.setattr(
        distill, "DistillOptions", lambda steps, _, *others, **more: DistillOptions(steps, 1e30, *others, **more)
    )
    with pytest.raises(InputError, match=r"(?s)Distillation diverged.*nan.*--learning-rate 1e\+29"):
        fit(str(model_dir), settings(words, tmp_path / "a", steps=4))
    assert not list(tmp_path.iterdir())


def test_a_model_whose_figures_are_not_finite_is_refused(
    model_dir: Path,
    words: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures = Divergence.figures
    monkeypatch.setattr(Divergence, "figures", lambda self: figures(self) | {"kl": float("inf")})
    with pytest.raises(InputError, match=r"(?s)not finite.*inf.*--dtype fp32"):
        fit(str(model_dir), settings(words, tmp_path / "a", steps=0))
    assert not list(tmp_path.iterdir())


def test_better_is_judged_by_the_held_out_figure() -> None:
    said: list[str] = []
    console = type("Console", (), {"say": staticmethod(said.append)})()
    work = stages.Work(None, None, None, None, None, console, {"base": {"kl": 0.3}})  # type: ignore[arg-type]
    begun, learned = {"3": (torch.zeros(1), torch.zeros(1))}, {"3": (torch.ones(1), torch.ones(1))}
    for closed, distilled, kept in ((0.2, 0.1, learned), (0.1, 0.2, begun), (None, 0.2, learned), (None, 0.4, begun)):
        own = {"base": {"kl": 0.3}, "distillation": {"kl": distilled}}
        own |= {"closed form": {"kl": closed}} if closed else {}
        assert stages.better(dataclasses.replace(work, stages=own), begun, learned)[1] is kept
    assert len(said) == 2


def test_a_plain_text_is_judged_by_what_is_not_learned_from(tmp_path: Path) -> None:
    """Of a text without a word twice."""
    (tmp_path / "text").write_text(" ".join(map(str, range(4000))))
    loaded: Any = SimpleNamespace(encode=lambda text: torch.tensor([int(word) for word in text.split()]))
    settings = FitSettings(text=(tmp_path / "text",), out=tmp_path / "out", window=32, batch=2)
    seen, unseen = Source(settings).texts(loaded, settings, "cpu")
    learned, judged = ({*torch.cat([texts(n)[0] for n in range(200)]).flatten().tolist()} for texts in (seen, unseen))
    assert min(len(learned), len(judged)) > 64
    assert not learned & judged


def test_a_rate_that_is_too_high_is_said_once() -> None:
    """By the mean of what was learned since the line before, against the figure of what distillation began with."""
    said: list[str] = []
    console: Any = SimpleNamespace(say=said.append)
    report = stages.Report(console, lambda *_: None, 1024, None, begun_kl=0.4, highest=2e-3)
    said_so_far = []
    for step, loss in enumerate([0.7, 0.5, 0.3, 0.9, 0.5, 0.71, 5.0, 5.0], 1):  # a line for two of the 40 steps
        report(step, 40, loss, 1e-3)
        said_so_far.append(len([line for line in said if line.startswith("warning")]))
    assert said_so_far == [0, 0, 0, 0, 0, 1, 1, 1]  # 0.6 is 1.5 times 0.4, and 0.605 is more
    assert [line.split(", ")[1] for line in said if line.startswith("distillation")] == [
        f"KL {mean:.4f}" for mean in (0.6, 0.6, 0.605, 5.0)
    ]
    (warning,) = (line for line in said if line.startswith("warning"))
    assert "KL 0.6050, 0.4000 before it; --learning-rate 0.0005 may help (it is 0.002)" in warning


def test_steps_of_an_earlier_run_took_no_time() -> None:
    said: list[Any] = []
    console: Any = SimpleNamespace(say=lambda _: None)
    report = stages.Report(console, lambda *of: said.append(of), 1024, None, 0.4, 2e-3, True)
    for step in (31, 32):
        report(step, 40, 0.3, 1e-3)
    assert said == [("distillation", 31, 40, 30), ("distillation", 32, 40, 30)]


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_mean_divergence_and_sends_its_gradient_back(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In slices of 256 tokens and of 3 rows, against PyTorch's own KL divergence of all tokens at once."""
    monkeypatch.setattr(distill, "_CACHED", 3 * 11)
    generator = torch.Generator().manual_seed(5)
    head, full, start = (torch.randn(*shape, generator=generator) for shape in ((11, 6), (4, 70, 6), (4, 70, 6)))
    following = torch.randint(-1, 11, (4, 70), generator=generator)
    weights = torch.rand(70, generator=generator) if weighted else None

    decoded = start.clone().requires_grad_()
    forcing: Any = SimpleNamespace(logits=lambda hidden: 5 * torch.tanh(hidden @ head.mT))
    sums = distill.diverge(forcing, full, decoded * 2, following, True, weights)

    reference = start.clone().requires_grad_()
    p, q = (torch.log_softmax(5 * torch.tanh(x @ head.mT), -1) for x in (full, reference * 2))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)  # [4, 70]
    (kl.mean() if weights is None else (kl * weights).sum() / (4 * weights.sum())).backward()
    assert decoded.grad is not None
    assert reference.grad is not None
    assert torch.allclose(decoded.grad, reference.grad, rtol=1e-4, atol=1e-7)
    p, q, kl = (tensor.detach() for tensor in (p, q, kl))
    known = following >= 0
    nats = [-float(x.gather(-1, following.clamp(min=0)[..., None])[..., 0][known].sum()) for x in (p, q)]
    assert sums.tokens == 280
    assert sums.same == int((p.argmax(-1) == q.argmax(-1)).sum())
    assert sums.followed == int(known.sum())
    assert [sums.kl, sums.nats_full, sums.nats_decoded] == pytest.approx([float(kl.sum()), *nats], rel=1e-5)
