"""A decoding session: the schedule, the caches and their lengths.

Enters: token ids. Leaves: logits, or chosen tokens. Knows nothing of text and nothing of how an engine runs a step.

Two cache groups, both compact (slot = tokens this layer has written in this row) and updated in place by both steps:

    kept layers      one slot per token                          length `len_kept`
    dropped layers   one slot per prompt token and per refresh   length `len_dropped`

A LoRA step neither reads nor writes a dropped layer's cache. A refresh then follows a policy (plan/policy.py): it may
run tokens of the LoRA steps before it again, which fills their holes; `len_dropped` counts them as well.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bundle.adapters import read_adapters
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.graph_io import DEVICE_TARGETS
from lora_drop_runtime.engines.engine import Array, Engine
from lora_drop_runtime.engines.ort.engine import OrtEngine
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.policy import policy_named
from lora_drop_runtime.plan.schedule import PeriodicSchedule, Schedule, StepKind

from .checks import token_mask
from .request import Ids, Request
from .sampling import Sampler, SamplingOptions

Prompts = Sequence[int] | Sequence[Sequence[int]] | Sequence[Array] | Array
WARM_UP_STEPS = 64  # at most


def _schedule(k: int | Schedule) -> Schedule:
    """A window as a schedule; anything with a `kind` is one already."""
    return k if hasattr(k, "kind") else PeriodicSchedule(k)


def _as_rows(prompts: Prompts) -> list[Ids]:
    """One row per prompt; a flat list is one prompt."""
    rows: Any = [prompts] if len(prompts) and np.ndim(prompts[0]) == 0 else prompts
    return [np.asarray(row, np.int64).reshape(-1) for row in rows]


def _is_argmax(options: SamplingOptions) -> bool:
    """Whether sampling takes the largest logit as it is: top-k and top-p change nothing at temperature 0."""
    return options.temperature == 0 and options.repetition_penalty == 1


class Session:
    """Decodes with the step graphs of one bundle. Use as a context manager, from one thread.

    `Session.open` is the way in; the constructor takes an engine, for tests and other targets.
    """

    def __init__(self, bundle: Bundle, engine: Engine, schedule: Schedule, policy: str | None = None) -> None:
        self.bundle = bundle
        self.schedule = schedule
        self.policy = policy_named(policy or bundle.manifest.plan.policy).name
        self._engine: Engine | None = engine
        self._request: Request | None = None
        self._requests_begun = 0

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        k: int | Schedule | None = None,
        policy: str | None = None,
        target: str | None = None,
        provider: str | None = None,
        threads: int | None = None,
    ) -> Session:
        """Open a bundle.

        Args:
            path: the bundle's directory.
            k: LoRA steps between two refreshes, 0 for the full schedule, or a schedule object; the bundle's own
                window when None.
            policy: what a refresh does about the tokens of the LoRA steps before it, `skip` or `backfill`
                (plan/policy.py); the bundle's own when None.
            target: `ort`, `tensorrt` or `tensorrt-rtx`; the bundle's first when None.
            provider: of ONNX Runtime, `cpu` when None; with one it also runs the graphs of a TensorRT target.
            threads: of ONNX Runtime, one per physical core when None.

        Raises:
            BundleError: the bundle is damaged, or cannot run here; NoDeviceError where only the GPU is missing.
            InputError: k or policy out of range.
        """
        bundle = Bundle.open(path)
        schedule = _schedule(bundle.manifest.plan.k if k is None else k)
        policy_named(policy or bundle.manifest.plan.policy)  # refused before an engine is made
        if threads is not None and threads < 1:
            raise InputError(
                "The number of threads must be positive.",
                note=f"{threads} was given.",
                hint="Leave it out for one per physical core.",
            )
        name, _ = bundle.target(target)
        if name in DEVICE_TARGETS and provider is None:
            from lora_drop_runtime.engines.trt.engine import TrtEngine

            session = cls(bundle, TrtEngine(bundle, name), schedule, policy)
            try:
                session.warm_up()
            except BaseException:
                session.close()
                raise
            return session
        return cls(bundle, OrtEngine(bundle, name, provider=provider, threads=threads), schedule, policy)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free buffers and engine; the session cannot be used afterwards."""
        self._request = None
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    # ── whole requests ─────────────────────────────────────────────────────────────────────────────────────

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        *,
        k: int | Schedule | None = None,
        sampling: SamplingOptions | None = None,
        stop_token_ids: Sequence[int] | None = None,
    ) -> list[Ids]:
        """Continue a batch of prompts of any lengths.

        Args:
            prompts: token ids per prompt; one flat list is one prompt.
            max_new_tokens: upper bound per prompt.
            k: LoRA steps between refreshes for this request, or a schedule object; the session's when None.
            sampling: greedy when None.
            stop_token_ids: end a row, itself excluded from the output; the model's end tokens when None.

        Returns:
            One int64 array of new tokens per prompt.
        """
        rows = _as_rows(prompts)
        out: list[list[int]] = [[] for _ in rows]
        for tokens, active in self._tokens(rows, max_new_tokens, k, sampling, stop_token_ids):
            for row, token in enumerate(tokens):
                if active[row]:
                    out[row].append(int(token))
        return [np.array(row, np.int64) for row in out]

    def stream(
        self,
        prompt_ids: Sequence[int] | Array,
        max_new_tokens: int,
        *,
        k: int | Schedule | None = None,
        sampling: SamplingOptions | None = None,
        stop_token_ids: Sequence[int] | None = None,
    ) -> Generator[int, None, None]:
        """Continue one prompt token by token; closing the iterator cancels. Arguments as for `generate`.

        Another request in the same session ends the stream with an InputError.
        """
        rows = _as_rows(prompt_ids)
        if len(rows) > 1:
            raise InputError(
                "A stream continues one prompt.", note=f"{len(rows)} were given.", hint="Use generate for a batch."
            )
        for tokens, _ in self._tokens(rows, max_new_tokens, k, sampling, stop_token_ids):
            yield int(tokens[0])

    def _tokens(
        self,
        rows: list[Ids],
        max_new_tokens: int,
        k: int | Schedule | None,
        sampling: SamplingOptions | None,
        stop_token_ids: Sequence[int] | None,
    ) -> Iterator[tuple[Ids, npt.NDArray[np.bool_]]]:
        """Yields (token per row, whether the row is still going) for every new token."""
        manifest = self.bundle.manifest
        stops = set(manifest.special_tokens.eos if stop_token_ids is None else stop_token_ids)
        lengths = np.array([len(row) for row in rows], np.int64)
        padded = np.full((len(rows), max(1, int(lengths.max(initial=0)))), manifest.special_tokens.pad, np.int64)
        for row, ids in enumerate(rows):
            padded[row, : len(ids)] = ids
        options = sampling or SamplingOptions()
        sampler = None
        if not (self._opened().chooses_tokens and _is_argmax(options)):
            sampler = Sampler(options, rows)
        self._begin(padded, lengths, max_new_tokens, k)
        number = self._requests_begun
        active = np.ones(len(rows), np.bool_)
        for left in reversed(range(max_new_tokens)):
            tokens = self._running().chosen(active) if sampler is None else sampler.sample(self._logits(), active)
            # Plain Python: after a step that streamed all weights, numpy's own code is no longer in the caches
            for row, token in enumerate(tokens.tolist() if stops else ()):
                if token in stops and active[row]:
                    active = active.copy()
                    active[row] = False
            if True not in active.tolist():
                return
            yield tokens, active
            if left:
                if self._requests_begun != number:  # the step would run on the other request's caches
                    raise InputError(
                        "The request of this stream is over.",
                        note="A session holds one request, and another one has begun since.",
                        hint="Finish a stream before the next one, or open a second session.",
                    )
                self._step(tokens, active)

    # ── step by step ───────────────────────────────────────────────────────────────────────────────────────

    def prefill(
        self,
        input_ids: Array,
        lengths: Array | None = None,
        *,
        max_new_tokens: int | None = None,
        k: int | Schedule | None = None,
    ) -> npt.NDArray[np.float32]:
        """Begin a request: run all prompts in full and fill every cache.

        Args:
            input_ids: int64 [B, T], right-padded.
            lengths: int64 [B], real tokens per row; T when None.
            max_new_tokens: sizes the caches; what the bundle allows when None.
            k: LoRA steps between refreshes for this request, or a schedule object; the session's when None.

        Returns:
            float32 [B, V], logits at each row's last real token; valid until the next call.

        Raises:
            InputError: empty prompt, ids outside the vocabulary, or more than the bundle allows.
        """
        self._begin(input_ids, lengths, max_new_tokens, k)
        return self._logits()

    def _begin(
        self, input_ids: Array, lengths: Array | None, max_new_tokens: int | None, k: int | Schedule | None
    ) -> None:
        engine = self._opened()
        ids = np.asarray(input_ids, np.int64)
        if ids.ndim != 2 or not ids.size:
            raise InputError(
                "The prompt is empty.",
                note=f"input_ids has shape {ids.shape}, needed is [batch, tokens].",
                hint="Give at least one token.",
            )
        lens = np.full(len(ids), ids.shape[1], np.int64) if lengths is None else np.asarray(lengths, np.int64)
        schedule = self.schedule if k is None else _schedule(k)
        new_tokens = self._check_request(ids, lens, max_new_tokens)
        ids = ids[:, : lens.max()]  # the caches have no room for padding beyond the longest prompt
        # Padding is computed and thrown away, so any valid id will do
        ids = np.where(token_mask(ids, lens), ids, 0)
        self._request = None  # frees its caches; an interrupted prefill leaves no half request
        self._requests_begun += 1
        request = Request.allocate(self.bundle, engine, lens, new_tokens, schedule, policy_named(self.policy))
        request.prefill(ids, lens)
        self._request = request

    @property
    def next_step(self) -> StepKind:
        """What the next `step` runs."""
        request = self._running()
        return request.schedule.kind(request.steps_done + 1)

    def step(self, token_ids: Array) -> npt.NDArray[np.float32]:
        """Run one decode step.

        Args:
            token_ids: int64 [B], the tokens to append.

        Returns:
            float32 [B, V]; valid until the next call.

        Raises:
            InputError: no prefill yet, another batch, ids outside the vocabulary, or the caches are full.
        """
        request = self._running()
        ids = np.asarray(token_ids, np.int64)
        if ids.shape != (request.batch,):
            raise InputError(
                "The step has another batch than the request.",
                note=f"token_ids has shape {ids.shape}, the prefill had {request.batch} rows.",
                hint="Give one token per row.",
            )
        self._check_vocabulary(ids)
        self._step(ids, None)
        return self._logits()

    def _step(self, token_ids: Ids, active: npt.NDArray[np.bool_] | None) -> None:
        request = self._running()
        if request.steps_done == request.max_steps:
            raise InputError(
                "The request's caches are full.",
                note=f"They were sized for {request.max_steps} decode steps.",
                hint="Call prefill with a larger max_new_tokens.",
            )
        request.step(token_ids, active)

    def _logits(self) -> npt.NDArray[np.float32]:
        return self._opened().read(self._running().logits)[:, 0]  # [B, V]

    def warm_up(self, batch: int = 1) -> None:
        """Run a short request of `batch` rows that nobody sees; ends the running request.

        On a GPU the next request of this batch then finds its memory allocated, its kernels compiled and its steps
        captured as CUDA graphs. `open` does it for one row there.
        """
        most = min(WARM_UP_STEPS, self.bundle.manifest.limits.max_seq_len - 2)
        kinds = [self.schedule.kind(step) for step in range(1, most + 1)]
        # A plain and a captured run of each kind, on either side of a state
        enough = next((n for n in range(most) if all(kinds[:n].count(kind) >= 4 for kind in set(kinds))), most)
        tokens = np.zeros((batch, 1), np.int64)
        self.prefill(tokens, max_new_tokens=enough + 1)
        for _ in range(enough):
            self.step(tokens[:, 0])
        self._request = None

    def kv_bytes(self) -> dict[str, int]:
        """Bytes of valid K/V entries in kept and in dropped layers, and of all K/V buffers; 0 without a request.

        Where a policy leaves no holes, dropped layers have as many entries as kept ones: nothing is saved.
        """
        request = self._request
        if request is None:
            return {"kept": 0, "dropped": 0, "allocated": 0}
        plan, token_bytes = self.bundle.manifest.plan, self.bundle.manifest.model.token_kv_bytes
        return {
            "kept": int(request.len_kept.sum()) * len(plan.kept_layers) * token_bytes,
            "dropped": int(request.len_dropped.sum()) * len(plan.drop_layers) * token_bytes,
            "allocated": sum(buffer.nbytes for buffer in request.caches.values()),
        }

    def engine_notes(self) -> list[str]:
        """What a user who measures should know of the engine, a line each."""
        return self._opened().notes()

    def load_adapters(self, directory: str | Path) -> None:
        """Replace the adapters by fitted ones of the same plan; ends the running request.

        Raises:
            PlanError: fitted for another base model, plan or rank.
            InputError: the bundle has no room for adapters.
        """
        engine = self._opened()
        model, plan = self.bundle.manifest.model, self.bundle.manifest.plan
        if not plan.rank:
            raise InputError(
                "The bundle has no room for adapters.",
                note="It was exported with rank 0.",
                hint="Export with --adapters DIR, or with --rank R to load adapters later.",
            )
        matrices = read_adapters(Path(directory), plan, model.hidden_size, model.fingerprint)
        self._request = None
        engine.replace_adapters(matrices)

    def _opened(self) -> Engine:
        if self._engine is None:
            raise InputError(
                "The session is closed.",
                note="close was called, or its with block has ended.",
                hint="Open it again with Session.open.",
            )
        return self._engine

    def _running(self) -> Request:
        self._opened()
        if self._request is None:
            raise InputError(
                "There is no running request.",
                note="step and next_step come after prefill.",
                hint="Call prefill first.",
            )
        return self._request

    def _check_vocabulary(self, ids: Ids) -> None:
        vocab_size = self.bundle.manifest.model.vocab_size
        if ids.min() < 0 or ids.max() >= vocab_size:
            wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
            raise InputError(
                "A token id is outside the vocabulary.",
                note=f"It is {wrong}, the model has ids 0 to {vocab_size - 1}.",
                hint="Use the tokenizer of the bundle.",
            )

    def _check_request(self, ids: Ids, lengths: Ids, max_new_tokens: int | None) -> int:
        """Refuse what does not fit; returns the number of new tokens to make room for."""
        limits = self.bundle.manifest.limits
        if lengths.shape != (len(ids),) or lengths.min() < 1 or lengths.max() > ids.shape[1]:
            empty = lengths.shape == (len(ids),) and lengths.min() < 1
            raise InputError(
                "A prompt is empty." if empty else "The lengths do not fit the prompts.",
                note=f"lengths is {lengths.tolist()}, input_ids has shape {ids.shape}.",
                hint="Give each row between 1 and T tokens.",
            )
        if len(ids) > limits.max_batch:
            raise InputError(
                "The batch is larger than the bundle allows.",
                note=f"It has {len(ids)} rows, the bundle allows {limits.max_batch}.",
                hint="Split the batch, or export with a larger --max-batch.",
            )
        longest = int(lengths.max())
        if longest > limits.max_prompt_len:
            raise InputError(
                "A prompt is longer than the bundle allows.",
                note=f"It has {longest} tokens, the bundle allows {limits.max_prompt_len}.",
                hint="Shorten it, or export with a larger --max-prompt-len.",
            )
        if max_new_tokens is not None and max_new_tokens < 1:
            raise InputError(
                "Nothing to generate.",
                note=f"max_new_tokens is {max_new_tokens}, the smallest is 1.",
                hint="Use for example --max-new-tokens 64.",
            )
        room = limits.max_seq_len - longest
        new_tokens = room if max_new_tokens is None else max_new_tokens
        if new_tokens > room or new_tokens < 1:
            raise InputError(
                "Prompt and new tokens are longer than the bundle allows.",
                note=f"{longest} + {max(1, new_tokens)} tokens, the bundle allows {limits.max_seq_len}.",
                hint="Ask for fewer new tokens, or export with a larger --max-seq-len.",
            )
        self._check_vocabulary(ids[token_mask(ids, lengths)])
        return new_tokens
