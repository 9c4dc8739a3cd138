"""lm-eval's model `lora-drop-server`: item by item what the model `lora-drop` says of the same bundle."""

from __future__ import annotations

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


@pytest.mark.parametrize("concurrent", [1, 3])
@pytest.mark.parametrize(("k", "policy"), [(2, "skip"), (3, "backfill"), (0, None)])
def test_item_by_item(bundle: Path, tmp_path: Path, k: int, policy: str | None, concurrent: int) -> None:
    from lora_drop_tools.eval.tasks.model import LoraDropLM
    from lora_drop_tools.eval.tasks.served import ServedLM

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(bundle / "tokenizer/tokenizer.json"))
    tokenizer.add_special_tokens({"eos_token": "\n"})
    tokenizer.save_pretrained(tmp_path)
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
            tokenizer=str(tmp_path),
            num_concurrent=concurrent,
        )
        found = model.loglikelihood(requests())
    for (ours, greedy), (theirs, best) in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert greedy == best
    assert len({round(one, 3) for one, _ in found}) > 20


def test_k_has_to_be_given() -> None:
    from lora_drop_tools.eval.tasks.served import ServedLM

    for wrong in (None, -1, "3", True):
        with pytest.raises(InputError, match="has no k"):
            ServedLM(k=wrong, model="m", base_url="http://127.0.0.1:1/v1/completions")
