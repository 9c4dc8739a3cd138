"""The OpenVINO that is installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from lora_drop_runtime.errors import InputError, first_line

LEAST_VERSION, BELOW_VERSION = (2026, 4), (2026, 5)  # tested; paged attention's inputs change between releases
_TELEMETRY = "openvino_telemetry"
INSTALL = "pip install 'lora-drop-export[openvino]'"


@contextlib.contextmanager
def _untold() -> Iterator[None]:
    """Within it `openvino` is imported as where `openvino-telemetry` is not installed: with that it reports the import
    to its maker, and keeps an identifier in the user's home."""
    if "openvino" in sys.modules or _TELEMETRY in sys.modules:  # who came first has decided
        yield
        return
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[_TELEMETRY]


def import_openvino() -> Any:
    """The module `openvino`, which tells nobody that it is used.

    Raises:
        InputError: it is not installed, does not load, or is another version than those tested.
    """
    try:
        with _untold():
            import openvino

        version = str(openvino.__version__)
        openvino.Core  # noqa: B018  # a folder that an uninstalled package left imports, and is empty
    except Exception as error:  # beside ImportError whatever a library that does not load makes of itself
        raise InputError(
            "OpenVINO is not installed, or does not work.",
            note=f"Target openvino runs on it: {first_line(error)}.",
            hint=f"{INSTALL}; or use --target ort.",
        ) from None
    found = tuple(int(part) for part in version.split("-")[0].split(".")[:2])
    if not LEAST_VERSION <= found < BELOW_VERSION:
        least, below = (".".join(map(str, v)) for v in (LEAST_VERSION, BELOW_VERSION))
        raise InputError(
            "The installed OpenVINO is another version than target openvino is made for.",
            note=f"It is {version.split('-')[0]}; {least} or newer is needed, below {below}.",
            hint=f"pip install 'openvino>={least},<{below}'; or use --target ort.",
        )
    return openvino
