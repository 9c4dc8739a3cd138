"""Weights of the graphs: they are in the bundle once, whatever the checkpoint stores."""

from __future__ import annotations

import filecmp
import itertools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.decoding.session import Session
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_drop_export.decoder.loaded import load_model
from tests.support.bundles import family, make_bundle
from tests.support.models import SIZES
from tests.support.stored_weights import GRAPHS, PLAN, export, external, inline_bytes, save, short, stored_bytes, tokens

pytestmark = pytest.mark.usefixtures("traced")

# ── in the graphs ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "rank"), [("llama", 0), ("llama", 3), ("llama_tied", 3)])
def test_graphs_share_one_copy(tmp_path, name, rank):
    bundle = make_bundle(name, tmp_path / "b", rank=rank, drop_layers=(3, 5))
    tensors = load_file(family(name).directory / "model.safetensors")
    places = {graph: external(bundle.root / graph) for graph in GRAPHS}
    refresh, lora = places["refresh.onnx"], places["lora.onnx"]
    # The joined graph reads the same bytes, under other names where it reads several tensors as one
    begins = {place[:2] for place in (refresh | lora).values()}
    ends = {(file, begin + length) for file, begin, length in (refresh | lora).values()}
    for file, begin, length in places["ort/steps.onnx"].values():
        assert (file, begin) in begins
        assert (file, begin + length) in ends
    # The LoRA step names what the refresh names, at the same place, but for dropped layers and surrogates
    surrogates = {f"surrogate.{i}.lora_{part}" for i in (3, 5) for part in "AB" if rank}
    kept = {name for name in refresh if not name.startswith(("model.layers.3.", "model.layers.5."))}
    assert set(lora) == kept | surrogates
    assert all(lora[name] == refresh[name] for name in kept)
    # All of it lies in the bundle, and is the checkpoint's, byte for byte
    for tensor_name, (location, offset, length) in (refresh | lora).items():
        file = bundle.root / location
        assert file.parent == bundle.root / "weights"
        assert ".." not in location
        assert offset + length <= file.stat().st_size
        if tensor_name not in surrogates:
            alias = tensor_name if tensor_name in tensors else "model.embed_tokens.weight"
            assert tensor_name == alias or name == "llama_tied"
            with file.open("rb") as opened:
                opened.seek(offset)
                assert opened.read(length) == tensors[alias].numpy().tobytes()
    # Once on disk: places are the same or apart, and beside them there are only headers
    spans = sorted(set((refresh | lora).values()))
    for (file, begin, length), (next_file, next_begin, _) in itertools.pairwise(spans):
        assert file != next_file or begin + length <= next_begin
    held = sum(length for _, _, length in spans)
    assert held == sum(t.numel() * 4 for t in tensors.values()) + len(surrogates) * rank * SIZES["hidden_size"] * 4
    assert held <= stored_bytes(bundle) < held + 16384
    assert all(inline_bytes(bundle.root / graph) < 16384 for graph in GRAPHS)


def test_tied_weights_whatever_the_checkpoint_stores(tmp_path, traced):
    """The table under its own name, under the head's, or under both."""
    source = short("llama_tied")
    traced(source)
    whole = load_file(source.directory / "model.safetensors")
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    assert head not in whole
    rest = {name: tensor for name, tensor in whole.items() if name != table}
    results = []
    for index, names in enumerate([(table,), (head,), (table, head)]):
        model = shutil.copytree(source.directory, tmp_path / f"model{index}")
        save(rest | {name: whole[table].clone() for name in names}, model)
        bundle = export(model, tmp_path / f"out{index}")
        places = external(bundle.root / "refresh.onnx")
        assert len({places[name] for name in (table, head) if name in places}) == 1
        results.append(tokens(bundle))
    assert results[0] == results[1] == results[2]


def test_biases_that_the_config_does_not_tell_of_are_said(tmp_path, traced, capsys):
    """transformers leaves them out, and so do we; the model is another one than that which was trained."""
    model = shutil.copytree(short().directory, tmp_path / "model")
    whole = load_file(model / "model.safetensors")
    export(model, tmp_path / "plain")
    assert "by its config" not in capsys.readouterr().err
    biases = {f"model.layers.{n}.self_attn.{one}_proj.bias": torch.ones(4) for n in (0, 1) for one in "qkv"}
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save(whole | biases | buffers, model)
    export(model, tmp_path / "out")
    said = capsys.readouterr().err
    assert "by its config the model has no model.layers.0.self_attn.k_proj.bias and 5 more" in said


def test_tied_by_the_config_with_two_tables(tmp_path, traced):
    """transformers takes both, and so do we: a head of its own was read as the embedding, or the other way round."""
    source = short("llama_tied")
    traced(short())  # of two tables
    whole = load_file(source.directory / "model.safetensors")
    head = whole["model.embed_tokens.weight"].flip(0).contiguous()
    model = shutil.copytree(source.directory, tmp_path / "model")
    save(whole | {"lm_head.weight": head}, model)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    assert torch.equal(theirs.lm_head.weight, head)
    loaded = load_model(str(model), log=lambda _: None).model
    assert torch.equal(loaded.lm_head.weight, head)
    assert torch.equal(loaded.model.embed_tokens.weight, whole["model.embed_tokens.weight"])
    with torch.no_grad(), Session.open(export(model, tmp_path / "out").root, k=0) as session:
        logits = theirs(torch.tensor([[7, 3, 11, 19]])).logits[0, -1].numpy()
        found = session.prefill(np.array([[7, 3, 11, 19]]), np.array([4]), max_new_tokens=1)[0]
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)


def test_two_tables_that_differ_in_their_last_row(tmp_path, monkeypatch):
    """They are compared by parts."""
    monkeypatch.setattr("lora_drop_export.decoder.build._ROWS", 7)
    source = short("llama_tied")
    whole = load_file(source.directory / "model.safetensors")
    head = whole["model.embed_tokens.weight"].clone()
    model = shutil.copytree(source.directory, tmp_path / "model")
    for changed in (False, True):
        head[-1] += changed
        save(whole | {"lm_head.weight": head}, model)
        loaded = load_model(str(model), log=lambda _: None).model
        assert torch.equal(loaded.lm_head.weight, head)
        assert torch.equal(loaded.model.embed_tokens.weight, whole["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_checkpoint_without_the_prefix(tmp_path, traced, name):
    """As `AutoModel.save_pretrained` writes it: layers.0… in place of model.layers.0…."""
    traced(short(name))
    whole = load_file(short(name).directory / "model.safetensors")
    model = shutil.copytree(short(name).directory, tmp_path / "model")
    save({key.removeprefix("model."): tensor for key, tensor in whole.items()}, model)
    assert "layers.0.mlp.up_proj.weight" in read_tensors(model / "model.safetensors")
    bundle = export(model, tmp_path / "out")
    assert tokens(bundle) == tokens(make_bundle(short(name), tmp_path / "other", **PLAN))
    assert filecmp.cmp(model / "model.safetensors", bundle.root / "weights/model.safetensors", shallow=False)


# ── the bundle as a whole ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("arguments", [(), ("--weights", "link", "--rank", 2), ("--target", "none")])
def test_bundle_can_be_moved(tmp_path, model, monkeypatch, arguments):
    """No absolute path and no symbolic link in it; it opens elsewhere, by a relative path, and through a link."""
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(SIZES["vocab_size"])}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
    (model / "LICENSE").write_text("do as you like\n")
    bundle = export(model, tmp_path / "out", *arguments)
    assert (bundle.root / "tokenizer" / "tokenizer.json").is_file()
    assert (bundle.root / "tokenizer" / "LICENSE").is_file()
    repository = Path(__file__).resolve().parents[3]
    traces = [str(p).encode() for p in (tmp_path, tempfile.gettempdir(), repository, Path.home())]
    for path in bundle.root.rglob("*"):
        assert not path.is_symlink()
        if path.is_file():
            content = path.read_bytes()
            assert not [trace for trace in (*traces, tmp_path.name.encode()) if trace in content], path
    assert bundle.manifest.model.name == "model"
    moved = Path(shutil.move(bundle.root, tmp_path / "elsewhere"))
    shutil.rmtree(model)
    assert not Bundle.open(moved).check_hashes()
    if bundle.manifest.targets:
        before = tokens(make_bundle(short(), tmp_path / "b", rank=bundle.manifest.plan.rank, **PLAN))
        assert tokens(moved) == before
        monkeypatch.chdir(tmp_path)
        assert tokens(Path("elsewhere")) == before
        monkeypatch.chdir(moved)
        assert tokens(Path(".")) == before
        (tmp_path / "alias").symlink_to("elsewhere")
        assert tokens(tmp_path / "alias") == before


def test_model_given_by_a_relative_path(tmp_path, model, monkeypatch):
    monkeypatch.chdir(model)
    assert export(".", tmp_path / "out").manifest.model.name == "model"
    monkeypatch.chdir(tmp_path)
    assert export("model/", Path("engines"), "--weights", "link").manifest.model.name == "model"
    assert Bundle.open(tmp_path / "engines")
