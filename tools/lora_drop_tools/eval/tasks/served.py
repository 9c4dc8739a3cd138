"""A server as a model of lm-eval: lm-eval's `local-completions`, and where the context of each prompt ends.

Enters: lm-eval's requests, a server of `lora-drop serve`. Leaves: what the server says. OpenAI's API has no field for
what of a prompt is context. `ServedLM` sends it, so that continuations are scored under the server's schedule, each as
lora-drop's own model scores it (model.py). Imported where `lora-drop lm-eval` runs, as that module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import lm_eval.models  # noqa: F401 as in model.py
from lm_eval.api.registry import register_model
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lora_drop_runtime.errors import InputError

from lora_drop_tools.eval.scoring import phase_of, prompt_length

MODEL_NAME = "lora-drop-server"


class _Prompt(list[int]):
    """Token ids of a context and its continuation.

    Attributes:
        context_tokens: how many the server's prefill has.
    """

    context_tokens: int


@register_model(MODEL_NAME)
class ServedLM(LocalCompletionsAPI):  # type: ignore[misc] # lm-eval is left untyped
    """lm-eval's model `lora-drop-server`; the arguments are those of its `local-completions`, and:

    Args:
        k: LoRA steps between refreshes; it has to be given, since places in the cycle are drawn by it.
        policy: the server's when None.
        seed: of the places in the cycle, as for the model `lora-drop`.

    Raises:
        InputError: k is no whole number from 0 on.
    """

    def __init__(self, k: int | None = None, policy: str | None = None, seed: int = 0, **options: Any) -> None:
        if type(k) is not int or k < 0:
            raise InputError(
                "The model has no k.",
                note=f"k is {k!r}; needed is a whole number from 0 on.",
                hint="Use for example --model_args base_url=http://127.0.0.1:8000/v1/completions,model=NAME,k=3.",
            )
        super().__init__(seed=seed, **options)
        self._fields: dict[str, Any] = {"k": k} if policy is None else {"k": k, "policy": policy}
        self._items: dict[tuple[str, str], Any] = {}  # who asks, by the texts that lm-eval keeps beside the tokens

    def loglikelihood(self, requests: Sequence[Any], *options: Any, **more: Any) -> list[tuple[float, bool]]:
        """Sum of the log-probabilities of each continuation, and whether it is the greedy one."""
        self._items = {tuple(request.args): request for request in requests}
        found: list[tuple[float, bool]] = super().loglikelihood(requests, *options, **more)
        return found

    def batch_loglikelihood_requests(self, chunks: Iterable[list[Any]]) -> tuple[list[Any], list[int], list[Any]]:
        """As there; each prompt knows where its prefill ends."""
        inputs, lengths, keys = super().batch_loglikelihood_requests(chunks)
        prompts = []
        for ids, length, texts in zip(inputs, lengths, keys, strict=True):
            request = self._items.get(texts) if texts is not None else None
            task, item = (str(request.task_name), int(request.doc_id)) if request is not None else ("", 0)
            prompt = _Prompt(ids)
            prompt.context_tokens = prompt_length(length, phase_of(self._seed, task, item), self._fields["k"])
            prompts.append(prompt)
        return prompts, lengths, keys

    def _create_payload(self, messages: Any, generate: bool = False, **options: Any) -> dict[str, Any]:
        payload: dict[str, Any] = super()._create_payload(messages, generate=generate, **options) | self._fields
        if not generate:
            payload["context_tokens"] = [prompt.context_tokens for prompt in messages]
        return payload
