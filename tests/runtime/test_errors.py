"""What messages are made of."""

from __future__ import annotations

import pickle

import pytest
from lora_drop_runtime.errors import InputError, NoDeviceError, engine_hint, first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no such file"), "no such file"),
        (ValueError("  It has 3 rows.\nand more"), "It has 3 rows"),
        (ValueError(""), "ValueError"),
        (ValueError("..."), "ValueError"),
    ],
)
def test_first_line(error: Exception, said: str) -> None:
    """A message puts its own full stop behind it."""
    assert first_line(error) == said


@pytest.mark.parametrize("kind", [InputError, NoDeviceError])
def test_errors_cross_processes(kind: type[InputError] | type[NoDeviceError]) -> None:
    """A pool of processes pickles what its workers raise: fact, note and hint stay lines of their own."""
    error = kind("No room.", note="It has 1\n2.", hint="Make some.")
    came = pickle.loads(pickle.dumps(error))
    assert type(came) is kind
    assert str(came) == str(error) == "No room.\nNote: It has 1\\n2.\nHint: Make some."
    assert (came.fact, came.note, came.hint) == (error.fact, error.note, error.hint)


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc", "Free memory"),
        ("Failed to allocate 113246208 bytes of memory", "Free memory"),
        ("can't alloc", "Free memory"),
        ("pthread_create failed, error code: 11 error msg: Resource temporarily unavailable", "Ask for fewer"),
        ("/bundle/openvino/steps.onnx: Resource temporarily unavailable", "Ask for fewer"),
        ("Secure opened-file canonicalization requires procfs at /proc/self/fd/4. Ensure /proc is", "Mount /proc"),
        ("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Protobuf parsing failed.", "Check the bundle"),
    ],
    ids=["bad_alloc", "bytes", "alloc", "threads", "threads of openvino", "procfs", "protobuf"],
)
def test_a_graph_that_found_no_memory_thread_or_proc_is_not_called_damaged(said: str, hint: str) -> None:
    assert engine_hint(RuntimeError(said)).startswith(hint)
