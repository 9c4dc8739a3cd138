"""The application of app.py behind Ray Serve: replicas on one machine or many, each with one engine.

    serve run lora_drop_serve.ray_app:build bundle=engines/ slots=8 max_replicas=4

Enters: arguments, as text from the command line or as YAML has them. Leaves: an application of Ray Serve. Ray's proxies
spread requests over replicas and hold those for which none has a place; Ray starts and ends replicas by what is asked,
and replaces those that fail. Needs the extra `ray`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import click
from fastapi import FastAPI
from lora_drop_runtime import bounds
from lora_drop_runtime.bounds import Bounds
from lora_drop_runtime.decoding.batch import Batch
from lora_drop_runtime.decoding.checks import checked_cache_bytes, checked_slots, row_limits
from lora_drop_runtime.decoding.opening import check_opening
from lora_drop_runtime.errors import InputError, LoraDropError
from lora_drop_runtime.text import TextCodec
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve.metrics import Gauge

from .app import create_app
from .driver import Driver
from .key import usable_key
from .names import usable_name
from .requests import within

HEALTH_SECONDS = 2.0  # between two checks of a replica; Ray replaces it after the third that fails
_REPLICAS = Bounds(0, 10_000)
_OF_OPENING = {"k", "schedule", "policy", "draft", "lenience", "target", "provider", "threads"}  # a bundle
_GPU_PARTS = 10_000  # of a GPU, the smallest that Ray counts


class _Refused(click.ClickException):
    """Which `serve run` prints without a traceback."""

    exit_code = LoraDropError.exit_code


def _within(limits: Bounds, default: Any = None) -> Any:
    return Field(default, ge=limits.least, le=limits.most)


class Arguments(BaseModel):
    """What `build` takes. What is None is the bundle's.

    Attributes:
        bundle: its directory, at the same place on all nodes.
        slots: rows that run at once in a replica; 8 when None, or what the bundle allows.
        max_waiting: requests that wait at a proxy for a place in a replica; more are refused with 503.
        min_replicas, max_replicas: between which Ray starts and ends replicas, so that each has `slots` requests.
        grace: seconds that running requests may take when a replica is told to end.
        api_key: that clients have to send; the variable LORA_DROP_API_KEY's when None.
        model_name: what the model is called in requests and answers; the bundle's name for it when None.
        gpus: that a replica reserves, 1 when None if its engine runs on one.
        keep_prefixes: whether a prompt is not run again as far as another of the replica began alike.
        kv_cache_bytes: that the K/V of a replica's rows may take, where the target's caches are paged.
        max_seq_len, max_prompt_len, k, schedule, policy, draft, lenience, target, provider: as for `Batch.open`.
        threads: as there; a replica reserves as many CPUs, 1 when None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: Path
    slots: int | None = _within(bounds.BATCH)
    max_waiting: int = _within(Bounds(1, 2**20), 64)
    min_replicas: int = _within(_REPLICAS, 1)
    max_replicas: int = _within(_REPLICAS, 1)
    grace: float = _within(Bounds(0, 86400), 30.0)
    api_key: str | None = None
    model_name: str | None = None
    gpus: float | None = _within(Bounds(0, 64))
    max_seq_len: int | None = _within(bounds.TOKENS)
    max_prompt_len: int | None = _within(bounds.TOKENS)
    keep_prefixes: bool = True
    kv_cache_bytes: int | None = _within(Bounds(1, 2**50))
    k: Annotated[int, _within(bounds.K, ...)] | Literal["auto"] | None = None
    schedule: str | None = None
    policy: str | None = None
    draft: str | None = None
    lenience: Annotated[float, within(bounds.LENIENCE)] | None = None
    target: str | None = None
    provider: str | None = None
    threads: int | None = _within(bounds.THREADS)


def _arguments(given: dict[str, Any]) -> Arguments:
    """Raises InputError for the first thing that is wrong with them."""
    try:
        found = Arguments.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise InputError(
                f"There is no argument {name!r:.80}.",
                note=f"Known are {', '.join(Arguments.model_fields)}.",
                hint="Give them as NAME=VALUE.",
            ) from None
        value = "missing" if first["type"] == "missing" else "wrong" if name == "api_key" else repr(first["input"])[:80]
        raise InputError(
            f"The argument {name!r:.80} cannot be used.",
            note=f"It is {value}: {first['msg']}.",
            hint="docs/serving.md has a table of arguments.",
        ) from None
    if not max(found.min_replicas, 1) <= found.max_replicas:
        raise InputError(
            "There would be no replica that could answer.",
            note=f"min_replicas is {found.min_replicas}, max_replicas is {found.max_replicas}.",
            hint="Let max_replicas be 1 or more, and at least min_replicas.",
        )
    gpus = found.gpus or 0
    if gpus != (round(gpus) if gpus > 1 else round(gpus * _GPU_PARTS) / _GPU_PARTS):
        raise InputError(
            "Ray cannot reserve such a part of a GPU.",
            note=f"gpus is {gpus:g}; possible are whole numbers, and below 1 multiples of {1 / _GPU_PARTS:g}.",
            hint="Use for example gpus=0.5, where two replicas share a GPU.",
        )
    return found


class Replica:
    """What Ray asks of a replica beside its application, which `serve.ingress` adds as `app`."""

    app: FastAPI

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}

    async def check_health(self) -> None:
        """Raises ApiError: the engine has failed or is stuck, and Ray has to start another replica in its place.

        Ray's own metrics are told meanwhile what `/metrics` has: that is of one replica, whichever answers.
        """
        driver = self.app.state.driver
        for sample in driver.metrics.samples():
            if sample.name not in self._gauges:
                self._gauges[sample.name] = Gauge(sample.name, tag_keys=tuple(sample.labels))
            self._gauges[sample.name].set(sample.value, tags=dict(sample.labels))
        driver.check()


def _application(arguments: Arguments, slots: int, api_key: str | None) -> Callable[[], FastAPI]:
    """What a replica calls once, to open its engine."""

    def application() -> FastAPI:
        batch = Batch.open(
            arguments.bundle,
            slots=slots,
            max_seq_len=arguments.max_seq_len,
            max_prompt_len=arguments.max_prompt_len,
            keep_prefixes=arguments.keep_prefixes,
            kv_cache_bytes=arguments.kv_cache_bytes,
            **arguments.model_dump(include=_OF_OPENING),
        )
        codec = TextCodec.open(arguments.bundle / "tokenizer")
        # What Ray sends has a place, whatever waits before it
        driver = Driver(batch, max(slots, arguments.max_waiting))
        return create_app(
            driver, codec, api_key=api_key, model_name=arguments.model_name, tells_ids=False
        )  # Ray's proxies do

    return application


def _deployment(given: dict[str, Any]) -> serve.Application:
    arguments = _arguments(given)
    key = usable_key(arguments.api_key, "api_key")
    usable_name(arguments.model_name, "model_name")
    bundle, _, _ = check_opening(arguments.bundle.absolute(), **arguments.model_dump(include=_OF_OPENING))
    target = bundle.target(arguments.target)[1]
    on_gpu = target.on_device if arguments.provider is None else arguments.provider != "cpu"
    limits = bundle.manifest.limits
    row_limits(arguments.max_seq_len, arguments.max_prompt_len, limits)
    checked_cache_bytes(arguments.kv_cache_bytes, target.is_paged)
    slots = checked_slots(arguments.slots, limits)
    arguments = arguments.model_copy(update={"bundle": bundle.root})
    deployment = serve.deployment(
        name="LoraDrop",
        ray_actor_options={
            "num_cpus": arguments.threads or 1,
            "num_gpus": float(on_gpu) if arguments.gpus is None else arguments.gpus,
        },
        # As many again as have slots, so that a slot that comes free has its next row without asking a proxy
        max_ongoing_requests=2 * slots,
        max_queued_requests=arguments.max_waiting,
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": slots,
        },
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=arguments.grace,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return deployment(serve.ingress(_application(arguments, slots, key))(Replica)).bind()


def build(arguments: dict[str, Any]) -> serve.Application:
    """An application of Ray Serve, for `serve run` and for the `import_path` of `serve deploy`.

    Args:
        arguments: of `Arguments`, numbers also as text.

    Raises:
        click.ClickException: one is wrong, or there is no bundle that runs here. `serve run` prints it and ends.
    """
    try:
        return _deployment(arguments)
    except LoraDropError as error:
        raise _Refused(str(error)) from None
