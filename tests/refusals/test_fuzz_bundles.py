"""Damaged bundles, adapters and tokenizers: every command ends with 0, 1 or 2 and an error of ours, never a traceback.

The cases are drawn by hypothesis, the same ones in every run. Where nothing that is read was damaged, the result is
that of the whole bundle.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lora_drop_tools.cli
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lora_drop_runtime import LoraDropError, Session
from lora_drop_runtime.bundle.bundle import Bundle, record_file
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.text import TextCodec

from tests.support.bundles import heads_of, make_bundle, record_again, save_adapters
from tests.support.damage import TEXTS, VALUES, damaged_bytes, damaged_json, write
from tests.support.refused import LIMITS

MESSAGE = re.compile(r"\Aerror: [^\n]+\nNote: [^\n]+\nHint: [^\n]+\n\Z")
CHAT = [{"role": "system", "content": "t4"}, {"role": "user", "content": "t1 t2"}]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' and loop.index > 1 %}{{ bos_token }} t7 {% endif %}"
    "{{ m['content'] | trim ~ ' t3 ' }}{% endfor %}{% if add_generation_prompt %}{{ 't9' }}{% endif %}"
)


def cases(number: int) -> Callable[[Any], Any]:
    """So many, the same ones in every run; they are found small already, so nothing is shrunk."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of few layers with a chat template, to be damaged file by file and mended again."""
    root = tmp_path_factory.mktemp("fuzz") / "bundle"
    make_bundle(heads_of(16, 2), root, rank=4, drop_layers=(1,), always_first=1, **LIMITS)
    shutil.copytree(place / "bundle" / "tokenizer", root / "tokenizer", dirs_exist_ok=True)
    (root / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    record_again(root)
    return root


@pytest.fixture
def bundle(whole: Path) -> Iterator[Path]:
    """The same; what a test has damaged is whole again afterwards."""
    before = {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    yield whole
    for file, content in before.items():
        write(file, content)


def check_parts(error: LoraDropError) -> None:
    for part in (error.fact, error.note, error.hint):
        assert part
        assert "\n" not in part


class Runner:
    """Runs commands in this process, and looks at how they end."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str]:
        self._capsys.readouterr()
        code = lora_drop_tools.cli.main([str(argument) for argument in arguments])
        printed = self._capsys.readouterr()
        assert code in (0, 1, 2), printed.err
        assert "Traceback" not in printed.err
        if code:
            assert MESSAGE.match(printed.err), printed.err
        return code, printed.out

    def inspect(self, bundle: Path) -> int:
        return self("inspect", bundle)[0]

    def generate(self, bundle: Path, *options: str) -> tuple[int, str]:
        return self("generate", bundle, "--prompt", "t1 t2", "--max-new-tokens", "2", *options)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capsys)


def record(bundle: Path, name: str) -> None:
    """As if the bundle had been written with the file as it is: whoever damages it on purpose does so."""
    data = json.loads((bundle / MANIFEST_NAME).read_text())
    made = record_file(bundle / name)
    data["files"][name] = {"size_bytes": made.size_bytes, "sha256": made.sha256}
    write(bundle / MANIFEST_NAME, json.dumps(data).encode())


def test_manifests(bundle: Path, run: Runner) -> None:
    text = (bundle / MANIFEST_NAME).read_text()
    ends: dict[int, int] = {0: 0, 2: 0}

    @cases(300)
    @given(content=damaged_json(text))
    def inspected(content: bytes) -> None:
        write(bundle / MANIFEST_NAME, content)
        ends[run.inspect(bundle)] += 1

    @cases(50)
    @given(content=damaged_json(text))
    def generated(content: bytes) -> None:
        write(bundle / MANIFEST_NAME, content)
        run.generate(bundle)

    inspected()
    assert ends[2] > 150
    assert ends[0] > 25  # a name, a version, another k: such a bundle is one
    generated()


@pytest.mark.parametrize("section", ["model", "plan", "limits", "special_tokens", "targets"])
def test_every_value_of_a_manifest(bundle: Path, run: Runner, section: str) -> None:
    """Not only where chance leads."""
    whole = json.loads((bundle / MANIFEST_NAME).read_text())
    for key in whole[section]:
        for value in (None, "x", True, -1, 0.5, 2**63, float("nan"), [], {}, [[]], "../x", _ABSENT):
            data = json.loads(json.dumps(whole))
            data[section][key] = value
            if value is _ABSENT:
                del data[section][key]
            write(bundle / MANIFEST_NAME, json.dumps(data).encode())
            run.inspect(bundle)


_ABSENT = object()


def test_graphs(bundle: Path, run: Runner) -> None:
    """Changed since they were recorded, or recorded as they are."""
    wanted = run.generate(bundle)
    files = {name: (bundle / name).read_bytes() for name in ("ort/steps.onnx", "refresh.onnx", "lora.onnx")}
    manifest = (bundle / MANIFEST_NAME).read_bytes()

    @cases(60)
    @given(data=st.data(), name=st.sampled_from(list(files)), recorded=st.booleans())
    def damaged(data: Any, name: str, recorded: bool) -> None:
        write(bundle / name, data.draw(damaged_bytes(files[name])))
        try:
            if recorded:
                record(bundle, name)
            code, text = run.generate(bundle)
            if name != "ort/steps.onnx" or not recorded:
                assert code == 2 or (code, text) == wanted
        finally:
            write(bundle / name, files[name])
            write(bundle / MANIFEST_NAME, manifest)

    damaged()


def test_headers_of_weights(bundle: Path, run: Runner) -> None:
    """Nothing of them is read to decode, and all of them to be checked."""
    wanted = run.generate(bundle)
    files = {
        name: (bundle / name).read_bytes() for name in ("weights/model.safetensors", "weights/adapters.safetensors")
    }

    @cases(80)
    @given(data=st.data(), name=st.sampled_from(list(files)))
    def damaged(data: Any, name: str) -> None:
        length = 8 + int.from_bytes(files[name][:8], "little")
        content = data.draw(damaged_bytes(files[name], most=length))
        write(bundle / name, content)
        try:
            code, _ = run("inspect", bundle, "--check")
            assert (code == 0) == (content == files[name])
        finally:
            write(bundle / name, files[name])

    @cases(15)
    @given(data=st.data(), name=st.sampled_from(list(files)))
    def decoded(data: Any, name: str) -> None:
        length = 8 + int.from_bytes(files[name][:8], "little")
        write(bundle / name, data.draw(damaged_bytes(files[name], most=length)))
        try:
            code, text = run.generate(bundle)
            assert code == 2 or (code, text) == wanted
        finally:
            write(bundle / name, files[name])

    damaged()
    decoded()


def test_tokenizers(bundle: Path, run: Runner) -> None:
    """Their files may hold anything; text comes out of them, or an error of ours."""
    folder = bundle / "tokenizer"
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    config = json.loads(files["tokenizer_config.json"]) | {"chat_template": TEMPLATE, "bos_token": {"content": "t5"}}
    files["tokenizer_config.json"] = json.dumps(config).encode()

    @st.composite
    def contents(draw: Callable[..., Any]) -> tuple[str, bytes]:
        name = draw(st.sampled_from(["tokenizer.json"] * 2 + ["tokenizer_config.json"] * 2 + ["chat_template.jinja"]))
        structured = name.endswith("json") and draw(st.integers(0, 3))
        return name, draw(damaged_json(files[name].decode()) if structured else damaged_bytes(files[name]))

    def codec() -> None:
        opened = TextCodec.open(folder)
        opened.decode(opened.encode("t1 t2"))
        opened.decode(opened.encode_chat(CHAT))
        stream = opened.stream(["t9"])
        assert isinstance(stream.push(1) + stream.push(2) + stream.finish(), str)

    def damage(name: str, content: bytes) -> None:
        if name == "tokenizer_config.json":
            (folder / "chat_template.jinja").unlink(missing_ok=True)  # or it would be in the way of the configuration's
        write(folder / name, content)

    def mend() -> None:
        for name, content in files.items():
            write(folder / name, content)

    @cases(200)
    @given(content=contents())
    def opened(content: tuple[str, bytes]) -> None:
        damage(*content)
        try:
            codec()
        except LoraDropError as error:
            check_parts(error)
        finally:
            mend()

    @cases(20)
    @given(content=contents())
    def generated(content: tuple[str, bytes]) -> None:
        damage(*content)
        try:
            record_again(bundle)
            run.generate(bundle, "--chat")
        finally:
            mend()

    opened()
    generated()


WORDS = """{{ }} {% %} for in if endfor endif set endset macro endmacro ( ) [ ] | . messages m range content 'x' 9999999
* ** % + ~ - == join center tojson replace format namespace raise_exception loop items {# #} , = : is not"""
OPTIONS = """--max-new-tokens --k --temperature --top-k --top-p --repetition-penalty --seed --stop --target --provider
--min-p --presence-penalty --frequency-penalty --threads --policy --prompt-file --prompt"""


def test_templates(bundle: Path) -> None:
    """Of words that templates are made of, in any order."""
    folder = bundle / "tokenizer"

    @cases(150)
    @given(words=st.lists(st.sampled_from(WORDS.split()), min_size=1, max_size=24), inside=st.booleans())
    def rendered(words: list[str], inside: bool) -> None:
        write(folder / "chat_template.jinja", ("{{ %s }}" if inside else "%s").replace("%s", " ".join(words)).encode())
        try:
            TextCodec.open(folder).encode_chat(CHAT)
        except LoraDropError as error:
            check_parts(error)

    rendered()


def test_adapters(bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    directory = save_adapters(
        tmp_path / "adapters", manifest.plan, manifest.model.hidden_size, manifest.model.fingerprint
    )
    files = {file.name: file.read_bytes() for file in directory.iterdir()}
    config, tensors = files["adapter_config.json"].decode(), files["adapter_model.safetensors"]
    length = 8 + int.from_bytes(tensors[:8], "little")
    header = tensors[8:length].decode()

    @st.composite
    def contents(draw: Callable[..., Any]) -> tuple[str, bytes]:
        how = draw(st.sampled_from(["config", "header", "bytes", "values"]))
        if how == "config":
            return "adapter_config.json", draw(damaged_json(config))
        if how == "header":
            damaged = draw(damaged_json(header))
            return "adapter_model.safetensors", len(damaged).to_bytes(8, "little") + damaged + tensors[length:]
        if how == "bytes":
            return "adapter_model.safetensors", draw(damaged_bytes(tensors, most=length))
        values = np.frombuffer(tensors[length:], "<f4").copy()
        values[draw(st.integers(0, len(values) - 1))] = draw(st.sampled_from([np.nan, np.inf, -np.inf, 3e38, 0]))
        return "adapter_model.safetensors", tensors[:length] + values.tobytes()

    with Session.open(bundle) as session:

        @cases(150)
        @given(content=contents())
        def loaded(content: tuple[str, bytes]) -> None:
            write(directory / content[0], content[1])
            try:
                session.load_adapters(directory)
            except LoraDropError as error:
                check_parts(error)
            finally:
                for name, whole in files.items():
                    write(directory / name, whole)

        loaded()
        session.load_adapters(directory)
        assert session.generate([1, 2], 3)[0].size == 3


def test_arguments(bundle: Path, run: Runner) -> None:
    """Values of options that are no values, texts that are none."""

    @cases(80)
    @given(option=st.sampled_from(OPTIONS.split()), value=st.one_of(VALUES.map(str), st.sampled_from(TEXTS)))
    def asked(option: str, value: str) -> None:
        run("generate", bundle, "--prompt", "t1", "--max-new-tokens", "1", f"{option}={value}")

    asked()
