"""A decoding session: the schedule, the caches and their lengths.

Enters: token ids. Leaves: logits, or chosen tokens. Knows nothing of text and nothing of how an engine runs a step.

Two cache groups, both compact (slot = tokens this layer has written in this row) and updated in place by both steps:

    kept layers      one slot per token                          length `len_kept`
    dropped layers   one slot per prompt token and per refresh   length `len_dropped`

A LoRA step neither reads nor writes a dropped layer's cache. A refresh then follows a policy (plan/policy.py): it may
run tokens of the LoRA steps before it again, which fills their holes; `len_dropped` counts them as well.
"""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bundle.adapters import folded, read_adapters
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.graph_io import MOST_PENDING
from lora_drop_runtime.engines.engine import Array, Engine
from lora_drop_runtime.errors import BundleError, DraftsDoNotPay, InputError, whole_number
from lora_drop_runtime.plan.drafting import DraftSource, VerifiedSchedule, draft_source, scheduled
from lora_drop_runtime.plan.schedule import PeriodicSchedule, Schedule, StepKind, periodic_like

from . import checks
from .constraint import Constraint
from .cycles import Cycles
from .flight import why_single_steps
from .lossless import Clock, Lossless, most_verified
from .opening import checked_policy, open_bundle
from .pace import MOST_DRAFTS, AutoPace, FixedPace, Pace
from .paged_slots import prepare_for_several
from .prompts import Prompts, harmless_padding, integers, padded, prompt_rows
from .request import Request
from .sampling import Ids, Sampler, SamplingOptions
from .slots import Run
from .statistics import Statistics
from .stream import Chosen, TokenStream, Usage

WARM_UP_STEPS = 64  # at most


class Session:
    """Decodes with the step graphs of one bundle. Use as a context manager, from one thread at a time.

    `Session.open` is the way in; the constructor takes an engine, for tests and other targets.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        schedule: Schedule,
        policy: str | None = None,
        draft: str | None = None,
        lenience: float | None = None,
        *,
        forget: bool = False,
    ) -> None:
        self.bundle = bundle
        checks.check_name("The policy", policy, 'Use for example policy="skip".')
        self._policy = checked_policy(bundle, policy)
        self.schedule = scheduled(schedule, self._policy)
        checks.check_name("The draft", draft, 'Use for example draft="ngram".')
        self._source = draft_source(draft, self._policy, len(bundle.manifest.plan.sites), lenience)
        self._forgets = checks.flag("forget", forget)
        self._clock: Clock = time.perf_counter
        self._paces: dict[int, AutoPace] = {}  # by the number of rows
        self._warned = False
        self._lossless: Lossless | None = None  # of the running request, where drafts are verified
        self._engine: Engine | None = engine
        self._family: weakref.WeakSet[Session] = weakref.WeakSet([self])  # the sessions on this engine
        self._request: Request | None = None
        self._requests_ended = 0
        self._usage = Usage()
        self._stream: weakref.ref[TokenStream] | None = None  # the latest one
        self._streamed = -1  # the value of `_requests_ended` while its request runs
        self._ended_by: Callable[[], InputError] = checks.ended_by_a_request

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        k: int | str | Schedule | None = None,
        schedule: str | None = None,
        policy: str | None = None,
        draft: str | None = None,
        lenience: float | None = None,
        target: str | None = None,
        provider: str | None = None,
        threads: int | None = None,
        check: bool = False,
        forget: bool = False,
    ) -> Session:
        """Open a bundle.

        Args:
            path: the bundle's directory.
            k: LoRA steps between two refreshes, 0 for the full schedule, or a schedule object; the bundle's own
                window when None. Under `lossless` the most drafts that a refresh verifies, or `"auto"` for as many
                as pay.
            schedule: `periodic`, or `margin` or `entropy`, which refresh when the logits are unsure: at most `k` LoRA
                steps between two refreshes, and the threshold that `lora-drop eval --calibrate` stored in the bundle,
                whose window and policy these then are when None. A request's own `k` as a number is periodic.
            policy: what a refresh does about the tokens of the LoRA steps before it, `skip`, `backfill`, `lossless`
                or `fill` (plan/policy.py); the bundle's own when None.
            draft: under `lossless` where drafts come from: `lora`, `ngram` or `both` (plan/drafting.py); `lora` when
                None, or `ngram` where the bundle drops no layer.
            lenience: under `lossless`, below 1, drafts are accepted, too, that the full schedule would not have chosen
                (decoding/acceptance.py): greedily those with this share of the likeliest token's probability.
            target: `ort`, `openvino`, `tensorrt` or `tensorrt-rtx`; the bundle's first when None.
            provider: of ONNX Runtime, `cpu` when None; with one it also runs the graphs of a TensorRT target.
            threads: of a step on the CPU, one per physical core when None.
            check: hash every file and compare it with the manifest; otherwise only sizes are looked at.
            forget: where caches are paged (target openvino), layers with a sliding window and convolutions give up the
                K/V of tokens that they do not see any more. `truncate` then goes back only as far as they see, and
                `reuse_prefix` takes over nothing from a request that has gone on farther.

        Raises:
            BundleError: the bundle is damaged, or cannot run here; NoDeviceError where only the GPU is missing.
            InputError: k, policy, draft or lenience out of range, or one that the others have no use for; no threshold
                is stored for the schedule.
        """
        opened = open_bundle(
            path,
            k=k,
            schedule=schedule,
            policy=policy,
            draft=draft,
            lenience=lenience,
            target=target,
            provider=provider,
            threads=threads,
            check=check,
        )
        try:
            session = cls(opened.bundle, opened.engine, opened.schedule, opened.policy, draft, lenience, forget=forget)
        except BaseException:
            opened.engine.close()
            raise
        if opened.engine.warms_up:
            try:
                session.warm_up()
            except BaseException:
                session.close()
                raise
        return session

    @property
    def policy(self) -> str:
        """The name of its policy."""
        return self._policy.name

    def __enter__(self) -> Session:
        self._opened()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise checks.not_pickled("session", ", or use fork in this process")

    def close(self) -> None:
        """Free buffers, and the engine unless a fork uses it; the session cannot be used afterwards.

        Raises:
            InputError: another thread is running a step.
        """
        self._usage.enter()
        try:
            self._request = self._lossless = None
            self._family.discard(self)
            if self._engine is not None:
                if all(one._engine is not self._engine for one in self._family):
                    self._engine.close()
                self._engine = None
        finally:
            self._usage.leave()

    # ── whole requests ─────────────────────────────────────────────────────────────────────────────────────

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        *,
        k: int | str | Schedule | None = None,
        draft: str | None = None,
        lenience: float | None = None,
        sampling: SamplingOptions | None = None,
        stop_token_ids: Sequence[int] | None = None,
        reuse_prefix: bool = False,
        constraint: Constraint | None = None,
    ) -> list[Ids]:
        """Continue a batch of prompts of any lengths.

        Args:
            prompts: token ids per prompt; one flat list is one prompt.
            max_new_tokens: upper bound per prompt.
            k: LoRA steps between refreshes for this request, or a schedule object; the session's when None.
            draft, lenience: where this request's drafts come from and how they are judged, under a policy that verifies
                them; the session's when None.
            sampling: greedy when None.
            stop_token_ids: end a row, itself excluded from the output; the model's end tokens when None.
            reuse_prefix: do not run again what a row of the request before begins with; its caches are taken over. They
                are the full model's at tokens of its prompt, and under `backfill` and `lossless` at all tokens; `skip`
                left holes at decoded ones, `fill` approximations. On a GPU a row goes on in its own caches alone, where
                the request has as many rows and slots as the one before.
            constraint: of what every row may write (constraint.py); tokens that it does not allow are left out before
                the others are chosen from. Each row works on a fork of it, and ends where it is over.

        Returns:
            One int64 array of new tokens per prompt.
        """
        rows = prompt_rows(prompts)
        out: list[list[int]] = [[] for _ in rows]
        self._usage.enter()
        try:
            for tokens, active in self._tokens(
                rows, max_new_tokens, k, sampling, stop_token_ids, draft, reuse_prefix, constraint, lenience
            ):
                for row, token in enumerate(tokens):
                    if active[row]:
                        out[row].append(int(token))
        finally:
            self._usage.leave()
        return [np.array(row, np.int64) for row in out]

    def stream(
        self,
        prompt_ids: Sequence[int] | Array,
        max_new_tokens: int,
        *,
        k: int | str | Schedule | None = None,
        draft: str | None = None,
        lenience: float | None = None,
        sampling: SamplingOptions | None = None,
        stop_token_ids: Sequence[int] | None = None,
        reuse_prefix: bool = False,
        constraint: Constraint | None = None,
    ) -> TokenStream:
        """Continue one prompt token by token; closing the iterator cancels. Arguments as for `generate`.

        The request begins with the first token. Another one of the same thread in this session, or other adapters, end
        the stream with an InputError; one of another thread is refused while the stream is not at its end.
        """
        rows = prompt_rows(prompt_ids)
        checks.check_one_prompt(rows)
        tokens = self._tokens(
            rows, max_new_tokens, k, sampling, stop_token_ids, draft, reuse_prefix, constraint, lenience
        )
        return TokenStream(tokens, self._usage, self._own)

    def _tokens(
        self,
        rows: list[Ids],
        max_new_tokens: int,
        k: int | str | Schedule | None,
        sampling: SamplingOptions | None,
        stop_token_ids: Sequence[int] | None,
        draft: str | None = None,
        reuse_prefix: bool = False,
        constraint: Constraint | None = None,
        lenience: float | None = None,
    ) -> Chosen:
        """Yields (token per row, whether the row has one) for every new token."""
        manifest = self.bundle.manifest
        stops = checks.stop_ids(stop_token_ids, manifest.special_tokens.eos)
        ids, lengths = padded(rows, manifest.special_tokens.pad)
        options = checks.checked_sampling(sampling, manifest.model.vocab_size)
        checks.check_constraint(constraint)
        max_new_tokens = whole_number("The number of new tokens", max_new_tokens, "Use for example max_new_tokens=64.")
        checks.check_name("The draft", draft, 'Use for example draft="ngram".')
        source = draft_source(draft, self._policy, len(manifest.plan.sites), lenience, self._source)
        schedule = self.schedule if k is None else scheduled(k, self._policy)
        if isinstance(schedule, PeriodicSchedule) and manifest.model.recurrent_layers:
            checks.check_lora_steps(min(schedule.k, max_new_tokens - 1), MOST_PENDING)
        try:
            if isinstance(schedule, VerifiedSchedule) and schedule.drafts != 0:
                self._begin(ids, lengths, max_new_tokens, k, reuse_prefix)
                sampler = Sampler(options, rows, constraint)
                yield from self._verified_tokens(rows, sampler, stops, max_new_tokens, source)
                return
            engine_chooses = self._opened().chooses_tokens and options.takes_the_largest and constraint is None
            chooser = None if engine_chooses else Sampler(options, rows, constraint)
            self._begin(ids, lengths, max_new_tokens, k, reuse_prefix)
            ended = self._requests_ended
            active = np.ones(len(rows), np.bool_)
            if not why_single_steps(self._opened(), schedule, self._policy, options, constraint):
                request, samplers = self._running(), None if chooser is None else chooser.rows
                first = request.chosen(active) if chooser is None else chooser.sample(self._logits(), active)
                yield from Cycles(request, options, samplers, stops).tokens(first, lambda: self._check_runs(ended))
                return
            for left in reversed(range(max_new_tokens)):
                tokens = self._running().chosen(active) if chooser is None else chooser.sample(self._logits(), active)
                # Plain Python: after a step that streamed all weights, numpy's own code is no longer in the caches
                for row, token in enumerate(tokens.tolist() if stops else ()):
                    if token in stops and active[row]:
                        active = active.copy()
                        active[row] = False
                if True not in active.tolist():
                    return
                yield tokens, active
                if chooser is not None and constraint is not None:
                    active = active & ~chooser.over
                    if not active.any():
                        return
                if left:
                    self._check_runs(ended)
                    self._step(tokens, active)
        except BundleError:  # of logits that are no numbers, among others: so may be what they were made of
            if self._request is not None:
                self._request.has_failed = True
            raise

    def _verified_tokens(
        self, rows: list[Ids], sampler: Sampler, stops: set[int], new_tokens: int, source: DraftSource
    ) -> Chosen:
        """The same for the request that has begun, where refreshes verify drafts."""
        request, ended = self._running(), self._requests_ended
        schedule = request.schedule
        assert isinstance(schedule, VerifiedSchedule)
        pace: Pace = self._paces.setdefault(len(rows), AutoPace())
        if schedule.drafts is not None:
            pace = FixedPace(schedule.drafts)
        pace.begin()
        self._lossless = Lossless(request, rows, sampler, stops, new_tokens, source, pace, self._clock)

        def go_on() -> None:
            self._check_runs(ended)
            if pace.note and not self._warned:
                self._warned = True
                warnings.warn(f"{pace.note[0].upper()}{pace.note[1:]}.", DraftsDoNotPay, stacklevel=2)

        told, is_over = [0] * len(rows), False
        try:
            for tokens, active in self._lossless.tokens(self._logits(), go_on):
                for row in np.flatnonzero(active):
                    told[row] += 1
                yield tokens, active
            is_over = True
        finally:
            if not is_over and self._request is request:  # the caches may be ahead of what was told
                request.take_back(told)

    def statistics(self) -> Statistics | None:
        """What the latest request has counted so far, where its refreshes verify drafts; else None, as for k = 0."""
        return None if self._lossless is None else self._lossless.statistics()

    # ── step by step ───────────────────────────────────────────────────────────────────────────────────────

    def prefill(
        self,
        input_ids: Array,
        lengths: Array | None = None,
        *,
        max_new_tokens: int | None = None,
        k: int | str | Schedule | None = None,
        reuse_prefix: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Begin a request: run all prompts in full and fill every cache.

        Args:
            input_ids: int64 [B, T], right-padded.
            lengths: int64 [B], real tokens per row; T when None.
            max_new_tokens: sizes the caches; what the bundle allows when None.
            k: LoRA steps between refreshes for this request, or a schedule object; the session's when None.
            reuse_prefix: as for `generate`.

        Returns:
            float32 [B, V], logits at each row's last real token; valid until the next call.

        Raises:
            InputError: empty prompt, ids outside the vocabulary, or more than the bundle allows.
        """
        self._usage.enter()
        try:
            self._begin(input_ids, lengths, max_new_tokens, k, reuse_prefix)
            return self._logits()
        finally:
            self._usage.leave()

    def _begin(
        self,
        input_ids: Array,
        lengths: Array | None,
        max_new_tokens: int | None,
        k: int | str | Schedule | None,
        reuse_prefix: bool,
    ) -> None:
        engine = self._opened()
        before = self._request if checks.flag("reuse_prefix", reuse_prefix) else None
        before = None if before is not None and not before.may_be_taken_over() else before
        ids = integers("The prompt", input_ids, "Give token ids [batch, tokens], such as [[1, 2], [3, 4]].")
        checks.check_prompts(ids)
        if lengths is None:
            lens = np.full(len(ids), ids.shape[1], np.int64)
        else:
            lens = integers("The list of lengths", lengths, "Give a length for each row, such as [2, 1].")
        schedule = self.schedule if k is None else scheduled(k, self._policy)
        manifest = self.bundle.manifest
        asked = checks.new_tokens_asked(max_new_tokens)
        new_tokens = checks.check_request(ids, lens, asked, manifest.limits, manifest.model.vocab_size)
        ids = harmless_padding(ids, lens)
        self._check_no_foreign_stream()
        if self._request is not None and self._request.may_hold_nan():
            self._request.wipe()
        self._end_request(checks.ended_by_a_request)  # an interrupted prefill leaves no half request
        request = Request(self.bundle, engine, lens, new_tokens, schedule, self._policy, self._forgets)
        if before is not None:
            for row, length in enumerate(lens.tolist()):
                request.take_over(before, row, ids[row, : length - 1].tolist())  # a token has to give the logits
            before = None  # its caches go before the prompts run
        request.prefill(ids, lens)
        self._request = request

    @property
    def next_step(self) -> StepKind:
        """What the next `step` runs; where refreshes verify drafts always a refresh, since a single step has none.

        Raises:
            InputError: there is no request, it has no room for a step, or another thread's call is running.
        """
        self._usage.enter()  # it asks the schedule, in the midst of another thread's step for a step too early
        try:
            return self._with_room().next_kind(None)
        finally:
            self._usage.leave()

    def step(self, token_ids: Array) -> npt.NDArray[np.float32]:
        """Run one decode step. Under a policy that verifies drafts it is a refresh of one token.

        Args:
            token_ids: int64 [B], the tokens to append.

        Returns:
            float32 [B, V]; valid until the next call.

        Raises:
            InputError: no prefill yet, another batch, ids outside the vocabulary, the caches are full, a stream is
                reading the request, or an interrupt came as the step before was counted.
        """
        self._usage.enter()
        try:
            request = self._running()
            if self._is_streamed():
                raise checks.read_by_a_stream()
            ids = integers("The list of tokens", token_ids, "Give one token id per row, such as [5].")
            checks.check_step(ids, request.batch, self.bundle.manifest.model.vocab_size)
            self._step(ids, None)
            return self._logits()
        finally:
            self._usage.leave()

    def truncate(self, tokens: int | Sequence[int]) -> None:
        """Cut the running request back to its first tokens, prompt and decoded; another text can then follow.

        The next step runs in full, and the schedule begins anew behind it. In what stays `skip` leaves the holes, and
        `fill` the approximations, that it made there.

        Args:
            tokens: that stay in each row, at least one, or a list with a number for each row. A row that has no more
                stays as it is.

        Raises:
            InputError: no running request, a number below 1, one that layers have forgotten what they need of, or that
                recurrent states are ahead of, or a stream is reading the request.
        """
        self._usage.enter()
        try:
            request = self._running()
            if self._is_streamed():
                raise checks.read_by_a_stream()
            lengths = checks.lengths_that_stay(tokens, [len(row) for row in request.tokens])
            for row, length in enumerate(lengths):
                if not request.goes_back(row, length):
                    no_way = (
                        checks.states_are_ahead if self.bundle.manifest.model.recurrent_layers else checks.forgotten
                    )
                    raise no_way(row, length, len(request.tokens[row]))
            request.truncate(lengths)
            self._lossless = None
        finally:
            self._usage.leave()

    def fork(self) -> Session:
        """Another session that goes on from where this one is, with caches of its own and the same weights.

        Close both; the engine is freed with the last one. On a GPU one thread at a time may use them.

        Raises:
            InputError: no running request, or a stream is reading it.
            NoDeviceError: the GPU has no room for its caches.
        """
        self._usage.enter()
        try:
            engine, request = self._opened(), self._running()
            if self._is_streamed():
                raise checks.read_by_a_stream()
            beside = engine.beside()
            new = Session(self.bundle, beside, self.schedule, self._policy.name, forget=self._forgets)
            new._source = self._source
            self._family.add(new)
            new._family = self._family
            try:
                new._request = request.fork(beside)
            except BaseException:
                new.close()
                raise
            if beside is not engine:
                new._usage = self._usage
            return new
        finally:
            self._usage.leave()

    def _with_room(self, active: npt.NDArray[np.bool_] | None = None) -> Request:
        """The running request, which has a step of these rows left. Raises InputError where it has none."""
        request = self._running()
        if active is None:
            request.meet()
        if request.steps_done == request.max_steps:
            raise checks.caches_full(max(request.kept))
        return request

    def _step(self, token_ids: Ids, active: npt.NDArray[np.bool_] | None) -> None:
        self._with_room(active).step(token_ids, active)

    def _logits(self) -> npt.NDArray[np.float32]:
        return self._running().logits()

    def warm_up(self, batch: int = 1) -> None:
        """Run a short request of `batch` rows that nobody sees; ends the running request.

        On a GPU the next request of this batch then finds its memory allocated, its kernels compiled and its steps
        captured as CUDA graphs. `open` does it for one row there. On target openvino steps of several tokens get a
        model of their own, where the policy has such and the weights are small (docs/openvino.md).
        """
        batch = checks.checked_batch(batch, self.bundle.manifest.limits)
        if self._policy.runs_several(self.schedule):
            prepare_for_several(self._opened())
        most = min(WARM_UP_STEPS, self.bundle.manifest.limits.max_seq_len - 2)
        tokens = np.zeros((batch, 1), np.int64)
        verifies = isinstance(self.schedule, VerifiedSchedule)
        if verifies and most > 1:
            self._warm_up_verification(tokens, most)
        window = periodic_like(self.schedule, self.bundle.manifest.plan.k)
        schedule = self.schedule if verifies else window
        kinds = [schedule.kind(step, None) for step in range(1, most + 1)]
        # A plain and a captured run of each kind, on either side of a state
        enough = next((n for n in range(most) if all(kinds[:n].count(kind) >= 4 for kind in set(kinds))), most)
        self.prefill(tokens, max_new_tokens=enough + 1, k=schedule)
        for _ in range(enough):
            self.step(tokens[:, 0])
        if not why_single_steps(self._opened(), schedule, self._policy, SamplingOptions(), None):
            twice = min(2 * (window.k + 1), most)  # a plain and a captured run
            self.generate(list(tokens), twice + 1, k=schedule, stop_token_ids=())
        self._request = None

    def _warm_up_verification(self, tokens: Ids, most: int) -> None:
        """Run LoRA steps, and refreshes of every width, as a request will."""
        assert isinstance(self.schedule, VerifiedSchedule)
        drafts = MOST_DRAFTS if self.schedule.drafts is None else self.schedule.drafts
        self.prefill(tokens, max_new_tokens=most + 1)
        request, rows = self._running(), range(len(tokens))
        verified = most_verified(request.engine)
        widest = min(drafts + 1, most, most if verified is None else verified)
        kept = request.kept[0]
        for width in range(2, widest + 1):
            for _ in range(4):
                for _ in range(2 if self._source.runs_lora_steps and width == 2 else 0):  # on either side of a state
                    request.slots.run(StepKind.LORA, [Run(StepKind.LORA, [0], kept, kept)] * len(rows), rows)
                refresh = Run(StepKind.REFRESH, [0] * width, kept, kept, each=True)
                request.slots.run(StepKind.REFRESH, [refresh] * len(rows), rows)

    def kv_bytes(self) -> dict[str, int]:
        """Bytes of valid K/V entries in kept and in dropped layers, and of all K/V buffers; 0 without a request.

        Where a policy leaves no holes, dropped layers have as many entries as kept ones: nothing is saved.
        """
        request = self._request
        if request is None:
            return {"kept": 0, "dropped": 0, "allocated": 0}
        return request.kv_bytes()

    def engine_notes(self) -> list[str]:
        """What a user who measures should know of the engine, a line each."""
        return self._opened().notes()

    def load_adapters(self, directory: str | Path) -> None:
        """Replace the adapters by fitted ones of the same plan; ends the running request.

        Raises:
            PlanError: fitted for another base model, plan or rank; the running request goes on.
            InputError: the bundle has no room for adapters, or a fork of the session is open.
            BundleError: the engine cannot take them; the adapters from before go on working.
        """
        engine = self._opened()
        model, plan = self.bundle.manifest.model, self.bundle.manifest.plan
        checks.check_path("The directory of adapters", directory)
        checks.check_room_for_adapters(plan.rank)
        self._check_no_forks()
        matrices = read_adapters(Path(directory), plan, model.hidden_size, model.fingerprint)
        weights = folded(matrices, plan, model.hidden_size)
        self._usage.enter()
        try:
            self._check_no_forks()  # one may have come meanwhile
            self._check_no_foreign_stream()
            self._end_request(checks.ended_by_a_failure)
            self._paces.clear()
            engine.replace_adapters(weights)
            self._ended_by = checks.ended_by_adapters
        finally:
            self._usage.leave()

    def _own(self, stream: TokenStream) -> None:
        """Remember the stream whose request is about to begin."""
        self._check_no_foreign_stream()
        self._stream, self._streamed = weakref.ref(stream), self._requests_ended + 1

    def _is_streamed(self) -> bool:
        """Whether a stream that is not over reads the running request."""
        stream = None if self._stream is None else self._stream()
        return stream is not None and not stream.is_over and self._streamed == self._requests_ended

    def _check_no_forks(self) -> None:
        if len(self._family) > 1:
            raise checks.forks_use_the_adapters(len(self._family) - 1)

    def _check_no_foreign_stream(self) -> None:
        """Refuse to end another thread's stream; one that nobody holds any more is over."""
        stream = None if self._stream is None else self._stream()
        if stream is not None and not stream.is_over and stream.thread != threading.get_ident():
            raise checks.used_by_another_thread()

    def _end_request(self, ended_by: Callable[[], InputError]) -> None:
        """Free its caches; `ended_by` makes what a stream hears that was still reading it."""
        self._request = self._lossless = None
        self._requests_ended += 1
        self._ended_by = ended_by

    def _check_runs(self, ended: int) -> None:
        """Whether the request before which so many had ended is the running one."""
        if self._requests_ended != ended:
            raise self._ended_by()
        self._opened()

    def _opened(self) -> Engine:
        if self._engine is None:
            raise checks.closed()
        return self._engine

    def _running(self) -> Request:
        self._opened()
        if self._request is None:
            raise checks.no_request()
        if self._request.is_torn:
            raise checks.torn_request()
        return self._request
