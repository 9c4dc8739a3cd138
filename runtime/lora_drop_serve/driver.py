"""The thread that runs the batch, and the jobs by which the event loop talks to it.

Enters: jobs, from the event loop. Leaves: their events, on the event loop, all of a tick in one call. The thread alone
touches the batch: what the loop wants comes through a queue that is read between two ticks. Nothing that a client does
holds the thread up: events wait for slow readers in their job, which has no more of them than its rows have tokens,
and jobs are bounded by `most_rows` until their answers are delivered.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from lora_drop_runtime.decoding.batch import Batch
from lora_drop_runtime.decoding.constraint import Constraint
from lora_drop_runtime.decoding.row import Event
from numpy import int64
from numpy.typing import NDArray

from .errors import closing, engine_failed, queue_full, stalled
from .metrics import Metrics

T = TypeVar("T")
STALLED_SECONDS = 60  # a tick takes milliseconds, with a chunk of a long prompt a second


@dataclass(frozen=True)
class RowRequest:
    """One row: a prompt [T], the most new tokens, and what else `Batch.add` takes."""

    prompt: NDArray[int64]
    new_tokens: int
    options: Mapping[str, Any]


class Told(NamedTuple):
    """An event of a job's row, by the row's place in the job."""

    row: int
    event: Event


class Began(NamedTuple):
    """A job's row has got its slot, at a time of `perf_counter`."""

    row: int
    at: float


class Job:
    """Rows that one request asks for. Belongs to the event loop; use as a context manager, which gives up what still
    runs.

    Attributes:
        queue_seconds: until its first row had a slot; None before.
        first_token_seconds: until its first token; None before.
    """

    def __init__(self, driver: Driver, rows: Sequence[RowRequest]) -> None:
        self._driver, self.rows = driver, rows
        self._inbox: asyncio.Queue[Told | BaseException | None] = asyncio.Queue()
        self._going = set(range(len(rows)))
        self.queue_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self._began = time.perf_counter()
        self._latest: dict[int, float] = {}  # row → when it got its latest token
        self._is_open = True

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the rows that still run, and the job's place; safe to call again."""
        if self._is_open:
            self._is_open = False
            for index in self._going:
                self.cancel(index)
            self._driver.release(self)

    def cancel(self, index: int) -> None:
        """Give a row up; its last event comes within a tick."""
        self._driver.cancel(self, index)

    async def unless_ended(self, work: Awaitable[T]) -> T:
        """The result of work that comes before `begin`.

        Raises:
            ApiError: meanwhile the server is closing, or the engine has failed.
        """
        tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._inbox.get()), asyncio.ensure_future(work)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                raise tasks[0].result()
            found: T = tasks[1].result()
            return found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def begin(self, constraint: Constraint | None = None) -> None:
        """Put the rows into the batch, and wait until they are in it.

        Args:
            constraint: of what each of them may write.

        Raises:
            InputError: the batch refuses one, and none of them runs.
            ApiError: the server is closing, or the engine has failed.
        """
        self._driver.add(self, constraint)
        error = await self._inbox.get()
        if error is not None:
            assert isinstance(error, BaseException)
            raise error

    async def told(self) -> list[Told]:
        """The events that have come since the last call, at least one.

        Raises:
            ApiError: the server is closing, or the engine has failed.
        """
        found = [await self._inbox.get()]
        while not self._inbox.empty():
            found.append(self._inbox.get_nowait())
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return [one for one in found if isinstance(one, Told)]

    # ── for the driver, on the event loop ──────────────────────────────────────────────────────────────────

    def take(self, item: Told | Began | BaseException | None, now: float, metrics: Metrics) -> None:
        if isinstance(item, Began):
            metrics.queued.observe(item.at - self._began)
            if self.queue_seconds is None:
                self.queue_seconds = item.at - self._began
            return
        if isinstance(item, Told):
            event = item.event
            if event.finished is not None:
                self._going.discard(item.row)
            if event.token is not None and not event.is_prompt:
                metrics.tokens[event.kind].inc()
                before = self._latest.get(item.row)
                if before is None:
                    metrics.first.observe(now - self._began)
                    metrics.reused.inc(event.reused)
                    if self.first_token_seconds is None:
                        self.first_token_seconds = now - self._began
                else:
                    metrics.between.observe(now - before)
                self._latest[item.row] = now
            if event.statistics is not None:
                metrics.accepted.inc(event.statistics.accepted)
                metrics.rejected.inc(event.statistics.drafted - event.statistics.accepted)
        elif item is not None:
            self._going.clear()
        if self._is_open:
            self._inbox.put_nowait(item)


Item = tuple[Job, Told | Began | BaseException | None]


class Driver:
    """Runs a batch for one event loop.

    Args:
        batch: is the driver's from here on, and closed at its end.
        max_waiting: rows that may wait for a slot.

    Attributes:
        most_rows: that run and wait, answers that are not delivered yet among them.
        is_leaving: others should send no more, though jobs are still taken.
        is_closing: new jobs are refused.
        error: why the engine runs no more.
        on_failure: is told it, on the event loop.
    """

    def __init__(self, batch: Batch, max_waiting: int) -> None:
        self._batch = batch
        self.most_rows = batch.slots + max_waiting
        self.bundle, self.target = batch.bundle, batch.target
        self.policy, self.schedule, self.lenience = batch.policy, batch.schedule, batch.lenience
        self.max_seq_len, self.max_prompt_len = batch.max_seq_len, batch.max_prompt_len
        self.metrics = Metrics()
        self.is_leaving = self.is_closing = self._is_cut = False
        self.error: BaseException | None = None
        self.on_failure: Callable[[BaseException], None] = lambda _: None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open: set[Job] = set()  # of the event loop
        self._rows: dict[int, tuple[Job, int]] = {}  # of the thread: by the batch's numbers
        self._numbers: dict[tuple[Job, int], int] = {}
        self._queue: dict[int, None] = {}  # numbers of rows that have no slot yet, in their order
        self._tick_began: float | None = None
        self._thread = threading.Thread(target=self._drive, name="lora-drop-batch", daemon=True)

    # ── on the event loop ──────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Begin; call it on the event loop that submits."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, rows: Sequence[RowRequest]) -> Job:
        """Places for rows, which begin as slots come free behind `Job.begin`.

        Raises:
            ApiError: the queue is full, the server is closing, or the engine has failed.
        """
        if self.error is not None:
            raise engine_failed(self.error)
        if self.is_closing:
            raise closing()
        if self.open_rows + len(rows) > self.most_rows:
            raise queue_full(len(rows), self.most_rows)
        job = Job(self, rows)
        self._open.add(job)
        for row in rows:
            self.metrics.prompt_tokens.inc(len(row.prompt))
            self.metrics.prompt_lengths.observe(len(row.prompt))
        return job

    def add(self, job: Job, constraint: Constraint | None) -> None:
        self._commands.put(lambda: self._add(job, constraint))

    def cancel(self, job: Job, index: int) -> None:
        self._commands.put(lambda: self._cancel(job, index))

    def release(self, job: Job) -> None:
        self._open.discard(job)

    @property
    def open_rows(self) -> int:
        """Rows of jobs whose answers are not delivered."""
        return sum(len(job.rows) for job in self._open)

    @property
    def is_stalled(self) -> bool:
        """Whether a tick takes so long that the engine must be stuck."""
        began = self._tick_began
        return began is not None and time.perf_counter() - began > STALLED_SECONDS

    def check(self) -> None:
        """Raises ApiError: it cannot go on, and should be replaced."""
        if self.error is not None:
            raise engine_failed(self.error)
        if self.is_stalled:
            raise stalled()

    async def _wait(self, seconds: float, is_over: Callable[[], bool]) -> None:
        """Until something is over, nothing can go on, or `cut` was called, and no longer than that."""
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        while not (is_over() or self._is_cut or self.error is not None) and clock() < until:
            await asyncio.sleep(min(0.02, seconds))

    async def drain(self, seconds: float, delay: float = 0.0) -> int:
        """End: say so, and refuse new jobs after the delay; let those that run end, and cut them after so many seconds
        more. `cut` ends both times at once. Returns how many jobs were cut."""
        self.is_leaving = True
        await self._wait(delay, lambda: False)
        self.is_closing = True
        await self._wait(seconds, lambda: not self._open)
        cut = len(self._open) if self.error is None else 0  # a failed engine has ended them, and they have been told
        self._give([(job, closing()) for job in self._open], None, time.perf_counter())
        return cut

    def cut(self) -> None:
        """Let what is being drained end now."""
        self._is_cut = True

    async def stop(self) -> None:
        """End the thread, and close the batch."""
        self.is_closing = True
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, STALLED_SECONDS)

    def _give(self, items: Sequence[Item], state: tuple[int, int, Mapping[str, int]] | None, now: float) -> None:
        metrics = self.metrics
        for job, item in items:
            job.take(item, now, metrics)
        if state is not None:
            rows, waiting, kv = state
            metrics.running.set(rows - waiting)
            metrics.waiting.set(waiting)
            for name, count in kv.items():
                metrics.kv[name].set(count)

    def _fail(self, error: BaseException) -> None:
        self.error = error
        nothing = 0, 0, dict.fromkeys(self.metrics.kv, 0)
        self._give([(job, engine_failed(error)) for job in self._open], nothing, time.perf_counter())
        self.on_failure(error)

    # ── in the thread ──────────────────────────────────────────────────────────────────────────────────────

    def _post(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed, and nobody left who could hear
            self._commands.put(None)

    def _add(self, job: Job, constraint: Constraint | None) -> None:
        """Add all rows of a job, or none."""
        numbers: list[int] = []
        told: BaseException | None = None
        try:
            for row in job.rows:
                numbers.append(self._batch.add(row.prompt, row.new_tokens, constraint=constraint, **row.options))
        except Exception as error:  # of this job alone
            for number in numbers:
                self._batch.cancel(number)
            told = error
        else:
            for index, number in enumerate(numbers):
                self._rows[number] = job, index
                self._numbers[job, index] = number
                self._queue[number] = None
        self._post(self._give, [(job, told)], self._state(), time.perf_counter())

    def _state(self) -> tuple[int, int, Mapping[str, int]]:
        """All rows, those of them that wait, and the bytes of their K/V."""
        return self._batch.rows, self._batch.waiting, self._batch.kv_bytes()

    def _cancel(self, job: Job, index: int) -> None:
        number = self._numbers.get((job, index))
        if number is not None:
            self._queue.pop(number, None)
            self._batch.cancel(number)

    def _take_commands(self) -> bool:
        """Do what the loop wants, waiting for it where there is no row; returns whether to go on."""
        wait = not self._batch.rows
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _begun(self, now: float) -> list[Item]:
        """The rows that have got their slots with the tick that began then."""
        if not self._queue:
            return []
        waiting = set(self._batch.waiting_rows)
        numbers = [number for number in self._queue if number not in waiting]
        for number in numbers:
            del self._queue[number]
        return [(job, Began(row, now)) for job, row in map(self._rows.__getitem__, numbers)]

    def _tick(self) -> None:
        self._tick_began = now = time.perf_counter()
        events = self._batch.tick()
        self._tick_began = None
        items = self._begun(now)
        for event in events:
            found = self._rows.get(event.row)
            if found is None:  # of a job that was refused
                continue
            items.append((found[0], Told(found[1], event)))
            if event.finished is not None:
                del self._rows[event.row], self._numbers[found]
        self._post(self._give, items, self._state(), time.perf_counter())

    def _drive(self) -> None:
        try:
            while self._take_commands():
                if self._batch.rows:
                    self._tick()
        except BaseException as error:  # the engine: nothing runs any more
            self._tick_began = None
            self._post(self._fail, error)
        finally:
            self._batch.close()
