"""`fit` and `profile` refuse what will not fit the model before they read its weights, sessions before an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_tools.cli import main
from lora_drop_tools.eval.eval import eval
from lora_drop_tools.eval.settings import EvalSettings

from tests.support.bundles import family, make_bundle
from tests.support.fake_trt import make_device_bundle
from tests.support.models import gemma4
from tests.support.profiles import add_tokenizer, saved


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("one two three four five six " * 200)
    return tmp_path / "text.txt"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The tiny Llama with a tokenizer."""
    source = family("llama").directory
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).symlink_to(source / name)
    add_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_bundle("llama", tmp_path_factory.mktemp("weights") / "bundle").root
    add_tokenizer(root / "tokenizer")
    return root


def fail(*_: Any, **__: Any) -> None:
    pytest.fail("the work began before the refusal")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fit --drop-layers 3,9", ("does not have", "Layer 9", "0 to 7")),
        ("fit --drop-layers 0", ("always kept", "Layer 0")),
        ("fit --drop-ratio 0", ("No layer is dropped",)),
        ("fit --always-first 7", ("No layer is dropped",)),
        ("fit --rank 65", ("--rank is too large", "It is 65; the largest possible is 64, the model's hidden size")),
        ("fit --drop-list LIST", ("another model",)),
        ("fit --window 512", ("context", "512", "256")),
        ("fit --window 256", ("text is too short",)),
        ("fit --device cuda:7", ("device", "cuda:7")),
        ("fit --device meta", ("device", "meta", "holds no values")),
        ("profile --always-first 7", ("No layer of the model may be dropped", "first 7")),
        ("profile --window 512 --tokens 512 --sensitivity-tokens 512", ("context", "512", "256")),
        ("profile --tokens 999999", ("text is too short",)),
        ("profile --device nowhere", ("device", "nowhere")),
    ],
)
def test_of_a_model(
    line: str, words: tuple[str, ...], model: Path, text: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("lora_drop_export.decoder.loaded.resolve_tensors", fail)
    (tmp_path / "list.json").write_text(json.dumps({"drop_layers": [4], "fingerprint": "beef" * 16}))
    command, *more = line.replace("LIST", str(tmp_path / "list.json")).split()
    sizes = ["--window", "32"] + (["--tokens", "64", "--sensitivity-tokens", "32"] if command == "profile" else [])
    before = sorted(tmp_path.rglob("*"))
    assert main([command, str(model), "--text", str(text), "--out", str(tmp_path / "out"), *sizes, *more]) == 2
    error = capsys.readouterr().err
    for word in (*words, "\nNote: ", "\nHint: "):
        assert word in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("more", "hint"),
    [
        ((), "Use --policy backfill, or --sites halves for their MLPs."),
        (("--objective", "kv"), "Use --policy backfill without --objective kv"),
        (("--objective", "kv", "--sites", "halves"), "Use --policy backfill without --objective kv"),
    ],
)
def test_windows_in_all_layers(
    more: tuple[str, ...], hint: str, model: Path, text: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("lora_drop_export.decoder.loaded.resolve_tensors", fail)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").unlink()
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
    (model / "config.json").write_text(json.dumps(config))
    line = ["profile", str(model), "--text", str(text), "--out", str(tmp_path / "out"), "--policy", "skip", *more]
    assert main(line) == 2
    assert f"\nHint: {hint}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "profile"])
def test_layers_that_take_the_k_and_v_of_others(
    command: str, text: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Whatever else is wrong: without --policy backfill none of their layers could be dropped."""
    monkeypatch.setattr("lora_drop_export.decoder.loaded.resolve_tensors", fail)
    model = saved(gemma4(), tmp_path / "model")
    assert main([command, str(model), "--text", str(text), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    for word in ("cannot be run one by one", "\nNote: Some of them take the K and V of other layers", "\nHint: "):
        assert word in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["fit", "profile"])
@pytest.mark.parametrize("last", [130, 131])
def test_tokens_that_the_model_does_not_have(
    command: str, last: int, model: Path, text: Path, monkeypatch: Any, capsys: Any
) -> None:
    """A tokenizer may have more than the embedding. The last one that the model has is fine."""
    monkeypatch.setattr("lora_drop_export.decoder.loaded.resolve_tensors", fail)
    described = json.loads((model / "tokenizer.json").read_text())
    described["model"]["vocab"]["w131"] = 131
    (model / "tokenizer.json").write_text(json.dumps(described))
    text.write_text(f"w1 w2 w{last} " * 500, encoding="utf-8")
    sizes = ["--window", "32"] + (["--tokens", "64", "--sensitivity-tokens", "32"] if command == "profile" else [])
    line = [command, str(model), "--text", str(text), "--out", str(text.with_name("out")), *sizes]
    if last == 130:
        with pytest.raises(pytest.fail.Exception, match="the work began"):
            main(line)
        return
    assert main(line) == 2
    error = capsys.readouterr().err
    for word in ("a token that the model does not know", "\nNote: It is 131, the model has 0 to 130.", "\nHint: "):
        assert word in error
    assert not text.with_name("out").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("generate BUNDLE", ("There is no prompt",)),
        ("generate BUNDLE --prompt one --max-new-tokens 999", ("longer than the bundle allows", "999")),
        ("generate BUNDLE --prompt one --provider cuda", ("provider", "cuda")),
        ("generate BUNDLE --prompt one --provider=", ("--provider is empty",)),
        ("generate BUNDLE --prompt one --target tensorrt", ("cannot run on that target", "with --target tensorrt.")),
        ("chat BUNDLE --provider cuda", ("provider", "cuda")),
        ("chat BUNDLE --target metal", ("cannot run on that target", "metal", "; use --target ort.")),
        ("compare BUNDLE --provider cuda", ("provider", "cuda")),
        ("bench BUNDLE --provider rtx --k 1 --new-tokens 8", ("provider", "rtx")),
        ("bench BUNDLE --new-tokens 999 --k 1", ("does not allow", "--max-seq-len")),
        ("eval BUNDLE --text TEXT --window 32 --prompt 8 --provider cuda", ("provider", "cuda")),
    ],
)
def test_of_a_bundle(
    line: str, words: tuple[str, ...], bundle: Path, text: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("lora_drop_runtime.decoding.opening.open_engine", fail)
    monkeypatch.setattr("lora_drop_export.check.verify.reference_of", fail)
    monkeypatch.setattr("lora_drop_tools.shared.machine.read_bandwidth", fail)
    given = line.replace("BUNDLE", str(bundle)).replace("TEXT", str(text))
    assert main(given.split(" ")) == 2
    error = capsys.readouterr().err
    for word in (*words, "\nNote: ", "\nHint: "):
        assert word in error


def test_threads_of_engines_that_run_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_device_bundle("llama", tmp_path / "bundle")
    assert main(["generate", str(bundle.root), "--prompt", "t1", "--threads", "2", "--target", "tensorrt-rtx"]) == 2
    error = capsys.readouterr().err
    assert "--threads would change nothing." in error
    assert "It is 2, and the engines of tensorrt-rtx run on the GPU." in error


def test_eval_takes_each_bundles_own_policy(text: Path, tmp_path: Path) -> None:
    bundles = []
    for policy in ("skip", "backfill"):
        bundles.append(make_bundle("llama", tmp_path / policy, policy=policy).root)
        add_tokenizer(bundles[-1] / "tokenizer")
    result = eval(bundles, EvalSettings(text=text, window=16, prompt=4, windows=1, k=(1,)))
    assert [(row.bundle, row.policy) for row in result.rows if row.k] == [("skip", "skip"), ("backfill", "backfill")]
    assert [Bundle.open(root).manifest.plan.policy for root in bundles] == ["skip", "backfill"]
