"""What is refused before a cluster is asked. tests/serve/test_ray.py has a real one."""

from __future__ import annotations

import importlib.util

import pytest
from lora_drop_runtime.errors import InputError
from lora_drop_tools import EvalSettings
from lora_drop_tools.eval.spread import connected


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
