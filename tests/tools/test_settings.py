"""Options that would change nothing are refused, each with what takes its effect; so are lists with holes or twins."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from lora_drop_runtime.command_line import add_options
from lora_drop_runtime.decoding.sampling import SamplingOptions
from lora_drop_runtime.errors import InputError
from lora_drop_tools.bench.bench import _check_alike
from lora_drop_tools.bench.peers.options import peer_options
from lora_drop_tools.bench.settings import BenchSettings
from lora_drop_tools.cli import main
from lora_drop_tools.compare import CompareSettings
from lora_drop_tools.eval.settings import EvalSettings
from lora_drop_tools.fit.settings import FitSettings
from lora_drop_tools.generate import ChatSettings, GenerateSettings

from tests.support.bundles import make_bundle

FILE = Path("text.txt")
FIT: dict[str, Any] = {"text": (FILE,), "out": Path("out")}


@pytest.mark.parametrize(
    ("cls", "given", "flag", "because"),
    [
        (GenerateSettings, {"top_k": 5}, "--top-k", "--temperature is 0"),
        (GenerateSettings, {"top_p": 0.5}, "--top-p", "--temperature is 0"),
        (GenerateSettings, {"min_p": 0.1}, "--min-p", "--temperature is 0"),
        (GenerateSettings, {"seed": 0}, "--seed", "--temperature is 0"),
        (GenerateSettings, {"policy": "skip", "k": 0}, "--policy", "every step is a refresh"),
        (GenerateSettings, {"draft": "ngram", "k": 0}, "--draft", "every step is a refresh"),
        (ChatSettings, {"draft": "ngram", "policy": "skip"}, "--draft", "--policy skip verifies no drafts"),
        (BenchSettings, {"draft": "both", "policy": "backfill"}, "--draft", "--policy backfill verifies no drafts"),
        (CompareSettings, {"policy": "backfill", "k": 0}, "--policy", "every step is a refresh"),
        (BenchSettings, {"model": (FILE,)}, "--model", "--peers was not given"),
        (BenchSettings, {"peer_cache": FILE}, "--peer-cache", "--peers was not given"),
        (BenchSettings, {"peer_python": ("llama.cpp=python",)}, "--peer-python", "--peers was not given"),
        (BenchSettings, {"policy": "skip", "k": (0,)}, "--policy", "every step is a refresh"),
        (BenchSettings, {"schedules": ("margin",), "k": (7,)}, "--k", "--schedule is margin"),
        (EvalSettings, {"text": FILE, "schedules": ("entropy",), "k": (7,)}, "--k", "--schedule is entropy"),
        (EvalSettings, {"text": FILE, "k": (0,), "plots": FILE}, "--plots", "every step is a refresh"),
        (EvalSettings, {"tasks": ("piqa",), "window": 64}, "--window", "--text was not given"),
        (EvalSettings, {"tasks": ("piqa",), "prompt": 9}, "--prompt", "--text was not given"),
        (EvalSettings, {"tasks": ("piqa",), "windows": 9}, "--windows", "--text was not given"),
        (EvalSettings, {"text": FILE, "include_path": (FILE,)}, "--include-path", "--tasks was not given"),
        (EvalSettings, {"text": FILE, "num_fewshot": 0}, "--num-fewshot", "--tasks was not given"),
        (EvalSettings, {"text": FILE, "unsafe_code": True}, "--unsafe-code", "--tasks was not given"),
        (EvalSettings, {"text": FILE, "limit": 7}, "--limit", "--tasks was not given"),
        (EvalSettings, {"text": FILE, "k": (0,), "policies": ("skip",)}, "--policy", "every step is a refresh"),
        (FitSettings, {**FIT, "steps": 0, "learning_rate": 0.5}, "--learning-rate", "--steps is 0"),
        (FitSettings, {**FIT, "steps": 0, "accumulate": 2}, "--accumulate", "--steps is 0"),
        (FitSettings, {**FIT, "steps": 0, "resume": True}, "--resume", "--steps is 0"),
    ],
)
def test_options_that_would_change_nothing(cls: type, given: dict[str, Any], flag: str, because: str) -> None:
    with pytest.raises(InputError) as refused:
        cls(**given)
    assert refused.value.fact == f"{flag} would change nothing."
    assert because in refused.value.note
    assert refused.value.hint.startswith("Leave it out, or ")


def test_options_that_change_something_are_taken() -> None:
    GenerateSettings(temperature=0.5, top_k=5, top_p=0.5, min_p=0.1, seed=0)
    GenerateSettings(repetition_penalty=1.1, presence_penalty=1, frequency_penalty=-2)
    GenerateSettings(policy="skip", k=1)
    GenerateSettings(policy="lossless", k="auto", draft="both")
    assert BenchSettings(policy="lossless", k=("auto", 1), draft="ngram").windows == [0, 1, "auto"]
    BenchSettings(peers=(), model=(FILE,), batches=(1, 4))
    EvalSettings(text=FILE, window=64, windows=9)
    EvalSettings(tasks=("piqa",), include_path=(FILE,), limit=7, num_fewshot=5, unsafe_code=True)
    FitSettings(**FIT, steps=1, learning_rate=0.5, resume=True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("generate b --k automatic", ("--k", "'automatic'")),
        ("bench b --k auto,,3", ("'auto,,3' is not a list",)),
        ("bench b --k auto,auto --policy lossless", ("--k names a value twice", "auto, auto")),
        ("bench b --k 1,,3", ("--k", "'1,,3' is not a list")),
        ("bench b --k 1,3,1", ("--k names a value twice", "1, 3, 1")),
        ("bench b --contexts 8,8", ("--contexts names a value twice", "8")),
        ("bench b --batches 2 --peers", ("peers would not be measured", "--batches is 2")),
        ("bench b --peers a,,b", ("--peers", "'a,,b' is not a list")),
        ("eval b --text t --policy skip,skip", ("--policy names a value twice",)),
        ("eval b --text t --policy skip,", ("--policy", "'skip,' is not a list")),
        ("fit m --text t --text t --out o", ("--text names a value twice", "t, t")),
        ("fit m --text t --out o --drop-layers 3,,5", ("no layer and no half", "''")),
        ("fit m --text t --out o --drop-layers 3,3", ("--drop-layers names a value twice", "3, 3")),
        ("fit m --text t --out o --k 0", ("--k is too small", "It is 0")),
        ("profile m --text t --out o --rankings temporal,temporal", ("--rankings names a value twice",)),
        ("generate b --prompt-file - --prompt-file -", ("Standard input is given twice",)),
        ("generate b --stop=", ("--stop is empty",)),
        ("chat b --chat-template-kwargs {x", ("--chat-template-kwargs is no JSON", "{x")),
        ("chat b --chat-template-kwargs 3", ("variables has the wrong type", "dictionary")),
        ('chat b --chat-template-kwargs {"tools":3}', ("has a value already", "tools")),
        ("generate b --prompt-file=", ("--prompt-file", "'' is not a path")),
        ("compare b --threads 0", ("--threads is too small", "It is 0")),
        ("compare b --theads 3", ("Unrecognized arguments: --theads 3", "See lora-drop compare --help")),
        ("inspect b another", ("Unrecognized arguments: another", "See lora-drop inspect --help")),
        ("--theads inspect b", ("Unrecognized arguments: --theads", "See lora-drop --help")),
        ("generate b --temperature -1e-3", ("--temperature is too small", "It is -0.001")),
        ("generate b --temperature -inf", ("--temperature is too small", "It is -inf")),
        ("eval b --text t --k -1,3", ("--k is too small", "It is -1")),
    ],
)
def test_lists_and_names(line: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split(" ")) == 2
    error = capsys.readouterr().err
    for word in (*words, "Note: ", "Hint: "):
        assert word in error


def test_the_home_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which shells put in where a word begins with ~, and not behind the = of an option."""
    monkeypatch.setenv("HOME", str(tmp_path))
    options = argparse.ArgumentParser()
    add_options(options, FitSettings)
    given = options.parse_args(["--text", "~/a", "--text=./~", "--out=~/engines"])
    assert given.text == [tmp_path / "a", Path("~")]
    assert given.out == tmp_path / "engines"


def test_sampling_is_what_the_options_say() -> None:
    given = {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": -0.5,
        "frequency_penalty": 1.5,
        "seed": 3,
    }
    for cls in (GenerateSettings, ChatSettings):
        assert cls(**given).sampling == SamplingOptions(**given)


def test_pythons_of_peers_that_would_not_be_used(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "python").touch(mode=0o755)
    python = f"llama.cpp={tmp_path}/python"
    assert peer_options(("llama.cpp",), [tmp_path], None, [python]).pythons == {"llama.cpp": f"{tmp_path}/python"}
    for names, pythons, word in (
        (("transformers",), [python], "--peers names transformers"),
        ((), [python, python], "another one is given for it"),
    ):
        with pytest.raises(InputError, match="would not be used") as refused:
            peer_options(names, [tmp_path], None, pythons)
        assert word in refused.value.note


def test_bundles_of_different_policies_are_not_benched_under_the_first_one(tmp_path: Path) -> None:
    bundles = {name: make_bundle("llama", tmp_path / name, policy=name) for name in ("skip", "backfill")}
    with pytest.raises(InputError, match="different policies") as refused:
        _check_alike(bundles, BenchSettings())
    assert refused.value.note == "skip has skip, backfill has backfill."
    _check_alike(bundles, BenchSettings(policy="skip"))
    _check_alike({"skip": bundles["skip"]}, BenchSettings())


def test_bundles_of_different_targets_are_not_benched_under_the_name_of_the_first_one(tmp_path: Path) -> None:
    """Which would also hold the steps of all against the bandwidth of its machine."""
    targets = {"one": ("ort",), "other": ("openvino", "ort")}
    bundles = {name: make_bundle("llama", tmp_path / name, targets=own) for name, own in targets.items()}
    with pytest.raises(InputError, match="different targets") as refused:
        _check_alike(bundles, BenchSettings())
    assert refused.value.note == "one runs on ort, other runs on openvino."
    _check_alike(bundles, BenchSettings(target="ort"))


def test_fits_help_says_of_a_bundles_plan_what_the_bundle_brings(capsys: pytest.CaptureFixture[str]) -> None:
    """An option with a default of its own, such as --rank, counts for a bundle, too, whatever its plan says."""
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    _, _, of_plan = capsys.readouterr().out.partition("the plan (of a bundle: its own)")
    named = set(re.findall(r"^  --([a-z-]+)", of_plan.partition("\nhow:")[0], re.MULTILINE))
    own = {field.name.replace("_", "-") for field in dataclasses.fields(FitSettings) if field.default in (None, ())}
    assert {"drop-layers", "surrogate", "policy"} <= named
    assert named - {"policy"} <= own
