"""What is refused before a cluster is asked. tests/serve/test_ray.py has a real one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.errors import InputError
from lora_drop_tools import EvalSettings
from lora_drop_tools.eval.spread import Spread, connected


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(InputError, match=r"--ray is auto.\nHint: pip install 'lora-drop-export\[ray\]'"),
        connected("auto"),
    ):
        pass


@pytest.mark.parametrize("options", [{"text": "t", "calibrate": 0.9}, {"paper": "fig3"}], ids=str)
def test_where_nothing_is_spread_a_cluster_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="--ray would change nothing"):
        EvalSettings(ray="auto", **options)  # type: ignore[arg-type]


def test_the_next_workers_have_the_room_of_those_that_were_killed(bundle: Path) -> None:
    """A cluster says late that it is free; the second bundle found no room, or room for fewer workers."""
    ray, taken, late = mock.MagicMock(), list[Any](), [2, 2, 1]  # CPUs that it still takes for used, one question each
    ray.nodes.return_value = [{"Alive": True, "Resources": {"CPU": 2}}]

    def worker() -> mock.MagicMock:
        taken.append(mock.MagicMock())
        return taken[-1]  # type: ignore[no-any-return]

    ray.remote.return_value.options.return_value.remote = worker
    ray.kill = taken.remove
    ray.available_resources = lambda: {"CPU": 2 - (late.pop() if late and ray.killed else len(taken))}
    ray.killed = False
    with mock.patch.dict(sys.modules, {"ray": ray}):
        settings = EvalSettings(text=Path("t"), ray="auto", threads=1)
        with Spread(Bundle.open(bundle), "skip", settings):
            assert len(taken) == 2
            ray.killed = True
        with Spread(Bundle.open(bundle), "skip", settings):
            assert len(taken) == 2
