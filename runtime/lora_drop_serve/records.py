"""What is known of each request at its end: its id, its answer's status, its tokens and times.

Enters: heads of requests, and what the routes find out about them. Leaves: figures for `/metrics`, and where it is
wanted a line of JSON on standard error for each request. No text of a prompt or an answer comes here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from .answers import Answer
from .driver import Job
from .errors import ApiError
from .log import Log
from .metrics import INVALID, REASONS, Metrics
from .names import request_id

PROBES = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds, and worth a line where they fail
GONE, GONE_CODE = 499, "client_gone"  # nobody reads this, but in the log
_DIGITS = 6  # of a number of seconds


class Record:
    """One request, from its head to the end of its answer.

    Attributes:
        id: that it came with, or was given.
        route: as `/metrics` has it.
        status: of HTTP; None until the answer begins.
        error: the code of the error that it was answered with, or that ended its stream.
        model: that it is for, once that is known.
        is_told: whether all of its answer was sent.
    """

    def __init__(self, id: str, route: str) -> None:
        self.id, self.route = id, route
        self.status: int | None = None
        self.error: str | None = None
        self.model: str | None = None
        self.is_told = False
        self._began = time.perf_counter()
        self._answer: Answer | None = None
        self._job: Job | None = None

    def runs(self, answer: Answer, job: Job) -> None:
        """Its rows have their places."""
        self._answer, self._job = answer, job

    def fails(self, error: dict[str, Any]) -> None:
        """It is answered with that body of an error."""
        self.error = error["error"]["code"] or error["error"]["type"]

    @property
    def finish_reasons(self) -> list[str]:
        """Of its choices, each once; none until all have ended."""
        found = [] if self._answer is None else [choice.finish for choice in self._answer.choices]
        return [] if None in found else [reason for reason in dict.fromkeys(found) if reason is not None]

    @property
    def seconds(self) -> float:
        """Since its head came."""
        return time.perf_counter() - self._began

    @property
    def refusal(self) -> str | None:
        """Why it was not taken, as `/metrics` has it; None of one that was, and of probes."""
        if self.error is None or self.status is None or self.route in PROBES:
            return None
        if 400 <= self.status < 500 or (self.status == 503 and self._job is None):
            return self.error if self.error in REASONS else INVALID
        return None

    def line(self, now: datetime) -> str:
        """For the log, at its end."""
        job, usage = self._job, None if self._answer is None else self._answer.usage()
        times = (None, None) if job is None else (job.queue_seconds, job.first_token_seconds)
        queue, first = (None if one is None else round(one, _DIGITS) for one in times)
        is_left = self.status == GONE or (self._answer is not None and not self.is_told)
        said = {
            "time": now.isoformat(timespec="milliseconds"),
            "id": self.id,
            "route": self.route,
            "status": self.status,
            "error": GONE_CODE if self.error is None and is_left else self.error,
            "model": self.model,
            "prompt_tokens": None if usage is None else usage["prompt_tokens"],
            "new_tokens": None if usage is None else usage["completion_tokens"],
            "finish_reason": ",".join(self.finish_reasons) or None,
            "queue_seconds": queue,
            "first_token_seconds": first,
            "total_seconds": round(self.seconds, _DIGITS),
        }
        return json.dumps(said)


class Records:
    """Of all requests of a server.

    Args:
        metrics: get the figures.
        log: gets a line at each request's end, but for probes that succeed; none where it is None.
        tells_ids: whether answers have `X-Request-ID`.
    """

    def __init__(self, metrics: Metrics, log: Log | None, *, tells_ids: bool) -> None:
        self._metrics, self._log, self._tells_ids = metrics, log, tells_ids

    def begin(self, route: str, headers: Iterable[tuple[bytes, bytes]]) -> Record:
        """A request has come."""
        return Record(request_id(headers), route)

    def headers(self, record: Record) -> dict[str, str]:
        """What its answer's head has beside the answer's own."""
        return {"X-Request-ID": record.id} if self._tells_ids else {}

    def answer(self, record: Record, status: int) -> None:
        """Its answer begins."""
        record.status = status
        self._metrics.requests.labels(record.route, str(status)).inc()

    def refuse(self, record: Record, error: ApiError) -> None:
        """Its answer begins, and is an error."""
        record.fails(error.body)
        self.answer(record, error.status)

    def end(self, record: Record) -> None:
        """Its answer is over."""
        if record.refusal is not None:
            self._metrics.refused[record.refusal].inc()
        elif record.status == 200 and record.error is None and record.finish_reasons and record.is_told:
            self._metrics.whole.observe(record.seconds)
        is_quiet = record.route in PROBES and record.status is not None and record.status < 400
        if self._log is not None and not is_quiet:
            self._log.say(record.line(datetime.now(UTC)))
