"""A fit that was interrupted, and how it is taken up again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.errors import BundleError, InputError

if TYPE_CHECKING:
    from lora_drop_tools.teacher_forcing.surrogates import Surrogates

    from .distill import Workers


def _difference(found: str, wanted: str) -> str:
    before, now = json.loads(found), json.loads(wanted)
    return ", ".join(f"{name} {before.get(name)!r}" for name in now if before.get(name) != now[name])


class Partial:
    """The directory beside `out` that an interrupted fit leaves; all processes read it, the first one changes it."""

    def __init__(self, out: Path, settings: Mapping[str, Any], resume: bool, force: bool, workers: Workers) -> None:
        self.root = out.with_name(f"{out.name}.partial")
        self.state, self.begin = self.root / "state.pt", self.root / "begin.pt"
        self._described = self.root / "settings.json"
        self._text = json.dumps(settings, indent=1)
        self._writes = workers.rank == 0
        if resume:
            found = self._described.read_text() if self._described.is_file() else None
            if found != self._text:
                differs = "there is none" if found is None else f"it was begun with {_difference(found, self._text)}"
                raise InputError(
                    "There is no such fit to resume.",
                    note=f"{self.root}: {differs}.",
                    hint="Give the same options as before, or leave --resume out.",
                )
            return
        if self.root.exists() and not force and self._writes:
            raise InputError(
                "An unfinished fit is there.",
                note=f"{self.root} is not touched.",
                hint="Go on with it by --resume, or begin anew by --force.",
            )

    def save(self, pairs: Surrogates, scales: Mapping[str, Any], stages: Mapping[str, Any]) -> None:
        """Keep what distillation begins with."""
        import torch

        if not self._writes:
            return
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        torch.save({"pairs": dict(pairs), "scales": dict(scales), "stages": dict(stages)}, self.begin)
        self._described.write_text(self._text)  # last: without it there is nothing to resume

    def remove(self) -> None:
        """Forget it: the adapters are where they belong."""
        if self._writes:
            shutil.rmtree(self.root, ignore_errors=True)


def load_begin(path: Path) -> tuple[Surrogates, dict[str, Any], dict[str, dict[str, float]]]:
    """What distillation began with: adapters, scales of the features, figures of the stages before."""
    import torch

    try:
        data = torch.load(path, weights_only=True)
        return data["pairs"], data["scales"], data["stages"]
    except (RuntimeError, KeyError, EOFError, OSError) as error:
        raise BundleError(
            "The unfinished fit cannot be read.", note=f"{path}: {error}.", hint="Begin anew by --force."
        ) from None
