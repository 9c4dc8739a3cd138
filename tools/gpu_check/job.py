"""What a stage is given, and how it says what it found.

Enters: the stage's folder and settings. Leaves: a JSON file that is whole at every moment, so that a stage which is
killed leaves what it measured. Knows no stage.
"""

from __future__ import annotations

import json
import os
import time
import unittest
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# State of a stage that passed over stand-ins; it never becomes `pass`
STAND_IN = "stand-in"
PART_S = 45.0  # that a part which builds engines, or times a large model, needs at least


class Skip(Exception):
    """What the stage needs is not here; the text names it."""


class Failed(Exception):
    """The stage ran, and something is wrong."""


OURS = ("gpu_check", "plugins", "tests", "lora_drop_export", "lora_drop_runtime", "lora_drop_tools")


def what_lacks(error: Exception) -> str | None:
    """What is not here, where that is what an error says: a skip, a compiler's too, or a package of others that is not
    installed."""
    if isinstance(error, Skip | unittest.SkipTest):
        return str(error)
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return f"{package} is not installed" if package and package not in OURS else None


@dataclass(frozen=True)
class Stage:
    """A stage: its name, the module whose `run(job)` it is, and the most seconds that it may take.

    Attributes:
        stand_in: what it runs on where there is no GPU.
    """

    name: str
    module: str
    limit_s: float
    stand_in: str


def write_json(path: Path, data: Any) -> None:
    """In one step: whoever reads meanwhile finds the text before."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _is_skip(found: Any) -> bool:
    return isinstance(found, str) and found.startswith("skip: ")


@dataclass
class Job:
    """One run of a stage.

    Attributes:
        work: a folder that all stages share; what `build` makes lies there.
        report: the file with everything found so far.
        stand_in: run over stand-ins, with small sizes.
        states: of the stages before this one.
        deadline: of the clock `time.monotonic`, when this stage is killed.
        numbers: what was found; plain JSON values.
    """

    work: Path
    report: Path
    stand_in: bool
    states: dict[str, str]
    deadline: float
    numbers: dict[str, Any] = field(default_factory=dict)
    progress: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """A line for who waits; writes down what was found so far."""
        self.progress.append(text)
        self.save()

    def save(self, **result: str) -> None:
        write_json(self.report, {"numbers": self.numbers, "progress": self.progress, **result})

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def attempt(self, name: str, check: Callable[[], Any]) -> Any:
        """Run a part; what it returns becomes a number, its error a problem, and other parts run all the same.

        What a part lacks is written in its place.
        """
        try:
            found = check()
        except Exception as error:  # any: the next part is to run
            lacks = what_lacks(error)
            found = f"skip: {lacks}" if lacks else f"fail: {first_line(error)}"
            if not lacks:
                self.problems.append(f"{name}: {first_line(error)}")
        self.numbers[name] = found
        self.say(f"{name}: {brief(found)}")
        return found

    def part(self, name: str, check: Callable[[], Any]) -> Any:
        """As `attempt`, where there is time left for it; else a skip."""
        if self.seconds_left >= PART_S:
            return self.attempt(name, check)
        self.numbers[name] = f"skip: {self.seconds_left:.0f} s are left"
        self.say(f"{name}: {self.numbers[name]}")
        return None

    def settle(self) -> None:
        """Raises Failed with all problems of the parts, or Skip where not one of them could run."""
        if self.problems:
            raise Failed("; ".join(self.problems))
        if self.numbers and all(_is_skip(found) for found in self.numbers.values()):
            raise self.skipped()

    def skipped(self) -> Skip:
        """With the reasons of all parts that were skipped."""
        reasons = (found.removeprefix("skip: ") for found in self.numbers.values() if _is_skip(found))
        return Skip("; ".join(dict.fromkeys(reasons)))


def first_line(error: BaseException) -> str:
    """The type of an error and what it says, on one line; also the note of this project's own."""
    said = [line for line in str(error).splitlines() if line.strip()][:6]
    return f"{type(error).__name__}: {' '.join(' '.join(said).split())[:600]}" if said else type(error).__name__


def brief(found: Any) -> str:
    """A value for a line of progress."""
    text = found if isinstance(found, str) else json.dumps(found)
    return text if len(text) <= 100 else text[:99] + "…"


def runtime_path(sites: list[str]) -> str:
    """PYTHONPATH of a stage: wheels that were given, the checkout, what was there."""
    before = os.environ.get("PYTHONPATH")
    here = [str(ROOT / "tools"), str(ROOT / "runtime"), str(ROOT)]
    return os.pathsep.join([*sites, *here, *([before] if before else [])])
