"""Adapters by distillation: A and B learn to give LoRA steps the full model's next-token distribution.

Enters: a model, a plan, a source of texts, adapters to begin with. Leaves: better adapters. The model is frozen; its
logits are computed once per batch, by the exact stream that the decoded one needs anyway. The loss is
KL(full ‖ decoded), averaged over the tokens of LoRA steps (and of refreshes where these are not exact: they see holes,
or what LoRA steps filled in), with the caches and masks of deployment (forcing.py). Under `lossless` that is the
divergence of its drafts. Under torchrun n processes see the texts that one process sees that accumulates n times as
many gradients.

However long it runs, memory stays flat: texts come by number, and of the losses means over stretches are kept.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_drop_runtime.errors import InputError, first_line
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import Policy

from lora_drop_tools.teacher_forcing.forcing import TeacherForcing
from lora_drop_tools.teacher_forcing.layout import Layout
from lora_drop_tools.teacher_forcing.surrogates import Surrogates

from .learner import Learner, cosine
from .texts import Texts

_LOSS_ROWS = 256  # tokens whose logits are in memory at once
_CACHED = 2**19  # logits that stay in a core's caches with what is made of them
_LOSSES = 1000  # that are kept, at most


class Diverged(InputError):
    """The KL divergence is not finite."""


@dataclass(frozen=True)
class DistillOptions:
    """How to learn: AdamW, linear warm-up over `warm_up` of the steps, then a cosine down to a tenth.

    Attributes:
        first: number of the first batch; the closed form had those before it.
        offset_weights: of the loss at the first, second, … LoRA step after a refresh; refreshes have 1.
        checkpoint_seconds: of `clock`, between two writes of the state.
    """

    steps: int
    learning_rate: float
    accumulate: int = 1
    first: int = 0
    offset_weights: tuple[float, ...] | None = None
    warm_up: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    checkpoint_seconds: float = 600.0
    clock: Callable[[], float] = time.monotonic

    @property
    def stretch(self) -> int:
        """Steps whose losses are kept as one mean."""
        return -(-self.steps // _LOSSES)


@dataclass(frozen=True)
class Workers:
    """The processes of a torchrun; one process without it."""

    rank: int = 0
    count: int = 1

    @classmethod
    @contextlib.contextmanager
    def joined(cls, device: str) -> Iterator[Workers]:
        """Join the others where torchrun started this process."""
        import torch.distributed as distributed

        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls()
            return
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        try:
            yield cls(distributed.get_rank(), distributed.get_world_size())
        finally:
            distributed.destroy_process_group()

    def device(self, name: str) -> str:
        """Each process's own GPU where `cuda` was asked for."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and self.count > 1 else name

    def agree(self, tensors: list[Any]) -> None:
        """Replace each process's tensors by the first one's."""
        import torch.distributed as distributed

        for tensor in tensors if self.count > 1 else ():
            distributed.broadcast(tensor, 0)

    def average(self, tensors: list[Any]) -> None:
        """Replace each process's tensors by their mean over all."""
        import torch.distributed as distributed

        for tensor in tensors if self.count > 1 else ():
            distributed.all_reduce(tensor)
            tensor /= self.count

    def wait(self, device: str) -> None:
        """Until all processes are here."""
        import torch
        import torch.distributed as distributed

        if self.count > 1:
            here = torch.ones(1, device=device)
            distributed.all_reduce(here)
            assert int(here) == self.count  # reading it waits for the device as well


@dataclass
class Divergence:
    """Sums over tokens: KL(full ‖ decoded) in nats, equal most likely next tokens, −log p of the true next token.

    A text's last token has no next one: `followed` counts the others.
    """

    tokens: int = 0
    kl: float = 0.0
    same: int = 0
    followed: int = 0
    nats_full: float = 0.0
    nats_decoded: float = 0.0

    def __add__(self, other: Divergence) -> Divergence:
        return Divergence(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def figures(self) -> dict[str, float]:
        """Means, as reports name them."""
        count, followed = max(1, self.tokens), max(1, self.followed)
        return {
            "kl": self.kl / count,
            "agreement": self.same / count,
            "perplexity_full": math.exp(self.nats_full / followed),
            "perplexity": math.exp(min(self.nats_decoded / followed, 700.0)),
        }


def _diverge(expected: Any, found: Any, targets: Any, shares: Any, gradient: Any) -> Divergence:
    """The sums over logits [rows, V], and KL's gradient by `found` into `gradient` [rows, V], where that is a tensor.

    By the logits z of log-softmax, KL(p ‖ softmax(z)) has the gradient softmax(z) − p. On a CPU a few rows at a time go
    through all of it: tensors of all rows would each be written to memory and read again.

    Args:
        targets: the true next tokens [rows], −1 where there is none.
        shares: [rows], what each one's gradient is multiplied by.
    """
    import torch

    sums = Divergence()
    step = max(1, _CACHED // expected.shape[1]) if expected.device.type == "cpu" else len(expected)
    with torch.no_grad():
        for begin in range(0, len(expected), step):
            rows = slice(begin, begin + step)
            p_log, q_log = (logits[rows].float().log_softmax(-1) for logits in (expected, found))
            p = p_log.exp()
            known = targets[rows] >= 0
            true = targets[rows].clamp(min=0)[:, None]
            sums += Divergence(
                len(p),
                float(torch.linalg.vecdot(p, p_log - q_log).sum()),
                int((p_log.argmax(-1) == q_log.argmax(-1)).sum()),
                int(known.sum()),
                -float(p_log.gather(1, true)[known].sum()),
                -float(q_log.gather(1, true)[known].sum()),
            )
            if gradient is not None:
                gradient[rows] = q_log.exp_().sub_(p).mul_(shares[rows, None])
    return sums


def diverge(
    forcing: TeacherForcing, full: Any, decoded: Any, following: Any, learn: bool = False, weights: Any = None
) -> Divergence:
    """Compare next-token distributions, a few hundred tokens at a time; with `learn` send back the mean KL's gradient.

    Args:
        full, decoded: the last layer's output [B, S, d] of the full model and of the decoded stream.
        following: the true next tokens [B, S], −1 where there is none.
        weights: [S] of the mean that is learned from, 1 when None; the figures have none.
    """
    import torch

    full, targets = full.reshape(1, -1, full.shape[-1]), following.reshape(-1)
    leaf = decoded.detach().reshape(1, -1, decoded.shape[-1]).requires_grad_(learn)
    sums, count = Divergence(), leaf.shape[1]
    shares = torch.full((count,), 1 / count, device=leaf.device)
    if weights is not None:
        total = weights.sum().clamp(min=1e-30)  # 0 where a short cycle has only offsets of weight 0
        shares = (weights / (total * len(decoded))).repeat(len(decoded))
    for begin in range(0, count, _LOSS_ROWS):
        part = slice(begin, begin + _LOSS_ROWS)
        with torch.no_grad():
            expected = forcing.logits(full[:, part])  # [1, rows, V]
        with torch.set_grad_enabled(learn):
            found = forcing.logits(leaf[:, part])
        gradient = torch.empty_like(found) if learn else None
        logits = (expected[0], found[0].detach())
        sums += _diverge(*logits, targets[part], shares[part], None if gradient is None else gradient[0])
        if learn:
            found.backward(gradient)
    if learn:
        decoded.backward(leaf.grad.reshape(decoded.shape))
    return sums


def compared_tokens(layout: Layout, policy: Policy) -> Any:
    """Positions whose logits are not the full model's by construction: LoRA steps, and refreshes that see holes."""
    import torch

    if policy.exact_refreshes:
        return layout.lora
    return torch.arange(int(layout.lora[0]), len(layout.is_lora), device=layout.lora.device)


def run_batch(
    forcing: TeacherForcing,
    ids: Any,
    layout: Layout,
    plan: DropPlan,
    surrogates: Surrogates,
    policy: Policy,
    learn: bool = False,
    offset_weights: Any = None,
) -> Divergence:
    """One batch of texts [B, T] through both streams.

    Args:
        offset_weights: [k + 1] of the mean that is learned from, by place in the cycle.
    """
    import torch

    exact = forcing.exact(ids)
    at = compared_tokens(layout, policy)
    with torch.set_grad_enabled(learn):
        decoded = forcing.decode(exact, ids, layout, plan, surrogates, policy)
        if not policy.exact_refreshes:
            decoded = decoded[:, at]
    following = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-1)[:, at]
    weights = None if offset_weights is None else offset_weights[layout.offset[at]]
    return diverge(forcing, exact[-1].output[:, at], decoded, following, learn, weights)


def _rate(step: int, options: DistillOptions) -> float:
    """The learning rate of a step as a share of the highest."""
    warm = max(1, round(options.warm_up * options.steps))
    if step < warm:
        return (step + 1) / warm
    return cosine((step - warm) / max(1, options.steps - warm))


def _check_finite(kl: float, step: int, options: DistillOptions) -> None:
    if not math.isfinite(kl):
        raise Diverged(
            "Distillation diverged.",
            note=f"The KL divergence is {kl} at step {step + 1} of {options.steps}; --learning-rate is "
            f"{options.learning_rate:g}.",
            hint=f"Use a smaller one, such as --learning-rate {options.learning_rate / 10:.1g}.",
        )


@contextlib.contextmanager
def saved(path: Path, hint: str, device: Any = None) -> Iterator[Any]:
    """What PyTorch has saved; what is wrong with the file, or with what is taken from it, becomes an InputError."""
    import torch

    try:
        with zipfile.ZipFile(path) as parts:  # PyTorch compares no checksums
            if damaged := parts.testzip():
                raise ValueError(f"{damaged} is damaged")
        yield torch.load(path, weights_only=True, map_location=device)
    except (
        *(RuntimeError, KeyError, TypeError, ValueError, EOFError, OSError),
        *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
    ) as error:
        raise InputError(
            "The unfinished fit cannot be read.", note=f"{path}: {first_line(error)}.", hint=hint
        ) from None


class _State:
    """What training has reached, in memory and in a file.

    Attributes:
        step: steps that are done.
        losses: means over stretches of them; the last one may be short.
    """

    def __init__(self, learner: Learner, texts: Texts, options: DistillOptions, file: Path | None) -> None:
        import torch

        self.parameters, self._texts, self._file, self._options = learner.all(), texts, file, options
        self.optimizer = torch.optim.AdamW(self.parameters, options.learning_rate, weight_decay=options.weight_decay)
        self.step, self.losses = 0, list[float]()
        self._saved = options.clock()

    def add(self, loss: float) -> None:
        """A step is done."""
        place = self.step % self._options.stretch
        if not place:
            self.losses.append(0.0)
        self.losses[-1] += (loss - self.losses[-1]) / (place + 1)
        self.step += 1

    def load(self, device: Any) -> None:
        """Go on from the file where there is one."""
        import torch

        if self._file is None or not self._file.exists():
            return
        with saved(self._file, "Without it --resume begins distillation anew.", device) as state, torch.no_grad():
            self.step, self.losses = state["step"], state["losses"]
            self.optimizer.load_state_dict(state["optimizer"])
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        self._texts.load(state.get("texts", {}))  # version 0.1 wrote none

    def save_in_time(self) -> None:
        """Write the file where that is due: minutes after the last time, and at the end."""
        now = self._options.clock()
        if self.step == self._options.steps or now - self._saved >= self._options.checkpoint_seconds:
            self._save()
            self._saved = now

    def _save(self) -> None:
        import torch

        if self._file is None:
            return
        state = {"step": self.step, "losses": self.losses, "optimizer": self.optimizer.state_dict()}
        state["texts"] = self._texts.state()
        data = io.BytesIO()  # an error of the disk is then Python's, which says what it is
        torch.save({**state, "parameters": [parameter.data for parameter in self.parameters]}, data)
        part = self._file.with_suffix(".part")
        part.write_bytes(data.getvalue())
        part.replace(self._file)


def distill(
    forcing: TeacherForcing,
    texts: Texts,
    plan: DropPlan,
    policies: Sequence[Policy],
    learner: Learner,
    options: DistillOptions,
    workers: Workers,
    state_file: Path | None = None,
    progress: Callable[[int, int, float, float], None] = lambda done, total, loss, rate: None,
) -> list[float]:
    """Train `learner` in place; returns the mean KL of each step, or of stretches of many, from the first one on.

    Args:
        policies: batches take them in turns.
        texts: gives batch number 0, 1, …; step s of w processes that accumulate a takes s·w·a … (s+1)·w·a − 1 after
            `options.first`.
        state_file: holds parameters, optimizer, losses, step and the texts' state, written by the first process;
            where it exists training goes on from there.
        progress: gets the steps that are done and all, the last one's mean KL and learning rate.

    Raises:
        InputError: the KL is not finite any more.
    """
    import torch

    state = _State(learner, texts, options, state_file)
    with torch.no_grad():
        workers.agree([*state.parameters, *learner.scales.values(), *learner.sizes.values()])
    state.load(forcing.device)
    per_step = workers.count * options.accumulate
    weights = None
    if options.offset_weights is not None:
        weights = torch.tensor([1.0, *options.offset_weights], device=forcing.device)
    for step in range(state.step, options.steps):
        rate = options.learning_rate * _rate(step, options)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad()
        sums = Divergence()
        for turn in range(options.accumulate):
            number = step * per_step + workers.rank * options.accumulate + turn
            ids, layout = texts(options.first + number)
            policy = policies[number % len(policies)]
            sums += run_batch(forcing, ids, layout, plan, learner.surrogates(), policy, True, weights)
        gradients = [parameter.grad for parameter in state.parameters]
        torch._foreach_div_(gradients, options.accumulate)
        kl, tokens = (torch.tensor(float(value), device=forcing.device) for value in (sums.kl, sums.tokens))
        workers.average([*gradients, kl, tokens])
        loss = float(kl / tokens.clamp(min=1))
        _check_finite(loss, step, options)
        torch.nn.utils.clip_grad_norm_(state.parameters, options.clip)
        state.optimizer.step()
        state.add(loss)
        progress(step + 1, options.steps, loss, rate)
        if workers.rank == 0:
            state.save_in_time()
    return state.losses
