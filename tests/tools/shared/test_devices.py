"""A device in the place of a text or a result may have no end: it was read until the memory was full."""

from __future__ import annotations

import os

import pytest
from lora_drop_runtime.errors import InputError
from lora_drop_tools.eval.requests import read_speedups
from lora_drop_tools.shared.corpus import read_texts


def test_devices_are_not_read() -> None:
    for read in (lambda device: read_texts([device]), lambda device: read_speedups(device, ["bundle"])):
        with pytest.raises(InputError, match=r"cannot be read\.\nNote: .* is a device\."):
            read(os.devnull)


def test_pipes_are() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"the tide")
    os.close(writer)
    assert read_texts([f"/dev/fd/{reader}"]) == ["the tide"]
    os.close(reader)
