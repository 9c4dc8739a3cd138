"""The tensors of a GGUF file as the Hugging Face model has them, dequantized when they are read.

Enters: a GGUF file, the transformers model (without weights) that its config describes. Leaves: parameter name →
`GgufTensor`. Names and what a family's tensors need (row order, norms less one, …) come from transformers, the block
formats from the gguf library; the rows asked for are all that is in memory.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.errors import ModelError

from lora_drop_export.quantize.formats import Blocked, BlockFormat, unpack

from .checkpoint import TensorSource
from .experts import GATE_UP, BiasesInTurns
from .foreign import refused

# Formats that are ours too: a float16 scale and signed integers. name → (bits, bytes of a block, values of a block)
_NATIVE = {"Q4_0": (4, 18, 32), "Q8_0": (8, 34, 32)}
_PROBE_COLUMNS = 8
_EXPERTS = re.compile(r"\.ffn_(gate|up|down)_exps\.(weight|bias)$")
_MISREAD = "gpt-oss.rope.scaling."  # begins keys of which transformers takes a wrong part, and then fails (5.24)
_UNFITTING = "A tensor of the GGUF file does not fit the model that its config describes."
_CONVERT_AGAIN = "Convert the model again, or take its safetensors checkpoint."


@dataclass(frozen=True)
class _Conversion:
    """How transformers turns a file's tensors into a model's."""

    processor: Any
    names: dict[str, str]

    def __call__(self, weights: npt.NDArray[Any], stored_name: str) -> dict[str, npt.NDArray[Any]]:
        """Parameter name → values, of one stored tensor; empty where the model has no such parameter."""
        parsed: dict[str, dict[str, Any]] = {"tensors": {}}
        result = self.processor.process(
            weights=weights, name=stored_name, tensor_key_mapping=self.names, parsed_parameters=parsed
        )
        made = {name: np.asarray(tensor) for name, tensor in parsed["tensors"].items()}
        return made | ({self.names[result.name]: result.weights} if result.name in self.names else {})


def _as_it_is(name: str) -> Callable[[npt.NDArray[Any], str], dict[str, npt.NDArray[Any]]]:
    """The conversion of a tensor that is a parameter of this name."""
    return lambda weights, _: {name: weights}


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """One parameter; `shape` is the model's, `stored_shape` and `stored_dtype` are the data's in the file.

    Offers what lora_drop_runtime's TensorPlace offers. `size_bytes` is that of the float32 values.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    kind: Any
    offset_bytes: int
    stored_shape: tuple[int, ...]
    stored_dtype: np.dtype[Any]
    stored_name: str
    conversion: Callable[[npt.NDArray[Any], str], dict[str, npt.NDArray[Any]]]
    dtype: str = "float32"

    @property
    def size_bytes(self) -> int:
        return 4 * math.prod(self.shape)

    def read(self) -> npt.NDArray[np.float32]:
        """All values, float32."""
        return self.rows(0, self.shape[0]) if self.shape and self._order is not None else _whole(self)

    def rows(self, begin: int, end: int) -> npt.NDArray[np.float32]:
        """Rows `begin` to `end` along the first axis, float32."""
        if self._order is None:
            return _whole(self)[begin:end]
        return self._dequantized(self._stored(begin, end))

    @property
    def native(self) -> BlockFormat | None:
        """The block format in which `native_rows` gives the stored integers as they are."""
        if self.kind.name not in _NATIVE or self._order is None or len(self.shape) != 2:
            return None
        bits, _, size = _NATIVE[self.kind.name]
        return BlockFormat(bits, size, symmetric=True)

    def native_rows(self, begin: int, end: int) -> Blocked:
        """Rows `begin` to `end` in the `native` format: integers, scales and zero points, not rounded again."""
        bits, block_bytes, size = _NATIVE[self.kind.name]
        data = np.ascontiguousarray(self._stored(begin, end)).reshape(-1, block_bytes)
        n = min(end, self.shape[0]) - begin
        scales = np.ascontiguousarray(data[:, :2]).view("<f2").astype(np.float32)
        if bits == 4:
            pairs = unpack(data[:, 2:, None], 4)  # value j and value j + 16 share a byte
            q = pairs.swapaxes(1, 2)
        else:
            q = data[:, 2:] ^ np.uint8(128)  # two's complement plus 128
        zero_points = np.full((n, self.shape[1] // size), 1 << (bits - 1), np.uint8)
        return q.reshape(n, -1), scales.reshape(n, -1), zero_points

    @functools.cached_property
    def _order(self) -> npt.NDArray[np.intp] | None:
        """The stored row that each row is; None where the values are made of the stored tensor in another way.

        Found by converting two small matrices, of row numbers and of column numbers.
        """
        if len(self.stored_shape) < 2 or 0 in self.stored_shape:  # rows of no values may be any number
            return None
        row_numbers, column_numbers = np.indices((self.stored_shape[0], _PROBE_COLUMNS), np.float32)
        try:
            rows = self.conversion(row_numbers, self.stored_name).get(self.name)
            columns = self.conversion(column_numbers, self.stored_name).get(self.name)
        except (ValueError, IndexError, RuntimeError):  # it wants the tensor's own shape
            return None
        if rows is None or columns is None or rows.shape != row_numbers.shape or columns.shape != rows.shape:
            return None
        order = rows[:, 0].astype(np.intp)
        moved_rows_only = (rows == row_numbers[order % len(order)]).all() and (columns == column_numbers).all()
        return order if moved_rows_only and np.array_equal(np.sort(order), np.arange(len(order))) else None

    def _stored(self, begin: int, end: int) -> npt.NDArray[Any]:
        """The data of rows, as they lie in the file; mapped anew, so that pages do not stay with the process."""
        assert self._order is not None
        order = self._order[begin:end]
        first, last = int(order.min()), int(order.max()) + 1
        row_bytes = math.prod(self.stored_shape[1:]) * self.stored_dtype.itemsize
        data = np.memmap(
            self.file,
            self.stored_dtype,
            "r",
            self.offset_bytes + first * row_bytes,
            (last - first, *self.stored_shape[1:]),
        )
        return data if np.array_equal(order, np.arange(first, last)) else data[order - first]

    def _dequantized(self, data: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        from gguf.quants import dequantize

        values: npt.NDArray[np.float32] = dequantize(data, self.kind)
        return values


@functools.lru_cache(maxsize=1)
def _whole(tensor: GgufTensor) -> npt.NDArray[np.float32]:
    """The values of a tensor that only can be converted as a whole."""
    with refused(_UNFITTING, tensor.stored_name, _CONVERT_AGAIN):
        data = np.memmap(tensor.file, tensor.stored_dtype, "r", tensor.offset_bytes, tensor.stored_shape)
        values = tensor.conversion(tensor._dequantized(data), tensor.stored_name)[tensor.name]
    if values.shape != tensor.shape:
        raise ModelError(
            _UNFITTING,
            note=f"{tensor.stored_name} is {values.shape}, the model's {tensor.name} is {tensor.shape}.",
            hint=_CONVERT_AGAIN,
        )
    return values.astype(np.float32, copy=False)


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Within it gguf parses a file, and makes a table of names, once.

    transformers asks for the one four times (with the vocabulary, which takes a second) and for the other once for each
    module of a model.
    """
    import gguf

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        """Of a plain array over the mapped file: a vocabulary is 200 000 views, and one of a memmap takes 3 times as
        long. Behind the file's end nothing is read: a list there may be said to have any number of elements."""

        @property
        def data(self) -> npt.NDArray[np.uint8]:
            return self._data

        @data.setter
        def data(self, mapped: npt.NDArray[np.uint8]) -> None:
            self._data = np.asarray(mapped)

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            found = super()._get(offset, dtype, count, override_order)
            if len(found) < count:
                raise IndexError
            return found

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    read = functools.cache(Reader)
    vars(gguf).update(GGUFReader=lambda path: read(Path(path).resolve()), get_tensor_name_map=functools.cache(names))
    try:
        yield
    finally:
        vars(gguf).update(GGUFReader=reader, get_tensor_name_map=names)


def gguf_reader(path: Path) -> Any:
    """gguf's reader of a file.

    Raises:
        ModelError: it is one of several that hold a model together. What is missing in it need not show: without a head
            it would be a model whose embedding is the head. Or its bytes are in the order of other machines.
        ValueError: it is none, or not whole.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (IndexError, ValueError) as error:
        if not isinstance(error, IndexError) and not re.search("reshape|unpack|dtype", str(error)):
            raise  # gguf's own say what is wrong; these are of views that end with the file
        raise ValueError("it ends before what its header promises, or the header is damaged") from error
    if reader.byte_order == "S":
        raise ModelError(
            "The GGUF file has its bytes in the order of other machines.",
            note=f"{path} is {reader.endianess.name.lower()}-endian, this machine is {sys.byteorder}-endian.",
            hint="Convert a copy of it in place with: gguf-convert-endian FILE native",
        )
    count = reader.fields.get("split.count")
    if count is not None and count.contents() > 1:
        raise ModelError(
            "The GGUF file is a part of a model.",
            note=f"{path} is one of {count.contents()} files.",
            hint="Make one of them with llama.cpp's llama-gguf-split --merge.",
        )
    reader.misread = {key: reader.fields.pop(key) for key in list(reader.fields) if key.startswith(_MISREAD)}
    return reader


def _of_experts(stored: Any, pattern: str, path: Path) -> dict[str, GgufTensor]:
    """The matrices [N, K] of a stored tensor [E, N, K], by the names that a checkpoint gives them apart.

    Args:
        pattern: of the names, with a place for the expert's number.
    """
    found = {}
    for expert, data in enumerate(stored.data):
        name = pattern.format(expert)
        found[name] = GgufTensor(
            name=name,
            file=path,
            shape=(int(stored.shape[1]), int(stored.shape[0])),
            kind=stored.tensor_type,
            offset_bytes=int(stored.data_offset) + expert * data.nbytes,
            stored_shape=tuple(data.shape),
            stored_dtype=data.dtype,
            stored_name=stored.name,
            conversion=_as_it_is(name),
        )
    return found


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _mixture(stored_name: str, experts: re.Match[str] | None, names: Mapping[str, str]) -> str | None:
    """What the model calls the experts that a stored tensor belongs to."""
    if experts is None:
        return None
    begin = stored_name[: experts.start()]
    known = (names.get(f"{begin}.ffn_{part}_exps{end}") for part in (experts[1], "down") for end in (".weight", ""))
    return next((name.rpartition(".")[0] for name in known if name), None)


def read_gguf(path: Path, reader: Any, model: Any, log: Callable[[str], None]) -> dict[str, TensorSource]:
    """The file's tensors under the names of the model's parameters.

    Args:
        path: the GGUF file.
        reader: gguf's, of that file.
        model: the transformers model of its config; its weights are not looked at.
        log: is told of what the model's layers have no place for, such as biases that its config does not tell of.

    Raises:
        ModelError: weights have scales beside them, or biases of gate and up differ in shape.
        Exception: whatever transformers or gguf stumble over in a damaged file.
    """
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
        read_field,
    )

    architecture = read_field(reader, "general.architecture")[0]
    config = load_gguf_checkpoint(str(path))["config"]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    conversion = _Conversion(processor, get_gguf_hf_weights_map(model, processor))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tensors: dict[str, TensorSource] = {}
    kinds, left = set(), list[str]()
    for stored in reader.tensors:
        if stored.name.endswith(".scale"):  # of a whole matrix in NVFP4
            raise ModelError(
                "The GGUF file has scales beside its weights, which are not read.",
                note=f"It has {stored.name!s:.120}.",
                hint="Take a GGUF file in another format, or the model's float checkpoint.",
            )
        name, experts = conversion.names.get(stored.name), _EXPERTS.search(stored.name)
        mixture = _mixture(stored.name, experts, conversion.names)
        if experts and mixture and len(stored.data.shape) == 3:
            tensors |= _of_experts(stored, f"{mixture}.{{}}.{experts[1]}_proj.weight", path)
            continue
        how: Callable[[npt.NDArray[Any], str], dict[str, npt.NDArray[Any]]] = conversion
        if name is None:  # parameters, and not weights of modules
            name = conversion.names.get(stored.name.removesuffix(".weight"))
            if experts and mixture and experts[2] == "bias":
                name = f"{mixture}.{experts[1]}_proj_bias"
                shapes.setdefault(name, tuple(map(int, stored.shape[::-1])))  # gate and up are one in the model
            how = _as_it_is(str(name))
        if name is None or name not in shapes:
            left += [stored.name] if stored.name.startswith("blk.") else []
            continue
        there = tuple(map(int, stored.shape[::-1]))
        tensor = GgufTensor(
            name=name,
            file=path,
            shape=shapes[name],
            kind=stored.tensor_type,
            offset_bytes=int(stored.data_offset),
            stored_shape=tuple(stored.data.shape),
            stored_dtype=stored.data.dtype,
            stored_name=stored.name,
            conversion=how,
        )
        if _without_ones(there) != _without_ones(tensor.shape):
            may_differ = tensor._order is None  # it is made of the stored one as a whole, and `_whole` says what fits
            is_said = len(there) == 2 and 0 not in there
            if not may_differ or not (is_said or stored.n_elements == math.prod(tensor.shape)):
                tensor = replace(tensor, shape=there)  # it does not fit the model, which resolve_tensors says
        if stored.tensor_type not in kinds:
            tensor._dequantized(np.asarray(stored.data[:1]))  # refuses a format that it does not know
            kinds.add(stored.tensor_type)
        tensors[name] = tensor
    for gate in [name for name in tensors if name.endswith(".gate_proj_bias")]:
        mixture = gate.removesuffix(".gate_proj_bias")
        both, up = f"{mixture}.{GATE_UP}_bias", tensors.pop(f"{mixture}.up_proj_bias", None)
        if up is None:
            continue
        if tensors[gate].shape != up.shape:
            raise ModelError(
                "The GGUF file's experts have biases of other shapes for gate and up.",
                note=f"{gate} is {tensors[gate].shape}, and {up.name} is {up.shape}.",
                hint=_CONVERT_AGAIN,
            )
        tensors[both] = BiasesInTurns(both, (tensors.pop(gate), up))
    if left:
        more = f" and {len(left) - 1} more" if left[1:] else ""
        log(f"warning: transformers' model has no place for {left[0]}{more} of the file: they are left out")
    return tensors
