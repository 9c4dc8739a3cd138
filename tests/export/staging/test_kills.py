"""Commands that are killed: an old or a new result every time, and nothing beside it after the next run.

Every point of a staging, in a program that only stages (tests/support/kill_points.py), and some random moments of the
real commands (`python -m tests.kills` has more).
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
OLD, NEW = ({"marker.json": f'["marker.json", "a", "deep/er/{g}"]', "a": g, f"deep/er/{g}": g} for g in ("old", "new"))
EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


DIRECTORIES = [
    ("exchange", "old", "SIGKILL"),
    ("exchange", "old", "SIGINT"),
    ("exchange", "none", "SIGTERM"),
    ("journal", "old", "SIGKILL"),
    ("journal", "old", "SIGHUP"),
]
FILES = [("old", "SIGKILL"), ("none", "SIGTERM")]
INSIDE = ["SIGKILL", "SIGINT"]
RUNS = [
    *(("directory", *run, "force") for run in DIRECTORIES),
    ("directory", "journal", "old", "SIGKILL", "plain"),
    *(("file", "exchange", *run, "force") for run in FILES),
    *(("inside", "exchange", "old", name, "force") for name in INSIDE),
]


@functools.cache
def all_ended() -> dict[str, list[dict[str, Any]]]:
    """Of all tests here, by one program."""
    command = [sys.executable, "-m", "tests.support.kill_points", *map(",".join, RUNS)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ended(*arguments: str) -> list[dict[str, Any]]:
    results = all_ended()[",".join(arguments)]
    assert len(results) > (30 if arguments[0] == "directory" else 10)
    assert results[-1]["status"] == 0  # ran to its end
    return results


@pytest.mark.parametrize(("how", "old", "name"), DIRECTORIES)
def test_a_directory_at_every_point(how: str, old: str, name: str) -> None:
    """With two directories exchanged in one step, and where the system cannot."""
    before = OLD if old == "old" else None
    seen = []
    for result in ended("directory", how, old, name, "force"):
        first = result["first"]
        seen.append(first["at_place"])
        if how == "journal" and before and name == "SIGKILL" and first["at_place"] is None:
            assert first["beside"]  # between the two renames; `test_…_is_put_back` sees it again
        else:
            assert first["at_place"] in (before, NEW), result["point"]
        if name != "SIGKILL" and result["status"]:
            assert result["status"] == EXIT_CODES[name] << 8
        assert result["next_status"] == 0
        assert result["after"] == {"at_place": NEW, "beside": []}
    assert before in seen
    assert NEW in seen


def test_a_directory_that_was_on_its_way_out_is_put_back() -> None:
    """By a next run that is refused, too."""
    between = 0
    for result in ended("directory", "journal", "old", "SIGKILL", "plain"):
        found = result["first"]["at_place"]
        between += found is None
        assert result["next_status"] == 2 << 8  # exists already
        assert result["after"] == {"at_place": OLD if found is None else found, "beside": []}
    assert between


@pytest.mark.parametrize(("old", "name"), FILES)
def test_a_file_at_every_point(old: str, name: str) -> None:
    before = "old" if old == "old" else None
    for result in ended("file", "exchange", old, name, "force"):
        assert result["first"]["at_place"] in (before, "new")
        assert result["after"] == {"at_place": "new", "beside": []}


@pytest.mark.parametrize("name", INSIDE)
def test_a_file_of_a_directory_at_every_point(name: str) -> None:
    """Never anything foreign in the directory; what is left beside it the next run removes."""
    changed = OLD | {"a": "new"}
    seen = []
    for result in ended("inside", "exchange", "old", name, "force"):
        seen.append(result["first"]["at_place"])
        assert seen[-1] in (OLD, changed), result["point"]
        if name != "SIGKILL" and result["status"]:
            assert result["status"] == EXIT_CODES[name] << 8
        assert result["next_status"] == 0
        assert result["after"] == {"at_place": changed, "beside": []}
    assert OLD in seen
    assert changed in seen


def test_commands_at_random_moments() -> None:
    """In a process of its own, which forks: one that has run other tests has threads."""
    command = [sys.executable, "-m", "tests.kills", "--count", "2", "--seed", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("\n2 kills, 0 failures\n")
