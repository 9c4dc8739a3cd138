"""Gates by regression: what a gated surrogate makes of its features brought nearer to the full model's output.

Enters: features and targets of one run, the matrices that the closed form has for it. Leaves: A, B and G. They are
learned as distillation learns them, by steps, but of the run alone, so a token takes a small part of the time. The loss
is the mean over all dimensions of the squared error over that of the base: a few dimensions of a residual stream are a
hundred times the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from lora_drop_tools.teacher_forcing.closed_form import Site
from lora_drop_tools.teacher_forcing.surrogates import product

from .learner import Learner, cosine, drawn

PASSES = 8  # over all tokens
_TOKENS = 1024  # of a step
_RATE = 0.03
_WARM_UP = 50  # steps
_RUN = "run"  # the only one that is learned at a time


def widened(a: Any, b: Any, rank: int, scale: Any, seed: int) -> tuple[Any, Any, Any]:
    """A [R, w] and B [d, R] of the closed form with gates that are 1 throughout, brought to a rank.

    What is added makes something of the features, at random, of which B takes nothing yet.
    """
    import torch

    random = torch.Generator().manual_seed(seed)
    more = drawn(rank - len(a), scale.cpu(), random).to(a)
    nothing = b.new_zeros(len(b), len(more))
    return torch.cat([a, more]), torch.cat([b, nothing], 1), a.new_zeros(rank, len(b))


def gated(
    site: Site, matrices: tuple[Any, ...], scale: Any, seed: int, progress: Callable[[int, int], None]
) -> tuple[tuple[Any, ...], float]:
    """The matrices that leave the least error on tokens that were not learned from, of those after each pass.

    Args:
        site: with examples.
        matrices: of the run, to begin with.
        scale: root mean square of the features [w].

    Returns: the matrices, and what they leave of the closed form's error.
    """
    import torch

    device = scale.device
    (x, y), (x_unseen, y_unseen) = (
        tuple(torch.cat(parts) for parts in zip(*(examples or site.examples[0]), strict=True))
        for examples in site.examples
    )
    for examples in site.examples:
        examples.clear()  # they are as large again
    sizes = (site.fit.y_columns / max(1, site.fit.tokens)).sqrt().clamp(min=1e-6).float().to(device)

    def error(x: Any, y: Any) -> Any:
        return ((y.float() - product(x.float(), learner.surrogates()[_RUN])) / sizes).square().mean()

    def unseen() -> float:
        with torch.no_grad():
            parts = zip(x_unseen.split(_TOKENS), y_unseen.split(_TOKENS), strict=True)
            return sum(float(error(*part)) * len(part[0]) for part in parts) / len(x_unseen)

    learner = Learner({_RUN: matrices}, {_RUN: scale}, [(_RUN,)], device)
    parameters = learner.all()
    optimizer = torch.optim.Adam(parameters, _RATE)
    random, each = torch.Generator().manual_seed(seed), -(-len(x) // _TOKENS)
    total, step = PASSES * each, 0
    begun = best = unseen()
    kept = copy.deepcopy(learner.parameters)
    with torch.enable_grad():
        for _ in range(PASSES):
            for part in torch.randperm(len(x), generator=random).to(x.device).split(_TOKENS):
                rate = min(1.0, (step + 1) / min(_WARM_UP, total)) * cosine(step / total)
                for group in optimizer.param_groups:
                    group["lr"] = _RATE * rate
                optimizer.zero_grad()
                error(x[part], y[part]).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                step += 1
                progress(step, total)
            if (found := unseen()) < best:
                best, kept = found, copy.deepcopy(learner.parameters)
    learner.parameters = kept
    return tuple(matrix.detach() for matrix in learner.surrogates()[_RUN]), best / max(begun, 1e-30)
