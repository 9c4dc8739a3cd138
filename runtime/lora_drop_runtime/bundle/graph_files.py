"""Which files an ONNX graph reads beside itself, found without the onnx library.

Enters: a model's bytes. Leaves: the location, offset and size of every tensor that lies outside, wherever in the model
it stands, and the engines that EPContext nodes name; or a ValueError where the bytes are no such model. Only what
can hold one is decoded: a location's key is spelled in full in the bytes around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_LOCATION = b"location"
_ENGINE = b"ep_cache_context"
_ORT_FORMAT = b"ORTM"  # ONNX Runtime's own format, which it tells by these bytes at offset 4
_MOST_NESTING = 100  # protobuf's own limit
# Message → the fields that are messages themselves and may hold a tensor, by number, as onnx.proto has them
_MESSAGES = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_EXTERNAL_DATA = 13  # of a tensor: entries of a key (1) and a value (2)
_ATTRIBUTE_NAME, _ATTRIBUTE_TEXT = 1, 4


@dataclass(frozen=True)
class FilePart:
    """A part of another file that a graph reads; `size_bytes` is None where the graph does not say."""

    location: str
    offset_bytes: int = 0
    size_bytes: int | None = None


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number is cut off")


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of every length-delimited field of a message."""
    while at < end:
        key, at = _varint(data, at, end)
        if key >> 32:  # protobuf's own reader drops those bits, and finds another field than is looked for here
            raise ValueError("a field's number has more than 32 bits")
        number, wire = key >> 3, key & 7
        if wire == 2:
            size, at = _varint(data, at, end)
            if number and size <= end - at:
                yield number, at, at + size
            at += size
        elif wire == 0:
            _, at = _varint(data, at, end)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        if wire not in (0, 1, 2, 5) or not number or at > end:
            raise ValueError("a field does not end where its message does")


def _number(entries: dict[bytes, bytes], key: bytes) -> int | None:
    text = entries.get(key)
    if text is None:
        return None
    if not text.isdigit() or len(text) > 19:
        raise ValueError(f"a tensor's {key.decode()} is no number")
    return int(text)


def _of_tensor(data: bytes, begin: int, end: int) -> Iterator[FilePart]:
    entries: dict[bytes, bytes] = {}
    for number, at, stop in _fields(data, begin, end):
        if number == _EXTERNAL_DATA:
            pair = {1: b"", 2: b""} | {n: data[a:b] for n, a, b in _fields(data, at, stop)}
            if pair[1] == _LOCATION and _LOCATION in entries:
                raise ValueError("a tensor has two locations")
            entries[pair[1]] = pair[2]
    if _LOCATION in entries:
        location = entries[_LOCATION].decode("utf-8")
        yield FilePart(location, _number(entries, b"offset") or 0, _number(entries, b"length"))


def _of_attribute(data: bytes, begin: int, end: int, folder: str) -> Iterator[FilePart]:
    texts = {number: data[at:stop] for number, at, stop in _fields(data, begin, end)}
    if texts.get(_ATTRIBUTE_NAME) == _ENGINE:
        yield FilePart(folder + texts.get(_ATTRIBUTE_TEXT, b"").decode("utf-8"))


def _parts(data: bytes, begin: int, end: int, message: str, folder: str, left: int) -> Iterator[FilePart]:
    if not left:
        raise ValueError("its messages are nested too deep")
    if message == "tensor":
        yield from _of_tensor(data, begin, end)
        return
    if message == "attribute":
        yield from _of_attribute(data, begin, end, folder)
    inner = _MESSAGES[message]
    for number, at, stop in _fields(data, begin, end):
        if number in inner and (data.find(_LOCATION, at, stop) >= 0 or data.find(_ENGINE, at, stop) >= 0):
            yield from _parts(data, at, stop, inner[number], folder, left - 1)


def graph_files(data: bytes, folder: str = "") -> list[FilePart]:
    """The parts of other files that a serialized ModelProto reads.

    Args:
        folder: of the graph in its bundle, with a slash at the end: engines lie beside the graph that names them,
            tensors are named from the bundle's root.

    Raises:
        ValueError: the bytes are no ModelProto.
    """
    if data[4:8] == _ORT_FORMAT:
        raise ValueError("it is in ONNX Runtime's own format")
    return list(_parts(data, 0, len(data), "model", folder, _MOST_NESTING))
