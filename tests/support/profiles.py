"""Windows and models of the tests of `lora-drop profile`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.schedule import PeriodicSchedule
from lora_drop_tools.profile.scoring import Scoring
from lora_drop_tools.teacher_forcing.forcing import TeacherForcing
from lora_drop_tools.teacher_forcing.layout import Layout
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.support.bundles import record_again

WINDOW, PROMPT, K = 16, 4, 3
ELIGIBLE = ("3", "4", "5", "6")
TOLERANCE = 2e-4  # relative, of sums of float32 in another order


def without_figures() -> Any:
    """A context in which `profile` writes none: they take longer than the rest."""
    return mock.patch.object(importlib.import_module("lora_drop_tools.profile.profile"), "write_plots")


def random_windows(count: int, seed: int = 6) -> torch.Tensor:
    return torch.randint(0, 131, (count, WINDOW), generator=torch.Generator().manual_seed(seed))


def add_tokenizer(directory: Path) -> None:
    """Word `w<i>` is token i; put into a model's directory or a bundle's."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(131)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
    if (directory.parent / MANIFEST_NAME).is_file():
        record_again(directory.parent)


def saved(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    add_tokenizer(directory)
    return directory


def make_scoring(model: PreTrainedModel, policy: str, k: int = K) -> Scoring:
    layout = Layout.of(WINDOW, PROMPT, PeriodicSchedule(k))
    return Scoring(TeacherForcing(model), DropPlan(8, (), k, policy=policy), layout, POLICIES[policy])
