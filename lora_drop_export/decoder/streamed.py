"""A transformers model of which one decoder layer at a time has weights.

Enters: a checkpoint. Leaves: the model in eager float32, its embedding and norms real, its layers and head without
weights until they are asked for. Knows no plan, no step and no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_export.checkpoint.checkpoint import Checkpoint, TensorSource
from lora_drop_export.weights.resolve import resolve_tensors

from .anatomy import (
    Recorder,
    buffer_values,
    decoder_layers,
    head_replaced,
    name_of,
    put_tensor,
    stored_tensors,
    tied_names,
)
from .attention_interface import AttentionCall, register_attention
from .build import build_model

ATTENTION_NAME = "lora_drop_streamed"
_HEAD_ROWS = 8192  # of the vocabulary, in memory at once


def as_tensor(array: npt.NDArray[Any]) -> Any:
    """A float32 tensor of a numpy array's values, sharing its memory where that is writeable."""
    import torch

    values = np.asarray(array, np.float32)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


class StreamedModel:
    """The model that a checkpoint's config describes, its weights read when they are wanted.

    Args:
        checkpoint: where they are.
        ids: int64, all token ids that will be looked up; the embedding's other rows are zero.
        attend: what its attention layers call.
        dtype: of a model whose constants that no checkpoint holds are taken, rounded as they are there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: npt.NDArray[np.int64],
        attend: Callable[[AttentionCall], Any],
        dtype: str = "float32",
    ) -> None:
        import torch

        self._checkpoint = checkpoint
        register_attention(ATTENTION_NAME, attend)
        with torch.device("meta"):
            model = build_model(checkpoint, "float32", ATTENTION_NAME)
            rounded = model if dtype == "float32" else build_model(checkpoint, dtype, ATTENTION_NAME)
        self.model = model
        self.layers = decoder_layers(model)
        self._tied = tied_names(model)
        for name, value in buffer_values(rounded).items():
            put_tensor(model, name, value.float() if value.is_floating_point() else value)
        inside = f"{name_of(model, self.layers)}."
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        for name, module in model.named_modules():
            if not f"{name}.".startswith(inside) and module is not embedding and module is not head:
                self._load(module, name, recurse=False)
        ref = self._tensor(f"{name_of(model, embedding)}.weight", embedding.weight)
        table = np.zeros(ref.shape, np.float32)  # pages that are not written to take no memory
        for token in np.unique(ids):
            table[token] = ref.rows(token, token + 1)[0]
        put_tensor(embedding, "weight", torch.from_numpy(table))

    def _tensor(self, name: str, parameter: Any) -> TensorSource:
        """Where a parameter's values are."""
        (ref,) = resolve_tensors(self._checkpoint, {name: tuple(parameter.shape)}, self._tied).values()
        return ref

    def _load(self, module: Any, prefix: str, recurse: bool = True) -> None:
        prefix = f"{prefix}." if prefix else ""
        for name, tensor in stored_tensors(module, self._checkpoint, prefix, recurse).items():
            ref = self._tensor(f"{prefix}{name}", tensor)
            put_tensor(module, name, as_tensor(ref.read()))

    def embed(self, ids: Any, positions: Any) -> tuple[Any, list[tuple[Any, Any]]]:
        """The first layer's input [B, S, d], and the arguments that each layer gets beside its input.

        Args:
            ids, positions: int64 [B, S].
        """
        recorded = Recorder(self.layers)
        with head_replaced(self.model, lambda x: x[..., :1]):
            self.model(input_ids=ids, position_ids=positions, use_cache=False)
        recorded.restore()
        return recorded.inputs[0], recorded.arguments

    def loaded_layers(self) -> Iterator[Any]:
        """Each layer in order, with its weights until the next one is asked for."""
        prefix = name_of(self.model, self.layers)
        for index, layer in enumerate(self.layers):
            self._load(layer, f"{prefix}.{index}")
            yield layer
            layer.to("meta")

    def head_input(self, hidden: Any) -> Any:
        """What reaches the head, [B, S, d], of the last layer's output [B, S, d]."""
        import torch

        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
        recorded = Recorder(self.layers, hidden)
        seen: list[Any] = []
        with head_replaced(self.model, lambda x: seen.append(x) or x[..., :1]):  # type: ignore[func-returns-value]
            self.model(input_ids=ids, use_cache=False)
        recorded.restore()
        return seen[0]

    def logits(self, hidden: Any) -> Any:
        """float32 logits [B, S, V] of the last layer's output: what the model does after its layers, its head by parts.

        The model is run twice: to see what reaches the head, and with what the head makes of it.
        """
        import torch

        logits = self._head(self.head_input(hidden))
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
        recorded = Recorder(self.layers, hidden)
        with head_replaced(self.model, lambda _: logits):
            result = self.model(input_ids=ids, use_cache=False).logits
        recorded.restore()
        return result.to(torch.float32)

    def _head(self, x: Any) -> Any:
        """`x Wᵀ + b`, W read a few thousand rows at a time; x [B, S, d] → [B, S, V]."""
        import torch

        head = self.model.get_output_embeddings()
        name = name_of(self.model, head)
        weight = self._tensor(f"{name}.weight", head.weight)
        bias = None if head.bias is None else as_tensor(self._tensor(f"{name}.bias", head.bias).read())
        result = torch.empty(*x.shape[:2], weight.shape[0])
        for begin in range(0, weight.shape[0], _HEAD_ROWS):
            rows = as_tensor(weight.rows(begin, begin + _HEAD_ROWS))
            result[..., begin : begin + len(rows)] = x @ rows.T
        return result if bias is None else result + bias
