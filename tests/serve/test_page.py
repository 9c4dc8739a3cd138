"""The page at `/`, in headless Chromium: it talks to the model, and shows which step made which token."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from lora_drop_runtime import Batch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.text import TextCodec

from tests.serve.test_client import alone, words
from tests.support.bundles import record_again
from tests.support.chromium import CHROMIUM, open_page
from tests.support.serving import TEMPLATE, Served, serving, word_tokenizer


def test_the_page_needs_nothing_from_elsewhere(served: Served) -> None:
    answer = served.http.get("/")
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert not re.search(r"https?://|src=|@import|url\(", answer.text)
    assert not re.search(r"""["'`]/""", answer.text)  # paths are relative: it may stand below a prefix


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_chat_on_the_page(served: Served, bundle: Bundle, tmp_path: Path) -> None:
    prompt, k = [3, 14, 15, 92], bundle.manifest.plan.k
    with open_page(tmp_path / "profile") as page:
        page.open(served.address)
        page.await_that("at('k').textContent.includes('server')")
        assert page.run("at('k').textContent").startswith(f"{k},")
        for number, switch in enumerate(("own", "full"), 1):
            page.run(f"at('{switch}').click(), at('tokens').value = 9, at('text').value = 't3 t14 t15 t92'")
            page.run("at('go').click()")
            page.await_that(f"document.querySelectorAll('footer').length === {number} && !running")
            page.run("messages = []")  # the next turn is a first one, too
            spans = "[...document.querySelectorAll('article:last-child span')]"
            text = words(alone(bundle, prompt, 9, k=k if switch == "own" else 0))
            assert page.run(f"{spans}.map(s => s.textContent).join('')") == text
            kinds = page.run(f"{spans}.map(s => s.className)")
            window = k if switch == "own" else 0
            assert kinds == ["refresh" if step % (window + 1) == 0 else "lora" for step in range(9)]
        page.await_that("/tokens\\/s/.test(at('speed').textContent) && /MiB/.test(at('kv').textContent)")
        assert page.errors == []
        page.run("at('tokens').value = 100000, at('text').value = 't3'")
        page.run("at('go').click()")
        page.await_that("document.querySelector('.error')")
        assert "100000" in page.run("document.querySelector('.error').textContent")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_chat_that_is_cleared_in_the_midst_of_a_reply_is_forgotten(served: Served, tmp_path: Path) -> None:
    with open_page(tmp_path / "profile") as page:
        page.open(served.address)
        page.await_that("model")
        page.run("at('tokens').value = 40, at('text').value = 't3', at('go').click()")
        page.await_that("document.querySelector('article span')")
        page.run("at('clear').click()")
        page.await_that("!running")
        assert page.run("JSON.stringify(messages)") == "[]"
        assert page.run("at('log').textContent") == ""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_page_without_the_key_asks_for_no_metrics(bundle: Bundle, tmp_path: Path) -> None:
    batch, codec = Batch.open(bundle.root, slots=1, threads=1), TextCodec.open(bundle.root / "tokenizer")
    with serving(batch, codec, api_key="secret") as served, open_page(tmp_path / "profile") as page:
        page.open(served.address)
        page.await_that("!at('asks').hidden")
        page.run("showCaches()")
        assert 'lora_drop_requests_total{path="/metrics",status="401"}' not in served.metrics()
        page.run("at('key').value = 'secret', at('key').dispatchEvent(new Event('change'))")
        page.await_that("/MiB/.test(at('kv').textContent)")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_what_is_sent_while_no_server_answers_stays_on_the_page(served: Served, tmp_path: Path) -> None:
    with open_page(tmp_path / "profile") as page:
        page.open(served.address)
        page.await_that("model")
        page.run("model = null")  # as before a key
        page.run("fetch = () => Promise.reject(new TypeError('nobody there'))")
        page.run("send('t3')")
        said = page.run("[...document.querySelectorAll('article')].map(article => article.textContent)")
        assert said == ["t3", "", "nobody there"]
        assert page.run("at('go').textContent") == "Send"
        assert page.errors == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_proxys_own_error_is_shown_as_it_is(served: Served, tmp_path: Path) -> None:
    with open_page(tmp_path / "profile") as page:
        page.open(served.address)
        page.await_that("model")
        page.run("fetch = async () => new Response('too many requests wait', { status: 503 })")  # Ray's are plain text
        page.run("send('t3')")
        assert page.run("document.querySelector('.error').textContent") == "503: too many requests wait"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_reasoning_is_shown_paler(bundle: Bundle, tmp_path: Path) -> None:
    """Of a template that begins it; the tiny model's fourth token, renamed, ends it."""
    root = shutil.copytree(bundle.root, tmp_path / "b")
    word_tokenizer(root, TEMPLATE + "{% set ends = '</think>' %} <think>")
    file = root / "tokenizer" / "tokenizer.json"
    made = file.read_text(encoding="utf-8").replace('"t130"', '"<think>"')
    ends = words(alone(bundle, [3, 14, 130], 9)).split()[3]
    file.write_text(made.replace(f'"{ends}"', '"</think>"'), encoding="utf-8")
    record_again(root)
    batch, codec = Batch.open(root, slots=1, threads=1), TextCodec.open(root / "tokenizer")
    with serving(batch, codec) as served, open_page(tmp_path / "profile") as page:
        page.open(served.address)
        page.await_that("model")
        page.run("at('tokens').value = 9, at('text').value = 't3 t14', at('go').click()")
        page.await_that("document.querySelectorAll('footer').length === 1 && !running")
        spans = "[...document.querySelectorAll('article:last-child span')]"
        thoughts = page.run(f"{spans}.map(span => span.className.endsWith(' thought'))")
        assert thoughts == sorted(thoughts, reverse=True)
        assert set(thoughts) == {True, False}
        assert page.run("messages.length") == 2
        assert page.run("messages[1].reasoning_content.split(' ').length") == 3
        page.run("at('clear').click(), at('tokens').value = 2, at('text').value = 't3 t14', at('go').click()")
        page.await_that("document.querySelectorAll('footer').length === 1 && !running")
        assert page.run("messages.map(message => message.content)") == ["t3 t14", ""]
        assert page.errors == []
