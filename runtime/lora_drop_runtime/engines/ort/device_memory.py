"""Buffers in a GPU's memory, held as OrtValues."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np

from lora_drop_runtime.engines.engine import Array, DeviceBuffer, head_spans
from lora_drop_runtime.errors import first_line

from .providers import no_device


class DeviceMemory:
    """Buffers in a GPU's memory as OrtValues of bytes, one for each name; asking again ends the one before.

    Args:
        ep_device: the device of a provider that was loaded as a library; None for the CUDA provider.
    """

    device_type = "cuda"

    def __init__(self, ort: Any, ep_device: Any) -> None:
        self._ort = ort
        self._info = None if ep_device is None else ep_device.memory_info(ort.OrtDeviceMemoryType.DEFAULT)
        self._values: dict[str, Any] = {}  # of all that are beside
        self._prefix = ""
        self._rooms: set[str] = set()  # what it has made room for itself

    def beside(self) -> DeviceMemory:
        """With names of its own for what it makes room for."""
        other = copy.copy(self)
        other._prefix, other._rooms = f"{id(other)}.", set()
        return other

    def forget(self) -> None:
        """Free what it has made room for."""
        for name in self._rooms:
            self._values.pop(name, None)
        self._rooms.clear()

    def hold(self, name: str, content: Array, shape: tuple[int, ...], dtype: str) -> DeviceBuffer:
        """A buffer with these bytes."""
        self._values.pop(name, None)
        value = self._values[name] = self._upload(name, content)
        return DeviceBuffer(name, value.data_ptr(), shape, dtype)

    def room(self, name: str, shape: tuple[int, ...], dtype: str) -> DeviceBuffer:
        """A buffer with finite values. One that is large enough stays where it is, so that CUDA graphs stay good."""
        name = self._prefix + name
        self._rooms.add(name)
        buffer = DeviceBuffer(name, 0, shape, dtype)
        value = self._values.get(name)
        if value is None or value.tensor_size_in_bytes() < buffer.nbytes:
            return self.hold(name, np.zeros(buffer.nbytes, np.uint8), shape, dtype)
        return replace(buffer, address=value.data_ptr())

    def block(self, content: Array) -> Any:
        """An OrtValue with these bytes, which the caller holds."""
        return self._upload("A step's inputs", content)

    def fill(self, value: Any, content: Array) -> None:
        """Other bytes into an OrtValue, as many as it has."""
        if self._info is None:
            value.update_inplace(content)
        else:
            self._ort.copy_tensors([self._ort.OrtValue.ortvalue_from_numpy(content)], [value])

    def replace(self, name: str, content: Array) -> None:
        """Other bytes into a buffer that has as many: it stays where it is, and CUDA graphs stay good."""
        value = self._values[name]
        assert value.tensor_size_in_bytes() == content.nbytes
        self.fill(value, content)

    def _upload(self, name: str, content: Array) -> Any:
        content = np.ascontiguousarray(content)
        create = self._ort.OrtValue
        try:
            if self._info is None:
                value = create.ortvalue_from_numpy(content, self.device_type, 0)
            else:
                value = create.ortvalue_from_shape_and_type(content.shape, np.uint8, memory_info=self._info)
                self._ort.copy_tensors([create.ortvalue_from_numpy(content)], [value])
        except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
            what = f"{name} takes {content.nbytes / 2**20:,.1f} MiB on the GPU: {first_line(error)}"
            raise no_device("The provider", RuntimeError(what)) from error
        return value

    def read(self, buffer: DeviceBuffer) -> Array:
        """The bytes of a whole buffer, or of its first rows."""
        assert self._values[buffer.name].data_ptr() == buffer.address
        return self._content(buffer.name)[: buffer.nbytes]

    def _content(self, name: str) -> Array:
        value = self._values[name]
        if self._info is not None:
            host = self._ort.OrtValue.ortvalue_from_shape_and_type(value.shape(), np.uint8)
            self._ort.copy_tensors([value], [host])
            value = host
        content: Array = value.numpy()
        return content

    def copy(self, source: DeviceBuffer, target: DeviceBuffer, slots: int | None) -> None:
        """As `Engine.copy`, by way of the host: ONNX Runtime copies whole values only."""
        begins = [self._values[buffer.name].data_ptr() for buffer in (target, source)]
        there, content = self._content(target.name).copy(), self._content(source.name)
        for to, origin, count in head_spans(source, target, slots):
            there[to - begins[0] :][:count] = content[origin - begins[1] :][:count]
        self.fill(self._values[target.name], there)

    def zero(self, buffer: DeviceBuffer) -> None:
        """As `Engine.zero`, likewise."""
        there = self._content(buffer.name).copy()
        there[buffer.address - self._values[buffer.name].data_ptr() :][: buffer.nbytes] = 0
        self.fill(self._values[buffer.name], there)
