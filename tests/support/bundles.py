"""Small bundles for the tests: a family is traced once per process, each plan is then a matter of milliseconds."""

from __future__ import annotations

import atexit
import copy
import dataclasses
import functools
import json
import os
import pickle
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from lora_drop_runtime.bundle.bundle import Bundle, record_file
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.plan.drop_plan import DropPlan
from onnx_ir.passes.common import RemoveUnusedNodesPass
from safetensors.numpy import save_file
from transformers import PreTrainedModel

from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.compiler.export import write_bundle
from lora_drop_export.compiler.facts import make_plan
from lora_drop_export.compiler.files import copy_tokenizer
from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.console import Console
from lora_drop_export.decoder.trace import TracedModel, trace
from tests.support.models import FAMILIES, MORE_FAMILIES, llama
from tests.support.oracle import OraclePlan

if sys.platform != "win32":
    import fcntl

PROMPTS = [[7, 3, 11, 19, 2], [5], [23, 29, 31]]  # ragged


@dataclass(frozen=True)
class Family:
    """A tiny random model, its checkpoint directory and its trace."""

    model: PreTrainedModel
    directory: Path
    checkpoint: Checkpoint
    traced: TracedModel
    dtype: str = "float32"  # of the trace


@functools.cache
def family(name: str) -> Family:
    """Build, save and trace a family of tests.models."""
    model, directory, checkpoint = _saved(FAMILIES[name]())
    return Family(model, directory, checkpoint, traced_once(name, checkpoint, "float32"))


@functools.cache
def family_trace(name: str, dtype: str) -> TracedModel:
    """A family's trace in another dtype."""
    return traced_once(name, family(name).checkpoint, dtype)


def traced_family(name: str, model: PreTrainedModel, dtype: str) -> Family:
    """Save any model and trace it in a dtype; the trace is shared by all that say this name."""
    model, directory, checkpoint = _saved(model)
    return Family(model, directory, checkpoint, traced_once(name, checkpoint, dtype), dtype)


@functools.cache
def more_family(name: str) -> Family:
    """One of MORE_FAMILIES."""
    return traced_family(f"more.{name}", MORE_FAMILIES[name](), "float32")


@functools.cache
def heads_of(head_dim: int, kv_heads: int) -> Family:
    """A Llama of three layers with four query heads of this size."""
    if (head_dim, kv_heads) == (16, 2):  # as in all others, whose trace there is
        return first_layers("llama", 3)
    model = llama(head_dim=head_dim, num_key_value_heads=kv_heads, num_hidden_layers=3)
    return traced_family(f"llama.{kv_heads}_heads_of_{head_dim}", model, "float32")


@functools.cache
def first_layers(name: str, count: int, dtype: str = "float32") -> Family:
    """A family's first layers alone, with as much of its trace: what costs as many times a layer costs less."""
    model = copy.deepcopy(family(name).model)
    traced = traced_once(name, family(name).checkpoint, dtype)  # with a graph of its own
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]
    model.model.layers = model.model.layers[:count]
    graph = traced.graph.graph
    stream = {value.name: value for node in graph for value in node.outputs}
    stream[f"hidden_states.{len(traced.windows)}"].replace_all_uses_with(stream[f"hidden_states.{count}"])
    RemoveUnusedNodesPass()(traced.graph)
    parameters = {key: shape for key, shape in traced.parameters.items() if key in graph.initializers}
    cut = dataclasses.replace(traced, parameters=parameters, windows=traced.windows[:count], heads=traced.heads[:count])
    model, directory, checkpoint = _saved(model)
    return Family(model, directory, checkpoint, cut, dtype)


def with_weights_of(source: Family, model: PreTrainedModel) -> Family:
    """Another model of a family's sizes, whose trace it takes: that knows no weights."""
    model, directory, checkpoint = _saved(model)
    return dataclasses.replace(source, model=model, directory=directory, checkpoint=checkpoint)


def traced_model(model: PreTrainedModel) -> Family:
    """Save and trace any model."""
    model, directory, checkpoint = _saved(model)
    return Family(model, directory, checkpoint, trace(checkpoint, "float32"))


def _saved(model: PreTrainedModel) -> tuple[PreTrainedModel, Path, Checkpoint]:
    scratch = tempfile.TemporaryDirectory(prefix="lora-drop-test-")
    atexit.register(scratch.cleanup)
    directory = Path(scratch.name)
    model.save_pretrained(directory)
    return model, directory, open_checkpoint(str(directory), directory / "scratch")


def traced_once(name: str, checkpoint: Checkpoint, dtype: str) -> TracedModel:
    """A trace that the workers of one test run share: it takes seconds, and they would make each several times."""
    file = _trace_file(name, dtype)
    with open(f"{file}.lock", "w", encoding="utf-8") as lock:
        if sys.platform != "win32":  # there the tests run in one process
            fcntl.flock(lock, fcntl.LOCK_EX)  # the one that comes second waits for the first one's
        if file.exists():
            traced = pickle.loads(file.read_bytes())
            return dataclasses.replace(traced, graph=ir.serde.deserialize_model(traced.graph))
        traced = trace(checkpoint, dtype)
        _keep(traced, file)
    return traced


def keep_trace(source: Family, name: str) -> None:
    """Let `traced_once` find a family's trace by this name, too."""
    _keep(source.traced, _trace_file(name, source.dtype))


def _trace_file(name: str, dtype: str) -> Path:
    return Path(os.environ["LORA_DROP_TEST_TRACES"]) / f"{name}.{dtype}"  # tests/conftest.py


def _keep(traced: TracedModel, file: Path) -> None:
    part = Path(f"{file}.part")
    part.write_bytes(pickle.dumps(dataclasses.replace(traced, graph=ir.serde.serialize_model(traced.graph))))
    part.rename(file)


def make_bundle(made_from: str | Family, root: Path, **options: Any) -> Bundle:
    """A bundle with target ort, at `root`; options as for ExportOptions."""
    source = family(made_from) if isinstance(made_from, str) else made_from
    root.mkdir(parents=True)
    options = {"max_seq_len": 128} | options
    copy_tokenizer(source.checkpoint, root / "tokenizer")
    return write_bundle(root, source.checkpoint, source.traced, source.dtype, ExportOptions(**options), Console())


def record_again(root: Path) -> None:
    """Let a bundle's manifest record the files as they lie now, as if it had been written with them."""
    path = root / MANIFEST_NAME
    data = json.loads(path.read_text())
    files = [file for file in root.rglob("*") if file.is_file() and file != path]
    data["files"] = {file.relative_to(root).as_posix(): dataclasses.asdict(record_file(file)) for file in files}
    path.write_text(json.dumps(data))


def rewritten(made_from: str | Family) -> Family:
    """A family whose checkpoint the exporter writes again, in the order that lets it fuse layers."""
    source = family(made_from) if isinstance(made_from, str) else made_from
    return dataclasses.replace(source, checkpoint=dataclasses.replace(source.checkpoint, owned=True))


def save_adapters(
    directory: Path,
    plan: DropPlan,
    hidden_size: int,
    fingerprint: str | None,
    rank: int = 4,
    matrices: dict[str, Any] | None = None,
) -> Path:
    """Adapters in PEFT's format: site → (A, B, scale), or random ones with scale 2 and big enough to matter."""
    generator = np.random.default_rng(5)
    names = {"": "", ".attn": "self_attn.", ".mlp": "mlp."}
    tensors = {}
    for site in plan.adapted_sites if plan.rank else plan.sites:
        layer, _, half = site.partition(".")
        prefix = f"base_model.model.model.layers.{layer}.{names['.' + half if half else '']}"
        shapes = {"A": (rank, plan.form.feature_size(hidden_size)), "B": (hidden_size, rank), "G": (rank, hidden_size)}
        for part in "ABG" if "gated" in plan.surrogate else "AB":
            values = generator.standard_normal(shapes[part]) * 0.2
            if matrices is not None:
                values = matrices[site]["AB".index(part)].numpy()
            tensors[f"{prefix}lora_{part}.weight"] = values.astype(np.float32)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank * (2 if matrices is None else matrices[plan.sites[0]][2]),
        "lora_drop": {
            "sites": list(plan.sites),
            "bare_sites": list(plan.bare_sites),
            "surrogate": plan.surrogate,
            "base_fingerprint": fingerprint,
        },
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def plan_of(made_from: str | Family, **options: Any) -> DropPlan:
    """The plan of a bundle with these options, which is not made."""
    source = family(made_from) if isinstance(made_from, str) else made_from
    return make_plan(
        source.traced.windows, source.traced.hidden_size, ExportOptions(**options), source.traced.kv_sources
    )


def fitted_adapters(source: Family, directory: Path, rank: int = 4, **options: Any) -> Path:
    """Random adapters for what the options drop, without a bundle that has no place for them yet."""
    plan = plan_of(source, rank=rank, **options)
    return save_adapters(directory, plan, source.traced.hidden_size, source.checkpoint.fingerprint(), rank)


def make_adapted_bundle(made_from: str | Family, root: Path, **options: Any) -> Bundle:
    """A bundle in `root`, with random adapters where the options have a rank; those lie in `root` / adapters."""
    source = family(made_from) if isinstance(made_from, str) else made_from
    plan = plan_of(source, **options)
    if plan.rank:
        options["adapters"] = fitted_adapters(source, root / "adapters", **options | {"rank": plan.rank})
    return make_bundle(source, root / "bundle", **options)


def oracle_plan(bundle: Bundle, adapters: Path | None = None) -> OraclePlan:
    """The oracle's view of a bundle's plan; adapters are read with safetensors and peft's own scale rule."""
    import torch
    from safetensors.torch import load_file

    plan = bundle.manifest.plan
    matrices = None
    if adapters is not None:
        config = json.loads((adapters / "adapter_config.json").read_text())
        tensors = load_file(adapters / "adapter_model.safetensors")
        matrices = {}
        for name, a in tensors.items():
            if ".lora_A." in name:
                layer, _, half = re.split(r"\.(?:layers|h)\.", name)[1].partition(".")
                key = layer + {"l": "", "s": ".attn", "m": ".mlp"}[half[0]]
                b, gate = (tensors.get(name.replace("lora_A", f"lora_{part}")) for part in "BG")
                matrices[key] = (a.to(torch.float32), b.to(torch.float32), config["lora_alpha"] / config["r"])
                matrices[key] += () if gate is None else (gate.to(torch.float32),)
    return OraclePlan(plan.sites, plan.surrogate, matrices, fill=plan.policy == "fill")
