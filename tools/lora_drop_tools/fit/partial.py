"""A fit that was interrupted, and how it is taken up again."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.errors import InputError, PlanError
from lora_drop_runtime.plan.sites import in_halves, sorted_sites

from lora_drop_export.staging.area import resolved
from lora_drop_export.staging.file import check_writable
from lora_drop_export.staging.owned import Kind, foreign_entries, refuse_foreign, remove_files
from lora_drop_export.staging.rename import rename_new
from lora_drop_tools.shared.results import refuse_in_bundle

from .distill import Workers, saved

if TYPE_CHECKING:
    from lora_drop_tools.teacher_forcing.surrogates import Surrogates

_SETTINGS, _BEGIN, _STATE = "settings.json", "begin.pt", "state.pt"
_FILES = frozenset((_SETTINGS, _BEGIN, _STATE, "state.part"))


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What was told otherwise, in words; empty where nothing was. An earlier version told less."""
    found = [name for name in now if name in before and before[name] != now[name]]
    said = {name: f"{name} {before[name]!r}" for name in found}
    said |= {"text_sha256": "another text under these names", "adapters_sha256": "other adapters under this name"}
    return ", ".join(said[name] for name in found)


def _place(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _as_today(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the names of today; version 0.1 wrote layers and an injection, and `tokens` of the closed form."""
    if "drop_layers" in settings:
        as_sites = in_halves if settings.get("injection") == "attn_mlp" else sorted_sites
        sites = {"sites": list(as_sites(settings["drop_layers"])), "bare_sites": []}
        settings = {name: settings[name] for name in settings if name not in ("drop_layers", "injection")} | sites
    if "closed_form_tokens" not in settings:
        new = {"closed_form_tokens": settings.get("tokens"), "tokens": None, "dataset": None, "text_column": "text"}
        settings = settings | new | {"policies": [settings.get("policy")], "offset_weights": None}
    return settings


def _read(root: Path) -> dict[str, Any] | None:
    """What an unfinished fit was told: its `settings`, and whether it may replace what is at --out (`force`)."""
    try:
        found = json.loads((root / _SETTINGS).read_bytes())
        if not isinstance(found["settings"], dict) or not isinstance(found["force"], bool):
            return None
        return {"settings": _as_today(found["settings"]), "force": found["force"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, PlanError):
        return None


_KIND = Kind("unfinished fit", _SETTINGS, lambda root: None if _read(root) is None else _FILES)


def begun_with_force(out: Path) -> bool:
    """Whether an unfinished fit is there that was begun with --force, which --resume need not repeat."""
    found = _read(_place(out))
    return found is not None and found["force"]


def _nothing_to_resume(root: Path) -> InputError:
    return InputError(
        "There is no such fit to resume.",
        note=f"{root}: there is none.",
        hint="Give its --out, or leave --resume out.",
    )


def check_same(out: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to resume a fit that was begun with other settings, of which `settings` may be a part.

    Raises:
        InputError: it was, or there is none.
    """
    root = _place(out)
    found = _read(root)
    if found is None:
        raise _nothing_to_resume(root)
    if difference := _difference(found["settings"], settings):
        raise InputError(
            "The unfinished fit was begun with other options.",
            note=f"{root}: it was begun with {difference}.",
            hint="Give the same options as before, or begin anew: leave --resume out and say --force.",
        )


def check_place(out: Path, resume: bool, force: bool) -> None:
    """Refuse what lies at the place of an unfinished fit, before any work; its settings are not looked at.

    Raises:
        InputError: there is nothing to resume, or something is there that must not be replaced.
    """
    root = _place(out)
    found = _read(root)
    if resume and not os.path.lexists(root):
        raise _nothing_to_resume(root)
    if resume and found is None:
        raise InputError(
            "There is no such fit to resume.",
            note=f"{root} is no unfinished fit, or a damaged one.",
            hint="Move it away, and leave --resume out.",
        )
    if resume or not os.path.lexists(root):
        return
    if not force:
        raise InputError(
            "An unfinished fit is there.",
            note=f"{root} is not touched.",
            hint="Go on with it by --resume, or begin anew by --force.",
        )
    if found is None:
        raise InputError(
            "The place of an unfinished fit is taken.",
            note=f"{root} is not one, so --force will not replace it.",
            hint="Move it away, or choose another --out.",
        )
    refuse_foreign(root, _KIND, foreign_entries(root, _FILES))


def check_log_dir(log_dir: Path, out: Path) -> None:
    """Refuse a place for curves that is no directory, cannot be written, or is a bundle or where the adapters are made.

    Raises:
        InputError: it is.
    """
    refuse_in_bundle(log_dir, "--log-dir")
    place = resolved(log_dir)
    for taken in (resolved(out), _place(resolved(out))):
        if place == taken or taken in place.parents:
            raise InputError(
                "The curves cannot lie where the adapters are made.",
                note=f"--log-dir is {log_dir}, --out is {out}.",
                hint="Give --log-dir a directory of its own.",
            )
    if os.path.lexists(place) and not place.is_dir():
        raise InputError("--log-dir is no directory.", note=f"{log_dir} is a file.", hint="Give a directory.")
    check_writable(place / "events", "--log-dir", parents=True)


class Partial:
    """The directory beside `out` that an interrupted fit leaves; all processes read it, the first one changes it."""

    def __init__(self, out: Path, settings: Mapping[str, Any], resume: bool, force: bool, workers: Workers) -> None:
        self.root = _place(out)
        self.state, self.begin = self.root / _STATE, self.root / _BEGIN
        self._settings, self._force = dict(settings), force
        self._writes = workers.rank == 0
        if resume:
            check_same(out, self._settings)
            return
        if self._writes:
            check_place(out, resume, force)

    def save(self, pairs: Surrogates, scales: Mapping[str, Any], stages: Mapping[str, Any], staged: Path) -> None:
        """Keep what distillation begins with, as a whole or not at all.

        Args:
            staged: where the directory is made before it takes its place.
        """
        import torch

        if not self._writes:
            return
        staged.mkdir()
        data = io.BytesIO()  # an error of the disk is then Python's, which says what it is
        begun = {"pairs": dict(pairs), "scales": dict(scales), "stages": dict(stages), "settings": self._settings}
        torch.save(begun, data)
        (staged / _BEGIN).write_bytes(data.getvalue())
        (staged / _SETTINGS).write_text(
            json.dumps({"settings": self._settings, "force": self._force}, indent=1), encoding="utf-8"
        )
        self.remove()
        rename_new(staged, self.root)

    def remove(self) -> None:
        """Forget it: the adapters are where they belong. What says that it is an unfinished fit goes last."""
        if self._writes:
            remove_files(self.root, _FILES - {_SETTINGS})
            remove_files(self.root, _FILES)

    def load_begin(self) -> tuple[Surrogates, dict[str, Any], dict[str, dict[str, float]]]:
        """What distillation began with: adapters, scales of the features, figures of the stages before."""
        with saved(self.begin, "Begin anew by --force.") as data:
            begun = data["pairs"], data["scales"], data["stages"]
            if difference := _difference(data.get("settings", {}), self._settings):  # earlier versions wrote none
                raise ValueError(f"it is of another fit: {difference}")
            return begun
