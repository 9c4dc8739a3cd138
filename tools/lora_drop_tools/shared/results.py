"""Where a command's results go: looked at before the work, written after it.

What is there is replaced only where an earlier run of the command wrote it: JSON is known by its keys, a figure by its
metadata.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.files import is_device, is_file

from lora_drop_export.staging import file as staging
from lora_drop_export.staging.area import resolved

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SOFTWARE = "lora-drop"  # as the metadata of our figures names what wrote them
_SIGN = b"tEXtSoftware\0" + _SOFTWARE.encode()  # how PNG has it, before the image's data
_LEGEND_WIDTH = 80  # letters that are as wide as axes


def said_command(arguments: Sequence[str]) -> str:
    """A command line for a result that others read: of files outside the current folder only the names."""
    begin_of_path = re.compile(r"(^|[=,])(?:[A-Za-z]:[\\/]|~|[\\/])[^=,]*[\\/]")
    return " ".join(begin_of_path.sub(r"\1", argument) for argument in arguments)


def _refuse_another(path: Path, what: str, option: str) -> None:
    raise InputError(
        f"The file at {option} is not {what}, so it will not be replaced.",
        note=f"{path} is not touched.",
        hint=f"Remove it, or give another {option}.",
    )


def _check_json(path: Path, keys: Collection[str]) -> None:
    """Refuse a file that holds something else than a JSON object with these keys."""
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not set(keys) <= set(found):
        _refuse_another(path, "a result of this command", "--json")


def _check_figure(path: Path) -> None:
    """Refuse a file that is no figure of ours."""
    try:
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                if _SIGN not in file.read(4096):
                    _refuse_another(path, "a figure of this command", "--plots")
    except OSError:
        _refuse_another(path, "a figure that can be read", "--plots")


def refuse_in_bundle(path: Path, option: str) -> None:
    """Refuse a place in a bundle, which then is opened or replaced no more. Raises InputError."""
    place = resolved(path)
    for parent in (place, *place.parents):
        if is_file(parent / MANIFEST_NAME):
            raise InputError(
                f"The results at {option} would lie inside a bundle.",
                note=f"{path} is below {parent}, which holds only what its manifest records.",
                hint=f"Give another {option}.",
            )


def check_results(
    json_file: Path | None, keys: Collection[str], plots: Path | None = None, patterns: Collection[str] = ()
) -> None:
    """Refuse before any work what could not be written after it.

    Args:
        keys: of a result that an earlier run of the command may have written to `json_file`.
        patterns: of the figures' names in `plots`.

    Raises:
        InputError: it cannot be written, something else is there, or matplotlib is missing.
    """
    for path, option in ((json_file, "--json"), (plots, "--plots")):
        if path is not None:
            refuse_in_bundle(path, option)
    if plots is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise InputError(
                "Figures need matplotlib.",
                note="--plots was given, and matplotlib is not installed.",
                hint="pip install 'lora-drop-export[bench]', or leave --plots out.",
            )
        if plots.exists() and not plots.is_dir():
            raise InputError(
                "The results cannot be written.",
                note=f"{plots} is not a directory.",
                hint="Give another --plots.",
            )
        staging.check_writable(plots / "figure.png", "--plots", parents=True)
        for pattern in patterns:
            for path in sorted(plots.glob(pattern)):
                _check_figure(path)
    if json_file is not None:
        staging.check_writable(json_file, "--json")
        _check_json(json_file, keys)


def of_one_request(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], int, int]:
    """Of the rows of a bench result those of the smallest batch and, among these, the longest context; and both."""
    batch, context = min((row["rows"], -row["context"]) for row in rows)
    return [row for row in rows if (row["rows"], -row["context"]) == (batch, context)], batch, -context


@contextlib.contextmanager
def bench_file(path: Path, what: str) -> Iterator[None]:
    """Where what `lora-drop bench --json` wrote is read: whatever is wrong with it becomes an InputError."""
    try:
        if is_device(path):
            raise ValueError("it is a device")
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"The measured {what} cannot be read.",
            note=f"{path}: {type(error).__name__}: {error}.",
            hint="Give what lora-drop bench --json wrote.",
        ) from None


def check_bench_bundles(path: Path, what: str, held: Collection[str], names: Collection[str]) -> None:
    """Refuse a file of `lora-drop bench --json` that has none of these bundles. Raises InputError."""
    if not set(held) & set(names):
        raise InputError(
            f"The measured {what} are of other bundles.",
            note=f"{path} has {', '.join(sorted(held)) or 'none'}; asked for are {', '.join(names)}.",
            hint="They are joined by the name of the bundle's directory.",
        )


@contextlib.contextmanager
def then_shown(show: Callable[[], None]) -> Iterator[None]:
    """Write files inside, first, since who reads tables may have gone. They are shown behind it in any case: where a
    disk is full, they are what is left.
    """
    try:
        yield
    finally:
        show()


def write_json(path: Path, text: str, keys: Collection[str]) -> None:
    """Write a result as a whole. Raises InputError where it cannot be written, or something else has come there."""
    _check_json(path, keys)
    staging.write_file(path, text.encode(), "--json")


def colours(count: int) -> list[Any]:
    """One for each of so many curves; matplotlib's own are ten, of more two curves would have the same."""
    import matplotlib

    return [f"C{n}" if count <= 10 else matplotlib.colormaps["viridis"](n / count) for n in range(count)]


def add_legend(axes: Axes) -> None:
    """A legend in the axes, or below them where it would cover the curves; the saved figure is as much larger."""
    handles, names = axes.get_legend_handles_labels()
    names = [textwrap.fill(name, _LEGEND_WIDTH) for name in names]
    longest = max((len(line) for name in names for line in name.split("\n")), default=0)
    if len(names) <= 8 and longest <= _LEGEND_WIDTH // 2:
        axes.legend(handles, names, fontsize="small")
        return
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, -0.15), "borderaxespad": 0}
    legend = axes.legend(handles, names, fontsize="small", ncols=max(1, _LEGEND_WIDTH // (longest + 8)), **place)
    legend.set_in_layout(False)  # else the axes shrink for it


def figure_bytes(figure: Figure) -> bytes:
    """A figure as PNG that says who drew it. Names in it are drawn as they are: two $ make no formula."""
    legends = [legend for axes in figure.axes if (legend := axes.get_legend()) is not None]
    named = [axes.title for axes in figure.axes] + [text for legend in legends for text in legend.get_texts()]
    for text in [*figure.texts, *named]:
        text.set_parse_math(False)
    below = [legend for legend in legends if not legend.get_in_layout()]
    whole: dict[str, Any] = {"bbox_inches": "tight", "bbox_extra_artists": [*figure.texts, *below]} if below else {}
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, metadata={"Software": _SOFTWARE}, **whole)
    return data.getvalue()


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure of --plots as a whole; makes the directory. Raises InputError as `write_json` does."""
    _check_figure(path)
    staging.write_file(path, figure_bytes(figure), "--plots", parents=True)
    return path
