"""Tasks through lm-eval: its definitions and arithmetic, local data, and a model that is a session.

Enters: a session, items of a task. Leaves: each item's metrics. Imports lm-eval, so it is imported where tasks are
asked for. lm-eval's own definition of a task makes the prompts and the metrics; only where the items come from is
replaced, so nothing is fetched. Its HumanEval fetches code that runs the programs: that one is written out here.

How continuations are scored under a schedule is scoring.py's docstring; a text that is generated begins with the
prefill's token, as at deployment. The options of an item share its u. What a session answers is kept in a `Store` by
policy, k, task, item and a hash of the question.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import numpy as np
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.text import TextCodec

from lora_drop_tools.eval.scoring import Ids, Row, batches, generate_texts, phase_of, prompt_length, score
from lora_drop_tools.eval.store import Key, Store, digest
from lora_drop_tools.shared.progress import Progress

from .files import TASKS, Item
from .program import runs_to_its_end

os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's own bars; read when tqdm is first imported
MAX_NEW_TOKENS = 256  # where a task does not say, as in lm-eval
FEWSHOT_SEED = 1234  # lm-eval's
# Each definition's directory in lm-eval
_DIRECTORIES = ("arc", "lambada", "piqa", "winogrande", "hellaswag", "gsm8k")


class SessionLM(LM):  # type: ignore[misc] # lm-eval is left untyped
    """lm-eval's view of a session under one k.

    Special tokens that the tokenizer adds by itself (such as BOS) lead every context.

    Attributes:
        cut: how many questions were longer than the bundle allows and lost the beginning of their context.
    """

    def __init__(self, session: Session, codec: TextCodec, k: int, seed: int, store: Store) -> None:
        super().__init__()
        self.cut = 0
        self._session, self._codec, self._k, self._seed, self._store = session, codec, k, seed, store
        self._limits = session.bundle.manifest.limits

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Sum of the log-probabilities of each continuation, and whether it is the greedy one."""
        pairs = [self._encode_pair(*request.args) for request in requests]
        return [(log_prob, greedy) for log_prob, greedy in self._scored("loglikelihood", requests, pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of whole strings, in windows of what the bundle allows, each token once."""
        totals = []
        for request in requests:
            ids = self._codec.encode(request.args[0]).tolist()
            prefix = self._prefix()
            ids = ids[len(self._codec.encode("")) :]
            windows = get_rolling_token_windows(ids, prefix[-1], self._limits.max_prompt_len, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            answers = self._scored("rolling", [request] * len(pairs), pairs)
            totals.append(float(sum(answer[0] for answer in answers)))
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy texts, each up to a stop string or an end token."""
        keys = [self._key("generate", request, request.args) for request in requests]
        todo: dict[tuple[int, tuple[str, ...]], list[tuple[Ids, Key, bool]]] = {}
        for key, request in zip(keys, requests, strict=True):
            if key not in self._store:
                context, options = request.args
                assert not options.get("do_sample"), "no task here samples"
                new_tokens = min(options.get("max_gen_toks", MAX_NEW_TOKENS), self._limits.max_seq_len // 2)
                whole = self._codec.encode(context)
                prompt = self._fitting(whole, self._limits.max_seq_len - new_tokens)
                waiting = todo.setdefault((new_tokens, tuple(options["until"])), [])
                waiting.append((prompt, key, len(prompt) < len(whole)))
        with Progress(self._what(requests), sum(map(len, todo.values()))) as progress:
            for (new_tokens, until), waiting in todo.items():
                waiting.sort(key=lambda one: len(one[0]))
                for begin in range(0, len(waiting), self._limits.max_batch):
                    batch = waiting[begin : begin + self._limits.max_batch]
                    prompts = [prompt for prompt, _, _ in batch]
                    texts = generate_texts(self._session, self._codec, prompts, until, new_tokens, self._k)
                    for (_, key, cut), text in zip(batch, texts, strict=True):
                        self._store[key] = [text, cut]
                    progress.advance(len(batch))
        return [text for (text,) in self._kept(keys)]

    def _scored(
        self, kind: str, requests: Sequence[Any], pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[Any]:
        """[log-probability, greedy] of each pair of context and continuation, from the store or the session."""
        keys = [
            self._key(kind, request, (np.asarray(context).tolist(), np.asarray(continuation).tolist()))
            for request, (context, continuation) in zip(requests, pairs, strict=True)
        ]
        rows, waiting, cut = [], [], []
        for key, request, (context, continuation) in zip(keys, requests, pairs, strict=True):
            if key not in self._store:
                rows.append(self._row(request, np.asarray(context, np.int64), np.asarray(continuation, np.int64)))
                waiting.append(key)
                cut.append(len(rows[-1].ids) < len(context) + len(continuation))
        with Progress(self._what(requests), len(rows)) as progress:
            for batch in batches(self._session, rows):
                for index, answer in zip(
                    batch, score(self._session, [rows[index] for index in batch], self._k), strict=True
                ):
                    self._store[waiting[index]] = [answer.log_prob, answer.greedy, cut[index]]
                progress.advance(len(batch))
        return self._kept(keys)

    def _kept(self, keys: Sequence[Key]) -> list[Any]:
        """What is kept of answers, less whether their question was cut, which is counted."""
        answers = [self._store[key] for key in keys]
        self.cut += sum(cut for *_, cut in answers)
        return [answer for *answer, _ in answers]

    def _row(self, request: Any, context: Ids, continuation: Ids) -> Row:
        limits = self._limits
        room = limits.max_seq_len - len(continuation)
        if room < 1:
            raise InputError(
                "A continuation is longer than the bundle allows.",
                note=f"It has {len(continuation)} tokens, the bundle allows {limits.max_seq_len} with one of context.",
                hint="Export with a larger --max-seq-len.",
            )
        context = self._fitting(context, room)
        length = len(context)
        phase = phase_of(self._seed, str(request.task_name), self._item(request))  # of all options of an item
        prompt = prompt_length(length, phase, self._k)
        return Row(np.concatenate([context, continuation]), prompt, length - 1)

    def _fitting(self, context: Ids, room: int) -> Ids:
        """The end of a context that is too long, as lm-eval cuts it."""
        return context[-min(room, self._limits.max_prompt_len) :]

    def _encode_pair(self, context: str, continuation: str) -> tuple[Sequence[int], Sequence[int]]:
        """Tokens of both, from their text in one piece; as in lm-eval, white space between them goes to the second."""
        given = context.rstrip()
        if not given:
            whole = [
                *self._prefix(),
                *self._codec.encode(context + continuation)[len(self._codec.encode("")) :].tolist(),
            ]
            return whole[:1], whole[1:]
        whole = self._codec.encode(context + continuation).tolist()
        length = min(len(self._codec.encode(given)), len(whole) - 1)
        return whole[:length], whole[length:]

    def _prefix(self) -> list[int]:
        """What stands before a text without a context."""
        special = self._session.bundle.manifest.special_tokens
        return (self._codec.encode("").tolist() or [*special.eos[:1]] or [special.pad])[:1]

    @staticmethod
    def _item(request: Any) -> int:
        """The item's place in its file; without one, in what is evaluated."""
        return int(request.doc.get("item", request.doc_id) if isinstance(request.doc, dict) else request.doc_id)

    def _key(self, kind: str, request: Any, question: Any) -> Key:
        policy = self._session.policy if self._k else "full"
        return policy, self._k, str(request.task_name), self._item(request), kind, digest(question)

    def _what(self, requests: Sequence[Any]) -> str:
        return f"{requests[0].task_name}, k = {self._k}"


# ── tasks ──────────────────────────────────────────────────────────────────────────────────────────────────────


def pass_at_1(references: Sequence[str], predictions: Sequence[Sequence[str]], store: Store) -> float:
    """Whether a program and its test run to their end."""
    program = f"{predictions[0][0]}\n{references[0]}"
    key = ("program", digest(program))
    if key not in store:
        store[key] = runs_to_its_end(program)
    return float(store[key])


def _programs(responses: Sequence[Sequence[str]], docs: Sequence[Item]) -> list[list[str]]:
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(responses, docs, strict=True)]


def _humaneval(store: Store) -> dict[str, Any]:
    """lm-eval's definition, but for what runs the programs."""

    def pass_at_1_here(references: Sequence[str], predictions: Sequence[Sequence[str]], **_: Any) -> float:
        return pass_at_1(references, predictions, store)

    pass_at_1_here.__name__ = "pass_at_1"  # lm-eval names a metric after its function
    return {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{test}}\ncheck({{entry_point}})",
        "metric_list": [{"metric": pass_at_1_here, "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
            "max_gen_toks": 1024,
            "do_sample": False,
        },
        "repeats": 1,
        "num_fewshot": 0,
        "filter_list": [{"name": "create_test", "filter": [{"function": "custom", "filter_fn": _programs}]}],
    }


def open_task(name: str, items: Sequence[Item], shots: Sequence[Item], store: Store) -> Any:
    """lm-eval's task `name` over these items; each should know its place in the file as `item`."""

    def splits(**_: Any) -> dict[str, Any]:
        found = {"test": datasets.Dataset.from_list(list(items))}
        return found | ({"train": datasets.Dataset.from_list(list(shots))} if shots else {})

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it explains its defaults
    datasets.disable_progress_bars()
    local = {"task": name, "custom_dataset": splits, "training_split": None, "validation_split": None}
    local |= {"test_split": "test", **(_humaneval(store) if name == "humaneval" else {})}
    root = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(
        include_defaults=False, include_path=[str(root / directory) for directory in _DIRECTORIES]
    )
    if name == "humaneval":
        return manager.load(local)["tasks"][name]
    return manager.load({"group": "local", "task": [local]})["tasks"][name]  # in a group, what it says is overridden


def run_task(task: Any, name: str, model: SessionLM) -> dict[int, dict[str, float]]:
    """Each item's metrics by its place in the file; names as in lm-eval: `acc`, `exact_match,strict-match`."""
    task.set_fewshot_seed(FEWSHOT_SEED)  # the same examples in the prompt for every k
    result = evaluate(model, {"tasks": {name: task}}, bootstrap_iters=0, confirm_run_unsafe_code=True)
    found: dict[int, dict[str, float]] = {}
    for sample in result["samples"][name]:
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        metrics = found.setdefault(int(sample["doc"]["item"]), {})
        metrics |= {f"{metric}{suffix}": float(sample[metric]) for metric in sample["metrics"]}
    assert TASKS[name].metric in next(iter(found.values()))
    return found
