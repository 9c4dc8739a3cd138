"""Finding and loading the attention plugin's library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lora_drop_runtime.errors import BundleError, first_line

from .library import error_logger

PLUGIN_VARIABLE = "LORA_DROP_PLUGIN_LIB"
PLUGIN_HINT = f"Build it (cmake -S plugins -B plugins/build && cmake --build plugins/build) or set {PLUGIN_VARIABLE}."
_loaded_plugins: set[tuple[Any, Path]] = set()


def plugin_path() -> Path:
    """Where the attention plugin's library is.

    Raises:
        BundleError: it is not there.
    """
    given = os.environ.get(PLUGIN_VARIABLE)
    built = Path(__file__).resolve().parents[4] / "plugins" / "build" / "liblora_drop_plugin.so"
    path = Path(given) if given else built
    if not path.is_file():
        raise BundleError("The attention plugin is needed.", note=f"{path} is not there.", hint=PLUGIN_HINT)
    return path


def load_plugin(trt: Any) -> None:
    """Load the attention plugin's library into the registry that all builders and runtimes of the process see.

    It stays there: an engine may outlive whoever loaded it, and a library cannot be loaded twice.

    Raises:
        BundleError: it is not there, or cannot be loaded.
    """
    path = plugin_path()
    if (trt, path) in _loaded_plugins:
        return
    logger = error_logger(trt)
    try:
        handle = trt.get_plugin_registry().load_library(str(path))
    except Exception as error:  # what the bindings raise differs from version to version
        logger.lines.append(first_line(error))
        handle = None
    if handle is None:
        raise BundleError(
            "The attention plugin cannot be loaded.", note=f"{path}: {logger.last_words()}", hint=PLUGIN_HINT
        )
    _loaded_plugins.add((trt, path))
