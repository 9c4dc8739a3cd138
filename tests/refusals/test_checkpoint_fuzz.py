"""Damaged checkpoints, adapters and drop lists, drawn by hypothesis: refused as everything else is, or exported.

What is mocked is the trace alone: one that would begin means that all checks were passed. The model is built and run on
shapes where its config or weights are damaged, since that, too, comes before.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_tools.cli import main as tools
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.cli import main
from tests.support.bundles import save_adapters
from tests.support.models import build

MESSAGE = re.compile(r"^error: .+\nNote: .+\nHint: .+\n\Z", re.MULTILINE)
HIDDEN = 16
TINY = {"num_hidden_layers": 2, "hidden_size": HIDDEN, "intermediate_size": 24, "vocab_size": 32,
        "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
seen: collections.Counter[str] = collections.Counter()


class ChecksPassed(Exception):
    """The trace would begin."""


def fuzz(cases: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=cases,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """`model` with a tokenizer, `bin` of pickled weights, `sharded` with an index, `adapters`, `drops.json`, a GGUF."""
    place = tmp_path_factory.mktemp("whole")
    model = build(LlamaForCausalLM, LlamaConfig, seed=3, **TINY, tie_word_embeddings=False)
    model.save_pretrained(place / "model")
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(TINY["vocab_size"])}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1", chat_template=TEMPLATE)
    fast.save_pretrained(place / "model")
    (place / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "pad_token_id": 0}))
    (place / "model" / "special_tokens_map.json").write_text(json.dumps({"eos_token": "t1"}))
    (place / "model" / "added_tokens.json").write_text(json.dumps({"<more>": 31}))
    shutil.copytree(place / "model", place / "bin")
    torch.save(load_file(place / "bin" / "model.safetensors"), place / "bin" / "pytorch_model.bin")
    (place / "bin" / "model.safetensors").unlink()
    shutil.copytree(place / "model", place / "sharded")
    tensors = load_file(place / "sharded" / "model.safetensors")
    (place / "sharded" / "model.safetensors").unlink()
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in shards if shards[name] == shard}, place / "sharded" / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (place / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    fingerprint = open_checkpoint(str(place / "model"), place / "scratch").fingerprint()
    plan = DropPlan(2, (1,), rank=2, always_first=0, always_last=0)
    save_adapters(place / "adapters", plan, HIDDEN, fingerprint, rank=2)
    drops = {"drop_layers": [1], "fingerprint": fingerprint, "base_errors": {"residual": {"1": 0.5}}}
    (place / "drops.json").write_text(json.dumps(drops))
    (place / "text").write_text(" ".join(f"t{i % 32}" for i in range(300)))
    _write_gguf(place / "tiny.gguf")
    return place


def _write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32}
    heads = {"attention.head_count": 2, "attention.head_count_kv": 2, "rope.dimension_count": 16, "vocab_size": 32}
    for key, value in (sizes | heads).items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    values = np.random.default_rng(1).standard_normal((32, 32)).astype(np.float32)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"blk.0.{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, values[0])
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ── what is drawn ──────────────────────────────────────────────────────────────────────────────────────────────

ODD = st.one_of(
    st.sampled_from(
        [None, True, False, 0, 1, -1, 2, 3, 7, 10**9, -(10**9), 2**63, 10**30, 0.5, -1.5, 1e300, float("nan")]
    ),
    st.sampled_from([float("inf"), "", "abc", "1", "../x", "\x00", "\ud800", "n" * 300, "{{", [], {}, [[]], [None]]),
    st.sampled_from([{"": None}, [1, "2"], {"a": {"b": [1]}}, "float16", "llama", "LlamaForCausalLM", [1] * 9]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _changed(data: Any, path: tuple[Any, ...], odd: Any, remove: bool) -> Any:
    if not path:
        return odd
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = odd
    return data


@st.composite
def damaged_json(draw: Any, text: bytes, keys: tuple[str, ...] = ()) -> bytes:
    """JSON in which one to three values are odd, missing, or new under one of `keys`."""
    data = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        if keys and isinstance(data, dict) and draw(st.booleans()):
            data[draw(st.sampled_from(keys))] = copy.deepcopy(draw(ODD))
        else:
            paths = list(_places(data))
            shallow = [path for path in paths if len(path) <= 1]
            path = draw(st.sampled_from(shallow if draw(st.booleans()) else paths))
            data = _changed(data, path, copy.deepcopy(draw(ODD)), draw(st.booleans()))
    return json.dumps(data).encode()


@st.composite
def damaged_bytes(draw: Any, data: bytes, within: int = 1 << 30) -> bytes:
    """Cut off, overwritten, or something else altogether; damage begins in the first `within` bytes."""
    how = draw(st.sampled_from(["cut", "flip", "insert", "other", "zeros"]))
    at = draw(st.integers(0, max(0, min(len(data), within) - 1)))
    if how == "cut":
        return data[:at]
    if how == "flip":
        changed = bytearray(data)
        for _ in range(draw(st.integers(1, 8))):
            if changed:
                changed[draw(st.integers(0, min(len(changed), within) - 1))] = draw(st.integers(0, 255))
        return bytes(changed)
    if how == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=40)) + data[at:]
    if how == "zeros":
        return data[:at] + bytes(len(data) - at)
    return draw(st.sampled_from([b"", b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b'"x"', b"1e999", b"\x80\x04N."]))


@st.composite
def damaged_header(draw: Any, data: bytes) -> bytes:
    """A safetensors file whose header is JSON of other values, its length right or wrong."""
    size = int.from_bytes(data[:8], "little")
    header = draw(damaged_json(data[8 : 8 + size], ("__metadata__", "x", "model.norm.weight")))
    announced = draw(st.sampled_from([len(header), size, 0, len(header) - 1, 2**63, 2**64 - 1]) | st.just(len(header)))
    return max(0, announced).to_bytes(8, "little") + header + data[8 + size :]


# ── how it is judged ───────────────────────────────────────────────────────────────────────────────────────────


def run(arguments: list[str], mocked: str, out: Path, command: Callable[[list[str]], int] = main) -> None:
    """A command that ends with 2 and the three parts of an error, or with the trace; nothing is left in either case."""
    printed = io.StringIO()
    with (
        mock.patch(mocked, side_effect=ChecksPassed),
        contextlib.redirect_stderr(printed),
        contextlib.redirect_stdout(printed),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            code: int | str = command(arguments)
        except ChecksPassed:
            code = "passed"
    text = printed.getvalue()
    assert "Traceback" not in text
    assert code in (2, "passed"), text
    if code == 2:
        assert MESSAGE.search(text), text
    seen[str(code)] += 1
    assert sorted(path.name for path in out.parent.iterdir() if path.name not in ("case", "files")) == []


def check(whole: Path, source: str, file: str | None, content: bytes | None, mocked: str) -> None:
    """Export a copy of a checkpoint in which one file has other content; None is a directory of its name."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        case = place / "case"
        shutil.copytree(whole / source, case, copy_function=os.link)  # no command writes there
        if file is not None:
            (case / file).unlink(missing_ok=True)
            if content is None:
                (case / file).mkdir()
            else:
                (case / file).write_bytes(content)
        run(["--model", str(case), "--out", str(place / "out"), *OPTIONS], mocked, place / "out")


OPTIONS = ("--drop-layers", "1", "--always-first", "0", "--always-last", "0", "--threads", "1")
TRACE = "lora_drop_export.compiler.export.trace"
EXPORTED = "lora_drop_export.decoder.trace._export"  # the model has been built and run on shapes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "generation_config.json", "chat_template.jinja")  # fmt: skip
LOADED = "lora_drop_tools.teacher_forcing.forcing.TeacherForcing.__init__"  # the tools have the model in memory
SHORT = ("--window", "16", "--tokens", "64", "--sensitivity-tokens", "32", "--always-first", "0", "--always-last", "0")
KEYS = ("auto_map", "rope_parameters", "rope_scaling", "head_dim", "sliding_window", "layer_types", "torch_dtype",
        "quantization_config", "text_config", "num_experts", "eos_token_id", "chat_template", "tokenizer_class",
        "model_max_length", "added_tokens_decoder", "extra_special_tokens", "bos_token", "transformers_version",
        "attn_implementation", "base_model_tp_plan", "id2label", "is_encoder_decoder", "backend")  # fmt: skip


@fuzz(120)
@given(data=st.data())
def test_config(whole, data):
    text = (whole / "model" / "config.json").read_bytes()
    content = data.draw(damaged_json(text, KEYS) | damaged_json(text, KEYS) | damaged_bytes(text))
    check(whole, "model", "config.json", content, EXPORTED)


@fuzz(150)
@given(data=st.data())
def test_tokenizer_files(whole, data):
    name = data.draw(st.sampled_from(TOKENIZER_FILES))
    text = (whole / "model" / name).read_bytes()
    damaged = [damaged_bytes(text), st.none()]
    if name.endswith("json"):
        damaged += [damaged_json(text, KEYS)] * 3
    check(whole, "model", name, data.draw(st.one_of(damaged)), TRACE)


@fuzz(60)
@given(data=st.data())
def test_tools(whole, data):
    """`lora-drop profile` on the same: it loads the whole model."""
    name = data.draw(st.sampled_from(["config.json", "tokenizer_config.json", "tokenizer.json"]))
    content = data.draw(damaged_json((whole / "model" / name).read_bytes(), KEYS))
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        shutil.copytree(whole / "model", place / "case")
        (place / "case" / name).write_bytes(content)
        arguments = ["profile", str(place / "case"), "--text", str(whole / "text"), "--out", str(place / "out")]
        run([*arguments, *SHORT], LOADED, place / "out", tools)


@fuzz(120)
@given(data=st.data())
def test_safetensors(whole, data):
    content = (whole / "model" / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    damaged = data.draw(damaged_header(content) | damaged_bytes(content, header) | st.none())
    check(whole, "model", "model.safetensors", damaged, EXPORTED)


@fuzz(80)
@given(data=st.data())
def test_index(whole, data):
    name = "model.safetensors.index.json"
    text = (whole / "sharded" / name).read_bytes()
    check(whole, "sharded", name, data.draw(damaged_json(text) | damaged_bytes(text) | st.none()), TRACE)


@fuzz(40)
@given(data=st.data())
def test_pickled_weights(whole, data):
    content = (whole / "bin" / "pytorch_model.bin").read_bytes()
    check(whole, "bin", "pytorch_model.bin", data.draw(damaged_bytes(content) | st.none()), TRACE)


@fuzz(60)
@given(data=st.data())
def test_gguf(whole, data):
    content = (whole / "tiny.gguf").read_bytes()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "files").mkdir()
        (place / "files" / "tiny.gguf").write_bytes(data.draw(damaged_bytes(content, 1500)))
        options = ("--drop-ratio", "0", "--always-first", "0", "--always-last", "0")
        model = str(place / "files" / "tiny.gguf")
        run(["--model", model, "--out", str(place / "out"), *options], TRACE, place / "out")


@fuzz(80)
@given(data=st.data())
def test_adapters(whole, data):
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    content = (whole / "adapters" / name).read_bytes()
    keys = ("use_rslora", "alpha_pattern", "peft_type", "lora_alpha", "r", "lora_drop")
    json_or_header = damaged_json(content, keys) if name.endswith("json") else damaged_header(content)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        shutil.copytree(whole / "adapters", place / "files")
        (place / "files" / name).write_bytes(data.draw(json_or_header | damaged_bytes(content)))
        options = ("--adapters", str(place / "files"), "--always-first", "0", "--always-last", "0")
        run(["--model", str(whole / "model"), "--out", str(place / "out"), *options], TRACE, place / "out")


@fuzz(100)
@given(data=st.data())
def test_drop_list(whole, data):
    text = (whole / "drops.json").read_bytes()
    keys = ("drop_layers", "fingerprint", "base_errors", "always_first")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "files").mkdir()
        (place / "files" / "drops.json").write_bytes(data.draw(damaged_json(text, keys) | damaged_bytes(text)))
        options = ("--drop-list", str(place / "files" / "drops.json"), "--always-first", "0", "--always-last", "0")
        run(["--model", str(whole / "model"), "--out", str(place / "out"), *options], TRACE, place / "out")


def test_whole_ones_pass(whole, tmp_path):
    """What is damaged above is refused for its damage."""
    for source, mocked in (("model", EXPORTED), ("sharded", EXPORTED), ("bin", TRACE)):
        seen.clear()
        check(whole, source, None, None, mocked)
        assert seen == {"passed": 1}, source
    options = ("--always-first", "0", "--always-last", "0", "--out", str(tmp_path / "out"))
    for named in (
        ("--model", str(whole / "tiny.gguf"), "--drop-ratio", "0"),
        ("--model", str(whole / "model"), "--adapters", str(whole / "adapters")),
        ("--model", str(whole / "model"), "--drop-list", str(whole / "drops.json")),
    ):
        seen.clear()
        run([*named, *options], TRACE, tmp_path / "out")
        assert seen == {"passed": 1}, named
    seen.clear()
    arguments = ["profile", str(whole / "model"), "--text", str(whole / "text"), "--out", str(tmp_path / "out")]
    run([*arguments, *SHORT], LOADED, tmp_path / "out", tools)
    assert seen == {"passed": 1}
