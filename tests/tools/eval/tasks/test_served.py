"""lm-eval's model `lora-drop-server`: item by item what the model `lora-drop` says of the same bundle."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lora_drop_runtime import Batch
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.text import TextCodec
from transformers import PreTrainedTokenizerFast

from tests.support.serving import serving

pytest.importorskip("lm_eval", reason="lm-eval, of the extra `eval`, is not installed")
pytest.importorskip("tenacity", reason="tenacity, of the extra `api` of lm-eval, is not installed")


def requests() -> list[Any]:
    """Four continuations each of six questions of different lengths; lm-eval's kind of request."""
    questions = [f"Question {n}: " + "where is it? " * (n % 3) + "Answer:" for n in range(6)]
    return [
        SimpleNamespace(args=(question, f" {answer}"), task_name="t", doc={}, doc_id=item)
        for item, question in enumerate(questions)
        for answer in ("a city", "no", "the third of them", "b")
    ]


@pytest.fixture
def tokenizer(bundle: Path, tmp_path: Path) -> str:
    """That of the bundle as a checkpoint has it."""
    made = PreTrainedTokenizerFast(tokenizer_file=str(bundle / "tokenizer/tokenizer.json"))
    made.add_special_tokens({"eos_token": "\n"})
    made.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("k", "policy", "concurrent"), [(2, "skip", 1), (2, "skip", 3), (3, "backfill", 3), (0, None, 1)]
)
def test_item_by_item(bundle: Path, tokenizer: str, k: int, policy: str | None, concurrent: int) -> None:
    from lora_drop_tools.eval.tasks.model import LoraDropLM
    from lora_drop_tools.eval.tasks.served import ServedLM

    own = LoraDropLM(str(bundle), k=k, policy=policy, threads=1, seed=5)
    wanted = own.loglikelihood(requests())
    own.close()
    batch = Batch.open(bundle, slots=2, k=1, threads=1)
    with serving(batch, TextCodec.open(bundle / "tokenizer")) as server:
        model = ServedLM(
            k=k,
            policy=policy,
            seed=5,
            model=batch.bundle.manifest.model.name,
            base_url=f"{server.address}/v1/completions",
            tokenizer=tokenizer,
            num_concurrent=concurrent,
        )
        found = model.loglikelihood(requests())
    for (ours, greedy), (theirs, best) in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert greedy == best
    assert len({round(one, 3) for one, _ in found}) > 20


GOOD = {"k": 1, "model": "tiny", "base_url": "http://127.0.0.1:1/v1/completions", "tokenizer": "nowhere"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": None}, ("argument k", "It was not given.")),
        ({"k": -1}, ("argument k", "It is -1.")),
        ({"k": "3"}, ("argument k", "It is '3'.")),
        ({"polcy": "skip"}, ("an argument that is not known", "Given is polcy.")),
        ({"base_url": None}, ("lacks an argument", "Not given is base_url.")),
        ({"tokenizer": None}, ("lacks an argument", "Not given is tokenizer.")),
        ({}, ("The tokenizer cannot be opened.", "'nowhere'")),
    ],
)
def test_arguments_that_are_refused(changes: dict[str, Any], words: tuple[str, str]) -> None:
    from lora_drop_tools.eval.tasks.served import ServedLM

    with pytest.raises(InputError) as refused:
        ServedLM(**GOOD | changes)
    for word in words:
        assert word in str(refused.value)


def test_packages_of_lm_eval_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_drop_tools.eval.tasks.served import ServedLM

    there = importlib.util.find_spec
    monkeypatch.setattr("lm_eval.models.api_models.find_spec", lambda name: None if name == "tenacity" else there(name))
    with pytest.raises(InputError, match="is not installed") as refused:
        ServedLM(**GOOD)
    assert "'tenacity'" in str(refused.value)
    assert "lm-eval[api]" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": "fill"}, ("refuses a request", "400", "policy")),
        ({"model": "another"}, ("refuses a request", "404", "another")),
        ({"base_url": "{address}/v1"}, ("refuses a request", "404")),
        ({"base_url": "http://127.0.0.1:1/v1/completions"}, ("does not answer", "127.0.0.1")),
        ({"base_url": "nowhere"}, ("does not answer", "nowhere")),
    ],
)
def test_what_the_server_refuses_is_said_at_once(
    bundle: Path, tokenizer: str, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    from lora_drop_tools.eval.tasks.served import ServedLM

    batch = Batch.open(bundle, slots=2, k=1, threads=1)
    name = batch.bundle.manifest.model.name
    with serving(batch, TextCodec.open(bundle / "tokenizer")) as server:
        good = {"k": 1, "model": name, "base_url": f"{server.address}/v1/completions", "tokenizer": tokenizer}
        made = {key: value.format(address=server.address) for key, value in changes.items()}
        with pytest.raises(InputError) as refused:
            ServedLM(**good | made)
    for word in words:
        assert word in str(refused.value)
