"""Both commands say their version, whatever else they would ask for."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import lora_drop_tools.cli
import pytest

import lora_drop_export.cli


@pytest.mark.parametrize(
    ("main", "name"), [(lora_drop_export.cli.main, "lora-drop-export"), (lora_drop_tools.cli.main, "lora-drop")]
)
def test_version(main: Callable[[list[str]], int], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{name} {project['version']}\n"
