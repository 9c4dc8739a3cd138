"""A bundle as a model of lm-eval.

Enters: lm-eval's requests. Leaves: log-likelihoods and texts, each under a schedule. `SessionLM` is a session under one
k, for `lora-drop eval`; `LoraDropLM` opens its bundle itself and is what lm-eval calls `lora-drop` once this module
has been imported. It imports lm-eval, so it is imported where tasks are asked for.

How continuations are scored under a schedule is scoring.py's docstring; a text that is written begins with the
prefill's token, as at deployment. The options of an item share its u. What a session answers is kept in a `Store` by
policy, k, task, item and a hash of the question.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lm_eval.models  # noqa: F401 its registry lists lm-eval's own models only if it is empty when first asked
import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.drafting import said_policy
from lora_drop_runtime.text import TextCodec

from lora_drop_tools.eval.scoring import Ids, Row, Score, batches, phase_of, prompt_length, score
from lora_drop_tools.eval.spread import Spread
from lora_drop_tools.eval.store import Key, Store, digest
from lora_drop_tools.eval.texts import Wish, Writer
from lora_drop_tools.shared.progress import Progress

from .generation import Generation, generation_of

MODEL_NAME = "lora-drop"
_WRITTEN = "generate"  # the kind of a request for a text
_LOG = logging.getLogger(__name__)


class SessionLM(LM):  # type: ignore[misc] # lm-eval is left untyped
    """lm-eval's view of a session under one k.

    Special tokens that the tokenizer adds by itself (such as BOS) lead every context, once.

    Args:
        writer: writes texts with the session's bundle, under the session's policy.
        spread: workers of a cluster that answer in the place of the session and the writer.
        places: of each task, which item of its split stands at each place of what is evaluated; where it is left out,
            all do.

    Attributes:
        cut: how many questions were longer than the bundle allows and lost the beginning of their context.
    """

    def __init__(
        self,
        session: Session,
        codec: TextCodec,
        writer: Writer,
        k: int,
        seed: int,
        store: Store,
        places: Mapping[str, Sequence[int]] | None = None,
        spread: Spread | None = None,
    ) -> None:
        super().__init__()
        self.cut = 0
        self._session, self._codec, self._writer = session, codec, writer
        self._k, self._seed, self._store, self._places = k, seed, store, places or {}
        self._limits = session.bundle.manifest.limits
        self._spread = spread

    # ── what lm-eval asks ──────────────────────────────────────────────────────────────────────────────────────

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Sum of the log-probabilities of each continuation, and whether it is the greedy one."""
        pairs = [self._encode_pair(*request.args) for request in requests]
        return [(log_prob, greedy) for log_prob, greedy in self._scored("loglikelihood", requests, pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of whole strings, in windows of what the bundle allows, each token once."""
        asked: list[Any] = []
        pairs: list[tuple[Sequence[int], Sequence[int]]] = []
        counts, prefix = [], self._prefix()
        for request in requests:
            ids = self._codec.encode(request.args[0]).tolist()[len(self._codec.encode("")) :]
            windows = get_rolling_token_windows(ids, prefix[-1], self._limits.max_prompt_len, 1)
            own = [make_disjoint_window(window) for window in windows]
            pairs += own
            asked += [request] * len(own)
            counts.append(len(own))
        answers = iter(self._scored("rolling", asked, pairs) if pairs else ())  # an empty text has no window
        return [float(sum(next(answers)[0] for _ in range(count))) for count in counts]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Texts, each up to a stop string or an end token; drawn by a seed of its own for each item and repeat."""
        repeats: Counter[int] = Counter()
        keys: list[Key] = []
        todo: dict[Key, tuple[Wish, bool]] = {}
        for request in requests:
            context, options = request.args[:2]
            generation, repeat = generation_of(options), repeats[id(request)]
            repeats[id(request)] += 1
            key = self._key(_WRITTEN, request, (context, options))
            key = (*key, repeat) if generation.draws else key
            keys.append(key)
            if key not in self._store:
                todo[key] = self._wish(request, context, generation, repeat)
        waiting = list(todo)
        with Progress(self._what(requests), len(todo)) as progress:

            def done(index: int, text: str) -> None:
                self._store[waiting[index]] = [text, todo[waiting[index]][1]]
                progress.advance()

            wishes = [wish for wish, _ in todo.values()]
            slots = min(self._limits.max_batch, len(wishes))
            if self._spread is None:
                self._writer.write(wishes, self._k, slots, done)
            else:
                begins = range(0, len(wishes), slots or 1)
                for place, texts in self._spread.texts([wishes[begin : begin + slots] for begin in begins], self._k):
                    for index, text in enumerate(texts, begins[place]):
                        done(index, text)
        return [text for (text,) in self._kept(keys)]

    def apply_chat_template(self, chat_history: Sequence[Any], add_generation_prompt: bool = True) -> str:
        """Messages as the bundle's template writes them.

        Raises:
            InputError: the bundle has none.
        """
        # Without a prompt for an answer the last message is the beginning of one (`gen_prefix` of a task)
        goes_on = not add_generation_prompt
        return self._codec.render_chat(chat_history, add_generation_prompt, continue_final_message=goes_on)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's source, empty where none is asked for.

        Raises:
            InputError: one is asked for by a name; a bundle has one, without a name.
        """
        if isinstance(chat_template, str):
            raise InputError(
                "A bundle has one chat template.",
                note=f"{chat_template!r} was asked for.",
                hint="Use --apply_chat_template without a name.",
            )
        return (self._codec.chat_template or "") if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """Names the bundle, for lm-eval's cache of requests."""
        bundle = self._session.bundle
        manifest = hashlib.sha256((bundle.root / MANIFEST_NAME).read_bytes()).hexdigest()[:16]
        return f"{bundle.manifest.model.name}-{manifest}".replace("/", "_")

    # ── how it is answered ─────────────────────────────────────────────────────────────────────────────────────

    def _wish(self, request: Any, context: str, generation: Generation, repeat: int) -> tuple[Wish, bool]:
        """How a text is written, and whether its prompt was cut."""
        new_tokens = min(generation.max_new_tokens, self._limits.max_seq_len // 2)
        whole = self._encode(context)
        prompt = self._fitting(whole, self._limits.max_seq_len - new_tokens)
        sampling = generation.seeded(
            self._seed, str(request.task_name), self._item(request), getattr(request, "idx", 0), repeat
        )
        return Wish(prompt, new_tokens, generation.until, sampling), len(prompt) < len(whole)

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
            todo = list(batches(self._session, rows))
            for place, answers in self._answers([[rows[index] for index in batch] for batch in todo]):
                for index, answer in zip(todo[place], answers, strict=True):
                    self._store[waiting[index]] = [answer.log_prob, answer.greedy, cut[index]]
                progress.advance(len(answers))
        return self._kept(keys)

    def _answers(self, todo: Sequence[Sequence[Row]]) -> Iterator[tuple[int, list[Score]]]:
        """Scores of batches by their places, as they come."""
        if self._spread is not None:
            return self._spread.scores(todo, self._k)
        return ((place, score(self._session, batch, self._k)) for place, batch in enumerate(todo))

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

    def _encode(self, text: str) -> Ids:
        """Tokens of a text; what a chat template has written of the special tokens that lead it is not doubled."""
        ids, prefix = self._codec.encode(text), self._codec.encode("")
        count = len(prefix)
        doubled = count > 0 and np.array_equal(ids[count : 2 * count], prefix)
        return ids[count:] if doubled else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[Sequence[int], Sequence[int]]:
        """Tokens of the context, and what their text in one piece has after as many; as in lm-eval, also where a token
        lies across their border. White space between them goes to the second.
        """
        given = context.rstrip()
        if not given:
            whole = [
                *self._prefix(),
                *self._codec.encode(context + continuation)[len(self._codec.encode("")) :].tolist(),
            ]
            return whole[:1], whole[1:]
        whole, alone = self._encode(context + continuation).tolist(), self._encode(given).tolist()
        if len(alone) < len(whole):
            return alone, whole[len(alone) :]
        return whole[:-1], whole[-1:]  # which lm-eval refuses

    def _prefix(self) -> list[int]:
        """What stands before a text without a context: as in lm-eval BOS, also where texts do not begin with it."""
        special = self._session.bundle.manifest.special_tokens
        named = [self._codec.special_id(name) for name in ("bos_token", "eos_token")]
        known = [*self._codec.encode("").tolist(), *named, *special.eos, special.pad]
        return [token for token in known if token is not None][:1]

    def _item(self, request: Any) -> int:
        """The item's place in its split; by itself lm-eval counts what is evaluated."""
        places = self._places.get(str(request.task_name))
        return int(request.doc_id if places is None else places[request.doc_id])

    def _key(self, kind: str, request: Any, question: Any) -> Key:
        lenience = self._writer.lenience if kind == _WRITTEN else None  # scores are the same under any
        policy = said_policy(self._session.policy, lenience) if self._k else "full"
        return policy, self._k, str(request.task_name), self._item(request), kind, digest(question)

    def _what(self, requests: Sequence[Any]) -> str:
        """What is asked; lm-eval's own command asks for all tasks at once."""
        first, *others = dict.fromkeys(str(request.task_name) for request in requests)
        return f"{first}{f' and {len(others)} more' if others else ''}, k = {self._k}"


@register_model(MODEL_NAME)
class LoraDropLM(SessionLM):
    """lm-eval's model `lora-drop`; the arguments are those of `--model_args`.

    Args:
        bundle: its directory.
        k: LoRA steps between refreshes, 0 for the full schedule; the bundle's own when None.
        policy, lenience, target, provider, threads: as for `Session.open`.
        seed: of the places in the cycle and of drawn texts.
        batch_size, max_batch_size, device: lm-eval gives them to every model. Batches are the bundle's, and the target
            says where it runs, so they change nothing.

    Raises:
        InputError: an argument that is not known, or out of range.
        BundleError: the bundle is damaged, or cannot run here.
    """

    def __init__(
        self,
        bundle: str | None = None,
        k: int | None = None,
        policy: str | None = None,
        lenience: float | None = None,
        target: str | None = None,
        provider: str | None = None,
        threads: int | None = None,
        seed: int = 0,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **unknown: Any,
    ) -> None:
        known = "bundle, k, policy, lenience, target, provider, threads and seed"
        if unknown or bundle is None:
            raise InputError(
                "The model has an argument that is not known." if unknown else "The model has no bundle.",
                note=f"Given is {', '.join(unknown)}." if unknown else "The argument bundle was not given.",
                hint=f"Use --model_args bundle=DIR,k=3; known are {known}.",
            )
        for name, number in (("k", k), ("seed", seed)):
            if type(number) is not int and not (name == "k" and k is None):
                raise InputError(
                    f"The model's argument {name} is no whole number.",
                    note=f"It is {number!r}.",
                    hint=f"Use for example --model_args bundle=DIR,{name}=3.",
                )
        session = Session.open(
            bundle, k=k, policy=policy, lenience=lenience, target=target, provider=provider, threads=threads
        )  # checks what it is given
        chosen = session.bundle.manifest.plan.k if k is None else k
        codec = TextCodec.open(session.bundle.root / "tokenizer")
        writer = Writer(session.bundle.root, codec, session.policy, target, provider, threads, lenience)
        super().__init__(session, codec, writer, chosen, seed, Store(None, {}))

    def _kept(self, keys: Sequence[Key]) -> list[Any]:
        before = self.cut
        answers = super()._kept(keys)
        if self.cut > before:
            _LOG.warning("%d requests were longer than the bundle allows and lost the beginning", self.cut - before)
        return answers

    def close(self) -> None:
        """Free the bundle."""
        self._writer.close()
        self._session.close()
