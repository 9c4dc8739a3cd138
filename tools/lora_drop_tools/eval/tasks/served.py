"""A server as a model of lm-eval: lm-eval's `local-completions`, and where the context of each prompt ends.

Enters: lm-eval's requests, a server of `lora-drop serve`. Leaves: what the server says. OpenAI's API has no field for
what of a prompt is context. `ServedLM` sends it, so that continuations are scored under the server's schedule, each as
lora-drop's own model scores it (model.py). Imported where `lora-drop lm-eval` runs, as that module.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import lm_eval.models  # noqa: F401 as in model.py
from lm_eval.api.registry import register_model
from lm_eval.models.api_models import TemplateAPI
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lora_drop_runtime.errors import InputError, first_line

from lora_drop_tools.eval.scoring import phase_of, prompt_length

MODEL_NAME = "lora-drop-server"
_EXAMPLE = "--model_args k=3,model=NAME,base_url=http://127.0.0.1:8000/v1/completions,tokenizer=CHECKPOINT"
_ANSWER_SECONDS = 300  # of the first request, which may wait for others
# Which lm-eval gives to every model
_OF_EVERY_MODEL = ("batch_size", "max_batch_size", "device")


class _Prompt(list[int]):
    """Token ids of a context and its continuation.

    Attributes:
        context_tokens: how many the server's prefill has.
    """

    context_tokens: int


def _check_arguments(k: Any, options: dict[str, Any]) -> None:
    """lm-eval's own class takes any argument, and its `k` would be the server's."""
    known = {*inspect.signature(LocalCompletionsAPI.__init__).parameters}
    known |= {*inspect.signature(TemplateAPI.__init__).parameters, *_OF_EVERY_MODEL}
    unknown = sorted(options.keys() - (known - {"self", "kwargs"}))
    missing = [name for name in ("model", "base_url", "tokenizer") if options.get(name) is None]
    if unknown or missing:
        raise InputError(
            "The model has an argument that is not known." if unknown else "The model lacks an argument.",
            note=f"Given is {', '.join(unknown)}." if unknown else f"Not given is {', '.join(missing)}.",
            hint=f"Use for example {_EXAMPLE}; also known are policy, lenience, seed and those of lm-eval's "
            "local-completions.",
        )
    if type(k) is not int or k < 0:
        raise InputError(
            "The model's argument k is no whole number from 0 on.",
            note=f"It is {k!r}." if k is not None else "It was not given.",
            hint=f"Use for example {_EXAMPLE}.",
        )


@register_model(MODEL_NAME)
class ServedLM(LocalCompletionsAPI):  # type: ignore[misc] # lm-eval is left untyped
    """lm-eval's model `lora-drop-server`; the arguments are those of its `local-completions`, and:

    Args:
        k: LoRA steps between refreshes; it has to be given, since places in the cycle are drawn by it.
        policy, lenience: the server's when None.
        seed: of the places in the cycle, as for the model `lora-drop`.

    Raises:
        InputError: an argument is not known, missing or wrong; the server does not answer, or refuses a request.
    """

    def __init__(
        self,
        k: int | None = None,
        policy: str | None = None,
        lenience: float | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        _check_arguments(k, options)
        try:
            super().__init__(seed=seed, **options)
        except ModuleNotFoundError as error:
            raise InputError(
                "What lm-eval asks servers with is not installed.",
                note=f"{first_line(error):.300}",
                hint="pip install 'lm-eval[api]'",
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(
                "The tokenizer cannot be opened.",
                note=f"tokenizer is {options['tokenizer']!r}: {first_line(error):.300}",
                hint="Give the checkpoint's directory, or a folder with its tokenizer's files.",
            ) from None
        given = {"k": k, "policy": policy, "lenience": lenience}
        self._fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self._items: dict[tuple[str, str], Any] = {}  # who asks, by the texts that lm-eval keeps beside the tokens
        self._ask_once()

    def _ask_once(self) -> None:
        """What would be refused for every item is refused here, with the server's own words."""
        import requests

        prompt = _Prompt([0, 0])
        prompt.context_tokens = 1
        try:
            answer = requests.post(
                self.base_url,
                json=self._create_payload([prompt]),
                headers=self.header,
                verify=self.verify_certificate,
                timeout=_ANSWER_SECONDS,
            )
        except requests.RequestException as error:
            raise InputError(
                "The server does not answer.",
                note=f"base_url is {self.base_url!r}: {first_line(error):.300}",
                hint=f"Start it with lora-drop serve, and use for example {_EXAMPLE}.",
            ) from None
        if not answer.ok:
            raise InputError(
                "The server refuses a request of this model.",
                note=f"{self.base_url} answers {answer.status_code}: {answer.text:.400}",
                hint=f"Use for example {_EXAMPLE}.",
            )

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
