"""Device bundles, made once."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from lora_drop_runtime.bundle.bundle import Bundle

from tests.support.bundles import plan_of, save_adapters
from tests.support.device_steps import PLANS
from tests.support.fake_trt import make_device_bundle


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """A device bundle per name of PLANS, made once; with adapters where the plan has a rank."""

    @functools.cache
    def make(name: str, made_from: str = "llama", sharing: str = "inputs") -> Bundle:
        root = tmp_path_factory.mktemp("trt")
        options = dict(PLANS[name])
        shared = options.pop("sharing", sharing)
        if options.get("rank"):
            plan = plan_of(made_from, **options)
            options["adapters"] = save_adapters(root / "adapters", plan, 64, None, rank=options["rank"])
        return make_device_bundle(made_from, root / "bundle", k=1, sharing=shared, **options)

    return make


@pytest.fixture
def bundle(bundles: Callable[..., Bundle]) -> Bundle:
    return bundles("recurrent")


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    """The bundle, to be damaged."""
    shutil.copytree(bundle.root, tmp_path / "copy")
    return Bundle.open(tmp_path / "copy")
