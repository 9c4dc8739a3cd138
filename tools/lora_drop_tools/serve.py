"""`lora-drop serve`: a bundle behind OpenAI's API.

Enters: a bundle and settings. Leaves: answers, until a signal comes. The server itself is lora_drop_serve.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_drop_runtime import bounds
from lora_drop_runtime.bounds import Bounds
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.command_line import check_known, check_options, option, tell
from lora_drop_runtime.decoding.batch import Batch
from lora_drop_runtime.decoding.checks import SLOTS
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.schedule import SCHEDULES
from lora_drop_runtime.text import TextCodec
from lora_drop_serve.key import KEY_VARIABLE, usable_key
from lora_drop_serve.names import usable_name

from lora_drop_tools.shared.bundles import check_session
from lora_drop_tools.shared.options import (
    draft_option,
    lenience_option,
    policy_option,
    provider_option,
    refuse_idle_drafts,
    schedule_option,
    target_option,
    threads_option,
)

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")  # of the extra `serve`, by import name


@dataclass(frozen=True)
class ServeSettings:
    """How a bundle is served. What is None is the bundle's.

    Attributes:
        host, port: where to listen; port 0 is a free one.
        api_key: that clients have to send; the variable LORA_DROP_API_KEY's when None.
        model_name: what the model is called in requests and answers.
        slots: rows that run at once; 8 when None, or what the bundle allows.
        max_waiting: rows that wait for a slot; beyond them requests are refused with 429.
        kv_cache_bytes: that the K/V of all rows may take, where the target's caches are paged.
        drain_delay: seconds before the grace, in which /ready already says 503 and new requests are served.
        grace: seconds that running requests may take when the server is told to end.
        log_requests: a line of JSON on standard error at each request's end.
        max_seq_len, max_prompt_len, keep_prefixes: as for `Batch.open`.
        k, schedule, policy, draft, lenience: of requests that do not say their own.
        target, provider, threads: as for `Batch.open`.
    """

    host: str = option("127.0.0.1", metavar="ADDRESS", help="listen there (default 127.0.0.1: this machine alone)")
    port: int = option(
        8000, metavar="N", bounds=Bounds(0, 65535), help="listen on this port; 0 takes a free one (default 8000)"
    )
    api_key: str | None = option(
        None, metavar="KEY", help=f"refuse requests without this key (default: the variable {KEY_VARIABLE})"
    )
    model_name: str | None = option(
        None, metavar="NAME", help="call the model so in requests and answers (default: the bundle's name for it)"
    )
    slots: int | None = option(
        None, metavar="N", bounds=bounds.BATCH, help=f"run N rows at once (default {SLOTS}, or what the bundle allows)"
    )
    max_waiting: int = option(
        64, metavar="N", bounds=Bounds(0, 2**20), help="let N rows wait for a slot, and refuse more (default 64)"
    )
    kv_cache_bytes: int | None = option(
        None,
        metavar="N",
        bounds=Bounds(1, 2**50),
        help="let the K/V of all rows take N bytes; rows wait for room (target openvino; default: as all slots)",
    )
    drain_delay: float = option(
        0.0,
        metavar="S",
        bounds=Bounds(0, 86400),
        help="serve new requests for S seconds after the signal that ends it, while /ready says 503 (default 0)",
    )
    grace: float = option(
        30.0, metavar="S", bounds=Bounds(0, 86400), help="let what runs take S seconds at the end (default 30)"
    )
    log_requests: bool = option(False, help="write a line of JSON on standard error at each request's end")
    max_seq_len: int | None = option(
        None, metavar="N", bounds=bounds.TOKENS, help="give each row room for N tokens (default: the bundle's)"
    )
    max_prompt_len: int | None = option(
        None, metavar="N", bounds=bounds.TOKENS, help="take prompts of N tokens (default: the bundle's)"
    )
    keep_prefixes: bool = option(
        True, flag="--no-prefixes", help="run each prompt from its first token, though others began alike"
    )
    k: int | Literal["auto"] | None = option(
        None, bounds=bounds.K, help="put so many LoRA steps between refreshes where requests do not say"
    )
    schedule: str | None = schedule_option()
    policy: str | None = policy_option()
    draft: str | None = draft_option()
    lenience: float | None = lenience_option()
    target: str | None = target_option()
    provider: str | None = provider_option()
    threads: int | None = threads_option()

    def __post_init__(self) -> None:
        check_options(self)
        check_known("schedule", self.schedule, SCHEDULES, "--schedule")
        refuse_idle_drafts(self, self.policy)
        usable_key(self.api_key, "--api-key")
        usable_name(self.model_name, "--model-name")

    @property
    def key(self) -> str | None:
        """What clients have to send; None lets everybody in."""
        return usable_key(self.api_key, "--api-key")

    def open(self, bundle: Bundle) -> Batch:
        """A batch of the bundle with these slots and defaults.

        Raises:
            InputError, BundleError: what cannot be opened so.
        """
        target, entry = bundle.target(self.target)
        if self.kv_cache_bytes is not None and not entry.is_paged:
            raise InputError(
                "--kv-cache-bytes is for targets that take K/V caches by pages.",
                note=f"It is {self.kv_cache_bytes}; the target {target} reserves the caches of all slots at the start.",
                hint="Leave it out, and bound the caches by --slots and --max-seq-len, or use --target openvino.",
            )
        batch = Batch.open(
            bundle.root,
            slots=self.slots,
            max_seq_len=self.max_seq_len,
            max_prompt_len=self.max_prompt_len,
            keep_prefixes=self.keep_prefixes,
            kv_cache_bytes=self.kv_cache_bytes,
            k=self.k,
            schedule=self.schedule,
            policy=self.policy,
            draft=self.draft,
            lenience=self.lenience,
            target=self.target,
            provider=self.provider,
            threads=self.threads,
        )
        if self.kv_cache_bytes is not None and batch.row_bytes > self.kv_cache_bytes:
            note = f"It is {self.kv_cache_bytes}; a row of {batch.max_seq_len} tokens may take {batch.row_bytes}."
            batch.close()
            raise InputError(
                "--kv-cache-bytes has no room for one whole row.",
                note=note,
                hint="Give more, or rows room for fewer tokens by --max-seq-len.",
            )
        return batch


def _check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            "The server's packages are not installed.",
            note=f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing.",
            hint="pip install 'lora-drop-export[serve]'",
        )


def serve(bundle: str | Path, settings: ServeSettings) -> None:
    """Serve a bundle until SIGTERM or Ctrl-C; then what runs may end, and the function returns.

    Raises:
        InputError, BundleError: what cannot be served, or an address that cannot be had.
    """
    _check_packages()
    from lora_drop_serve.app import create_app
    from lora_drop_serve.driver import Driver
    from lora_drop_serve.server import address, is_local, listening, make_server

    opened = Bundle.open(bundle)
    check_session(opened, settings.target, settings.provider, settings.threads, [settings.policy])
    codec = TextCodec.open(opened.root / "tokenizer")
    with listening(settings.host, settings.port) as made:
        if settings.key is None and not is_local(made):
            tell(f"warning: {settings.host} may be reached by other machines, and there is no --api-key")
        driver = Driver(settings.open(opened), settings.max_waiting)
        where = address(made)
        tell(
            f"serving {settings.model_name or opened.manifest.model.name} at {where} (API: {where}/v1, Ctrl-C ends)",
            sys.stdout,
        )
        app = create_app(
            driver,
            codec,
            api_key=settings.key,
            model_name=settings.model_name,
            log_requests=settings.log_requests,
        )
        make_server(app, driver, settings.grace, settings.drain_delay).run(sockets=[made])
