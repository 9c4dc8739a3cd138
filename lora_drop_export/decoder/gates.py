"""How an expert's module joins gate and up, found by asking it: families write the same formula in many ways."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

_WIDTH = 2  # so that columns in turns are not halves
_NEAR, _ENDLESS = 8.0, 1e30  # values tried where alpha and what is added tell; a limit that is none
SILU = "silu"
_GELU = {"gelu_tanh": "tanh", "gelu": "none"}  # activation → how ONNX and PyTorch call its approximation
_found: WeakKeyDictionary[Any, Gate | None] = WeakKeyDictionary()  # by module: while one is traced nothing can be tried


@dataclass(frozen=True)
class Gate:
    """`g · σ(alpha · g) · (u + added)`; before, with a limit, g is at most that, and u between it and less it. Or
    `GELU(g) · u`, which has none of these numbers.

    Attributes:
        limit: 0 for none.
        activation: `silu`, `gelu`, or `gelu_tanh`, its approximation by tanh.
    """

    alpha: float = 1.0
    added: float = 0.0
    limit: float = 0.0
    activation: str = SILU

    @property
    def approximate(self) -> str | None:
        """Of GELU, as ONNX and PyTorch call it; None of another activation."""
        return _GELU.get(self.activation)

    def __call__(self, gate: Any, up: Any) -> Any:
        """Of PyTorch tensors of one shape."""
        if self.approximate is not None:
            from torch.nn.functional import gelu

            return gelu(gate, approximate=self.approximate) * up
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * (self.alpha * gate).sigmoid() * (up + self.added)


def _numbers(experts: Any, *names: str) -> list[float]:
    found = (getattr(experts, name, None) for name in names)
    return [float(number) for number in found if isinstance(number, int | float)]


def _tried(experts: Any) -> Gate | None:
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    limits = [limit for limit in _numbers(experts, "limit", "swiglu_limit") if 0 < limit < _ENDLESS] + [0.0]
    with unset_fake_temporarily(), torch.device("cpu"):
        ends = _NEAR, 1.5 * max(*limits, _NEAR)
        values = torch.cat([torch.linspace(-end, end, 12, dtype=torch.float32) for end in ends])
        gate, up = torch.cartesian_prod(values, values).T.reshape(2, -1, _WIDTH)
        apart = getattr(experts, "is_concatenated", not experts.is_transposed)  # older ones do not say
        both = torch.stack([gate, up], dim=1 if apart else -1)
        try:
            found = experts._apply_gate(both.flatten(1))
        except Exception:  # of whatever shape and kind the family's own code is
            return None
        alphas = [*_numbers(experts, "alpha", "swiglu_alpha"), 1.0]
        forms = (Gate(*numbers) for numbers in itertools.product(alphas, (0.0, 1.0), limits))
        for one in (*forms, *(Gate(activation=activation) for activation in _GELU)):
            wanted = one(gate, up)
            if found.shape == wanted.shape and torch.allclose(found.float(), wanted, rtol=1e-5, atol=1e-30):
                return one
    return None


def gate_of(experts: Any) -> Gate | None:
    """The gate of a module of experts; None for one of another formula."""
    if experts not in _found:
        _found[experts] = _tried(experts)
    return _found[experts]
