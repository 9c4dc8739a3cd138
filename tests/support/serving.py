"""A server in a thread of this process, on a free port, and bundles that it can serve."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from lora_drop_runtime import Batch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.text import TextCodec
from lora_drop_serve.app import create_app
from lora_drop_serve.driver import Driver
from lora_drop_serve.server import address, listening, make_server

from tests.support.bundles import first_layers, make_bundle, record_again

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
WORDS = 131  # the vocabulary of the tiny models


def word_tokenizer(root: Path, template: str | None = TEMPLATE) -> None:
    """Give a bundle t0 … t130 as its tokens, so that text says which they are; and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{n}": n for n in range(WORDS)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (root / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(root / "tokenizer/tokenizer.json"))
    if template is not None:
        (root / "tokenizer/chat_template.jinja").write_text(template)
    record_again(root)


def word_bundle(root: Path, template: str | None = TEMPLATE, **options: Any) -> Bundle:
    """A tiny bundle in float32, of four layers, whose text says its tokens."""
    made = make_bundle(first_layers("llama", 4), root, **{"max_batch": 8, "always_first": 1, **options})
    word_tokenizer(made.root, template)
    return Bundle.open(root)


@dataclass
class Served:
    """A server that runs; `http` asks it, below its address."""

    address: str
    driver: Driver
    codec: TextCodec
    server: uvicorn.Server
    http: httpx.Client

    def metrics(self) -> dict[str, float]:
        """Name, with its labels → value."""
        lines = self.http.get("/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def await_rows(self, count: int) -> None:
        """Wait until so many rows run or wait in the batch, and no answer beside theirs is open."""
        await_that(lambda: self.driver._batch.rows == count and self.driver.open_rows == count)


def await_that(condition: Callable[[], bool]) -> None:
    """Wait as long as it takes: a test that hangs ends by pytest's own limit."""
    while not condition():
        time.sleep(0.005)


@contextlib.contextmanager
def serving(
    batch: Batch, codec: TextCodec, *, max_waiting: int = 64, grace: float = 600.0, **options: Any
) -> Iterator[Served]:
    """Serve a batch, which is closed at the end; `options` are those of `create_app`."""
    driver = Driver(batch, max_waiting)
    with listening("127.0.0.1", 0) as made:
        where = address(made)
        server = make_server(create_app(driver, codec, **options), driver, grace)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [made]})
        thread.start()
        try:
            await_that(lambda: server.started or not thread.is_alive())
            api_key = options.get("api_key")
            headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}".encode()}
            with httpx.Client(base_url=where, headers=headers, timeout=None) as http:
                yield Served(where, driver, codec, server, http)
        finally:
            server.should_exit = True
            thread.join()
