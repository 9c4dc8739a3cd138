"""Short convolutions, as LFM2's: in the place of an attention each channel is mixed over the last few tokens.

Enters: transformers' model, whose attention is one of ours (attention_interface.py). Leaves: the same model, whose
convolutions call that function, too, with a `ConvolutionCall`, and which gives their result [B, S, d] back.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from lora_drop_runtime.errors import ModelError

from .attention_interface import attention_function


@dataclass(frozen=True)
class ConvolutionCall:
    """One call of a layer's convolution, gate_t · (Σ_j taps_j · x_{t − K + 1 + j} + bias), with zeros before the text.

    What a cache keeps of a token is x: one half of its channels where attention has K, the other where it has V.

    Attributes:
        module: the convolution; its `layer_idx` is the layer.
        x, gate: [B, S, d].
        taps: [d, 1, K].
        bias: [d]; None for none.
    """

    module: Any
    x: Any
    gate: Any
    taps: Any
    bias: Any

    @property
    def window(self) -> int:
        """Positions that a token is mixed of, itself included: K."""
        return int(self.taps.shape[2])

    @property
    def key(self) -> Any:
        """The first half of the channels, [B, 1, S, d/2]."""
        return self.x[..., : self.x.shape[2] // 2].unsqueeze(1)

    @property
    def value(self) -> Any:
        """The second half, [B, 1, S, d/2]."""
        return self.x[..., self.x.shape[2] // 2 :].unsqueeze(1)

    def only(self, row: int, tokens: int) -> ConvolutionCall:
        """The first tokens of a row."""
        x, gate = (tensor[row : row + 1, :tokens] for tensor in (self.x, self.gate))
        return ConvolutionCall(self.module, x, gate, self.taps, self.bias)

    def mixed(self, key: Any, value: Any, seen: Any) -> Any:
        """[B, S, d], of the halves of what a cache holds.

        Args:
            key: [B, 1, C, d/2], as is value.
            seen: bool [S, C], of each token the places that it sees, K at most; the last one is its own.
        """
        import torch

        entries = torch.cat([key, value], dim=3)[:, 0]  # [B, C, d]
        behind = seen.flip(1).cumsum(1).flip(1)  # of what a token sees the last is 1, that before it 2
        y = torch.zeros_like(self.x)
        for tap in range(self.window):
            chosen = (seen & (behind == self.window - tap)).to(entries.dtype)  # one place of each token, or none
            y = y + self.taps[:, 0, tap] * (chosen @ entries)
        return self.gate * (y if self.bias is None else y + self.bias)


@functools.cache
def _through_interface(convolution: type[Any]) -> Any:
    """The class of a convolution whose mixing goes through the attention function that its config names."""

    class ThroughInterface(convolution):  # type: ignore[misc]
        def forward(self, hidden_states: Any, *_: Any, **__: Any) -> Any:
            b, c, x = self.in_proj(hidden_states).chunk(3, dim=-1)
            call = ConvolutionCall(self, b * x, c, self.conv.weight, self.conv.bias)
            return self.out_proj(attention_function(self.config._attn_implementation)(call))

    ThroughInterface.__name__ = convolution.__name__  # by which other parts know what it is
    return ThroughInterface


def exchange_convolutions(model: Any) -> None:
    """Let a model's short convolutions call its attention function, for good.

    Raises:
        ModelError: they have too few taps, or their channels cannot be cut into halves that caches take.
    """
    for module in model.modules():
        if type(module).__name__.endswith("ShortConv"):
            width, _, size = module.conv.weight.shape
            if width % 16 or size < 2:
                raise ModelError(
                    "The model's short convolutions are of another kind than LFM2's.",
                    note=f"hidden_size is {width}, needed is a multiple of 16; conv_L_cache is {size}, 2 at least.",
                    hint="Check config.json.",
                )
            kind: Any = type(module)
            module.__class__ = _through_interface(kind)
