"""What a server's model may be called, and that it is called so wherever its name stands."""

from __future__ import annotations

import string

import pytest
from lora_drop_runtime import Batch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.text import TextCodec
from lora_drop_serve.names import MOST_NAME_CHARACTERS, usable_name

from tests.support.serving import serving

BODY = {"prompt": [1], "max_tokens": 2, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "t1"}], "max_tokens": 2}


def test_requests_and_answers_have_the_name(bundle: Bundle) -> None:
    batch, name = Batch.open(bundle.root, slots=1, threads=1), "team/smollm2:int4"
    with serving(batch, TextCodec.open(bundle.root / "tokenizer"), model_name=name) as served:
        (model,) = served.http.get("/v1/models").json()["data"]
        assert model["id"] == served.http.get(f"/v1/models/{name}").json()["id"] == name
        for path, body in (("/v1/completions", BODY), ("/v1/chat/completions", CHAT)):
            for asked in ({}, {"model": None}, {"model": name}):
                assert served.http.post(path, json=body | asked).json()["model"] == name
            streamed = served.http.post(path, json=body | {"model": name, "stream": True}).text
            assert streamed.count('"id":') == streamed.count(f'"model":"{name}"') > 0
            for other in (bundle.manifest.model.name, name.upper(), "team", ""):
                refused = served.http.post(path, json=body | {"model": other})
                assert refused.status_code == 404
                assert (refused.json()["error"]["param"], refused.json()["error"]["code"]) == (
                    "model",
                    "model_not_found",
                )
        assert served.http.get(f"/v1/models/{bundle.manifest.model.name}").status_code == 404


@pytest.mark.parametrize("name", ["a", "0", "SmolLM2-135M-Instruct.Q4_1", "a/b/c", "a:b@c", "x" * MOST_NAME_CHARACTERS])
def test_names_that_are_taken(name: str) -> None:
    assert usable_name(name, "--model-name") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "a b",
        "a/",
        "/a",
        "a//b",
        "a/../b",
        ".",
        "-a",
        "é",
        "１",
        "a\n",
        "\ud800",
        "x" * (MOST_NAME_CHARACTERS + 1),
    ],
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="cannot have such a name") as refused:
        usable_name(name, "--model-name")
    assert "--model-name is" in str(refused.value)
    assert "Hint: " in str(refused.value)


def test_characters_that_are_taken_need_no_escape_in_a_path() -> None:
    """RFC 3986, 3.3: pchar and the slash."""
    allowed = string.ascii_letters + string.digits + "-._~" + "!$&'()*+,;=" + ":@" + "/"
    for character in map(chr, range(0x180)):
        try:
            usable_name(f"a{character}b", "--model-name")
        except InputError:
            continue
        assert character in allowed


def test_without_a_name_it_is_the_bundles() -> None:
    assert usable_name(None, "--model-name") is None
