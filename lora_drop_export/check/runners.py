"""A session and the reference as Polygraphy runners: one `infer` is one step of the same request.

Enters: forced tokens, step by step. Leaves: logits float32 [B, V]. Knows no tolerance.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import BundleError, InputError, LoraDropError, VerificationError, first_line, lack_hint
from lora_drop_runtime.plan.policy import Policy
from lora_drop_runtime.plan.schedule import StepKind
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from lora_drop_export.console import Console

from .reference import Reference


@contextlib.contextmanager
def execution(target: str) -> Iterator[None]:
    """What an engine raises while it executes a bundle, as a VerificationError; but not that there is no device, or too
    little memory: no bundle is wrong for it."""
    try:
        yield
    except Exception as error:  # engines have exceptions of their own, too
        if isinstance(error, MemoryError) or (isinstance(error, LoraDropError) and type(error) is not BundleError):
            raise
        fact = f"The bundle on {target} cannot be executed."
        note = error.note if isinstance(error, BundleError) else first_line(error)
        if hint := lack_hint(error):
            raise InputError(fact, note=note, hint=hint) from None
        raise VerificationError(
            fact, note=note, hint="This is a bug, or an engine older than the bundle needs."
        ) from error


def _input_metadata() -> TensorMetadata:
    return (
        TensorMetadata()
        .add("token_ids", dtype=np.int64, shape=("batch", "tokens"))
        .add("lengths", dtype=np.int64, shape=("batch",))
    )


class SessionRunner(BaseRunner):  # type: ignore[misc]  # polygraphy ships no types
    """Polygraphy runner over a session: the first feed is the prefill, every other one a decode step."""

    def __init__(self, session: Session, target: str, steps: int, k: int) -> None:
        super().__init__(name=target)
        self._session = session
        self._steps, self._k = steps, k

    def activate_impl(self) -> None:
        self._begun = False

    def deactivate_impl(self) -> None:
        del self._begun

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _input_metadata()

    def infer_impl(self, feed_dict: dict[str, Any]) -> OrderedDict[str, Any]:
        ids, lengths = feed_dict["token_ids"], feed_dict["lengths"]
        begin = time.perf_counter()
        with execution(self.name):
            if not self._begun:
                logits = self._session.prefill(ids, lengths, max_new_tokens=self._steps + 1, k=self._k)
                self._begun = True
            else:
                logits = self._session.step(ids[:, 0])
        self.inference_time = time.perf_counter() - begin
        return OrderedDict(logits=logits.copy())


class ReferenceRunner(BaseRunner):  # type: ignore[misc]
    """Polygraphy runner over reference.py, which computes all steps when it is activated."""

    def __init__(
        self, reference: Reference, feeds: list[dict[str, Any]], kinds: list[StepKind], policy: Policy, console: Console
    ) -> None:
        super().__init__(name="reference")
        self._reference, self._feeds, self._kinds, self._console = reference, feeds, kinds, console
        self._policy = policy

    def activate_impl(self) -> None:
        first, rest = self._feeds[0], self._feeds[1:]
        tokens = np.array([feed["token_ids"][:, 0] for feed in rest], np.int64).reshape(
            len(rest), len(first["lengths"])
        )
        with self._console.progress("reference (eager PyTorch)") as progress:
            self._outputs = iter(
                self._reference.run(
                    first["token_ids"],
                    first["lengths"],
                    tokens,
                    self._kinds,
                    lambda done, total: progress("reference (eager PyTorch)", done, total),
                    self._policy,
                )
            )

    def deactivate_impl(self) -> None:
        del self._outputs

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _input_metadata()

    def infer_impl(self, feed_dict: dict[str, Any]) -> OrderedDict[str, Any]:
        self.inference_time = 0.0  # all of it was spent when activated
        return OrderedDict(logits=next(self._outputs))
