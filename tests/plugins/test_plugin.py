"""The TensorRT plugin, without a GPU: the glue around the kernel's host build.

`tests/support/plugin_driver.cpp` calls the plugin as TensorRT would and prints JSON; TensorRT-RTX's own registry and
ONNX parser load it too. The same cases run on the device build where there is a GPU. TENSORRT_INCLUDE_DIR says where
the headers are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from plugins.kernels.binding import load_library
from tests.support.int4_gemm_cases import GEMM_CASES, GemmCase, check_gemm, gemm_arrays
from tests.support.kernel_calls import make_arrays, make_call
from tests.support.kernel_cases import CASES, Case
from tests.support.kernel_reference import check, score_scale

PLUGINS = Path(__file__).parents[2] / "plugins"
HEADERS = Path(os.environ.get("TENSORRT_INCLUDE_DIR", ""))
TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f8": "fp8", "i8": "int8"}
TRT_CODES = {"float32": 0, "float16": 1, "int8": 2, "fp8": 6, "bfloat16": 7}
ERROR, INFO = "1 ", "3 "  # severities, as the driver prints them


@dataclass(frozen=True)
class Build:
    folder: Path

    def library(self, name: str) -> Path:
        return self.folder / f"liblora_drop_{name}.so"

    def make(self, *targets: str) -> None:
        done = subprocess.run(
            ["cmake", "--build", self.folder, "--parallel", "2", "--target", *targets],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        assert not re.search(r"(plugins/tensorrt|plugin_driver).*warning:", output), output


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    for tool in ("cmake", "g++", "nvcc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if not (HEADERS / "NvInfer.h").exists():
        pytest.skip("TENSORRT_INCLUDE_DIR has no NvInfer.h: TensorRT's headers are not installed")
    folder = tmp_path_factory.mktemp("plugin_build")
    architecture = "native" if Path("/dev/nvidia0").exists() else "80"
    done = subprocess.run(
        ["cmake", "-S", PLUGINS, "-B", folder, f"-DTENSORRT_INCLUDE_DIR={HEADERS.absolute()}",
         f"-DCMAKE_CUDA_ARCHITECTURES={architecture}", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-O1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    built = Build(folder)
    built.make("lora_drop_plugin_host", "lora_drop_kernels_host", "lora_drop_plugin_driver")
    return built


@pytest.fixture(scope="session")
def device_build(build: Build) -> Build:
    build.make("lora_drop_plugin")
    return build


# ---- a node ----------------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """Fields, inputs and outputs of a node, as lines for the driver. Sizes may be −1; `largest` is the profile's."""

    fields: dict[str, int | float | str]
    inputs: dict[str, tuple[str, tuple[int, ...]]]
    outputs: dict[str, tuple[str, tuple[int, ...]]]
    largest: dict[str, tuple[int, ...]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        out = []
        for name, value in self.fields.items():
            kind = "int32" if isinstance(value, int) else "float32" if isinstance(value, float) else ""
            out.append(f"field {name} {kind} {value!r}" if kind else f"field {name} {value}")
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            for name, (dtype, dims) in tensors.items():
                largest = self.largest.get(name, dims)
                out.append(f"{kind} {dtype} {text(dims)} {text(largest)} {self.files.get(name, '-')}")
        return out


def text(dims: tuple[int, ...]) -> str:
    return ",".join(map(str, dims))


def node_of(case: Case) -> Node:
    batch, new, d, n, g = len(case.lengths), case.new_tokens, case.head_dim, case.heads, case.kv_heads
    t, kv = TYPES[case.dtype], TYPES[case.cache_dtype]
    tokens = {"query": (t, (batch, new, n * d)), "key": (t, (batch, new, g * d)), "value": (t, (batch, new, g * d))}
    cache = (kv, (batch, g, case.slots, d))
    inputs = {**tokens, "past_key": cache, "past_value": cache, "length": ("int64", (batch,))}
    if case.counts is not None:
        inputs["count"] = ("int64", (batch,))
    if case.rotated:
        inputs["cos"] = inputs["sin"] = (t, (batch, new, case.rotated // 2))
    if case.norm:
        inputs["q_norm"] = inputs["k_norm"] = (t, (d,))
    if case.quantized:
        inputs["k_scale"] = inputs["v_scale"] = ("float32", (g,))
    if case.sinks:
        inputs["sinks"] = ("float32", (n,))
    fields = {
        "heads": n,
        "kv_heads": g,
        "head_dim": d,
        "rotary_dim": case.rotated,
        "interleaved": int(case.interleaved),
        "window": case.window,
        "has_count": int(case.counts is not None),
        "has_norm": int(case.norm),
        "has_kv_scale": int(case.quantized),
        "has_sinks": int(case.sinks),
        "scale": score_scale(case),
        "softcap": case.softcap,
        "norm_epsilon": 1e-6,
        "alias": 1,
        "multiprocessors": case.multiprocessors,
    }
    outputs = {"attention": (t, (batch, new, n * d)), "present_key": cache, "present_value": cache}
    return Node(fields, inputs, outputs)


def drive(
    build: Build, node: Node, *commands: str, library: str = "plugin_host", memory: str = "host",
    plugin: str = "SkipWriteKVAttention",
) -> list[dict]:  # fmt: skip
    """What the driver prints for each command."""
    done = subprocess.run(
        [build.folder / "lora_drop_plugin_driver", build.library(library), memory, plugin],
        input="\n".join([*node.lines(), *commands]) + "\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


PLAIN = Case("plain", counts=(1, 0, 1))
FULL = Case("full", counts=(2, 0, 1), new_tokens=2, norm=True, dtype="bf16", kv_dtype="f8", rotary_dim=32, sinks=True)


# ---- library and creator ---------------------------------------------------------------------------------------------


def exported(library: Path, which: str) -> list[str]:
    listing = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1].split("@")[0] for line in listing.splitlines()]


@pytest.mark.parametrize("name", ["plugin_host", pytest.param("plugin", marks=pytest.mark.slow)])
def test_the_library_needs_and_shows_nothing_of_tensorrt(name: str, request: pytest.FixtureRequest) -> None:
    built = request.getfixturevalue("device_build" if name == "plugin" else "build")
    library = built.library(name)
    assert sorted(exported(library, "--defined-only")) == ["getCreators", "setLoggerFinder"]
    assert not [symbol for symbol in exported(library, "--undefined-only") if re.search("nvinfer|Infer|cuda", symbol)]
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(nvinfer|tensorrt|cuda)", needed)


def test_identity_and_serialized_fields_survive_every_copy(build: Build) -> None:
    node = node_of(FULL)
    copies = ["create build", "names", "fields"]
    for copy in ("clone", "attach", "deserialize"):
        copies += [copy, "names", "fields"]
    results = drive(build, node, *copies)
    assert all(result["ok"] for result in results if "ok" in result)
    names, fields = results[1::3], results[2::3]
    for result in names:
        assert result["plugin"] == ["SkipWriteKVAttention", "1", "lora_drop"]
        assert result["outputs"] == 3
        assert result["timing_cache_id"] == names[0]["timing_cache_id"]
    for result in fields:
        assert {name: np.float32(value) for name, value, _, _ in result["fields"]} == {
            name: np.float32(value) for name, value in node.fields.items()
        }
        assert all(kind == (1 if isinstance(node.fields[name], float) else 5) for name, _, kind, _ in result["fields"])
        assert all(length == 1 for *_, length in result["fields"])


def test_alias_has_a_default_and_multiprocessors_come_from_the_machine(build: Build) -> None:
    node = node_of(PLAIN)
    del node.fields["alias"], node.fields["multiprocessors"]
    created, fields = drive(build, node, "create build", "fields")
    values = {name: value for name, value, *_ in fields["fields"]}
    assert created["ok"]
    assert values["alias"] == 1
    if not Path("/dev/nvidia0").exists():
        assert values["multiprocessors"] == 132
        assert "no GPU or no driver" in created["log"][0]


REFUSED = {
    "unknown": ({"heads_": 4}, ["unknown field `heads_`", "accepted: heads, kv_heads"]),
    "missing": ({"scale": None, "window": None}, ["missing fields: window, scale"]),
    "type": ({"heads": 4.0}, ["field heads has 1 values of PluginFieldType 1", "expected one int32"]),
    "float_type": ({"scale": "float64 0.125"}, ["scale has 1 values of PluginFieldType 2", "expected one float32"]),
    "length": ({"heads": "int32 4 4"}, ["field heads has 2 values", "expected one int32"]),
    "empty": ({"heads": "int32"}, ["field heads has 0 values"]),
    "negative": ({"window": -1}, ["field window = -1", "0 (none) or more"]),
    "flag": ({"interleaved": 2}, ["field interleaved = 2", "accepted: 0 or 1"]),
    "alias": ({"alias": -1}, ["field alias = -1", "accepted: 0 or 1"]),
    "large": ({"kv_heads": 123456789}, ["field heads = 4", "a multiple of kv_heads = 123456789"]),
    "zero": ({"heads": 0}, ["field heads = 0", "1 or more"]),
    "nan": ({"scale": "float32 nan"}, ["field scale = nan", "a finite number above 0"]),
    "infinite": ({"softcap": "float32 inf"}, ["field softcap = inf", "finite"]),
    "scale": ({"scale": 0.0}, ["field scale = 0", "above 0"]),
    "group": ({"heads": 3}, ["field heads = 3", "a multiple of kv_heads = 2"]),
    "odd_rope": ({"rotary_dim": 15}, ["field rotary_dim = 15", "even, at most head_dim = 64"]),
    "long_rope": ({"rotary_dim": 66}, ["field rotary_dim = 66", "even, at most head_dim = 64"]),
    "kernel": ({"head_dim": 1000}, ["head_dim must", "head_dim=1000"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_fields(build: Build, name: str) -> None:
    changes, messages = REFUSED[name]
    node = node_of(PLAIN)
    node.fields = {key: value for key, value in (node.fields | changes).items() if value is not None}
    (result,) = drive(build, node, "create build")
    assert not result["ok"]
    assert result["log"][-1].startswith(ERROR + "SkipWriteKVAttention: createPlugin: `node`: ")
    for message in messages:
        assert message in result["log"][-1]


def test_a_field_given_twice_is_refused(build: Build) -> None:
    node = node_of(PLAIN)
    (result,) = drive(build, node, "field heads int32 4", "create build")
    assert not result["ok"]
    assert "field heads is given twice" in result["log"][-1]


# ---- build -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alias", "expected"), [(1, [-1, 3, 4]), (0, [-1, -1, -1])])
def test_aliases(build: Build, alias: int, expected: list[int]) -> None:
    node = node_of(PLAIN)
    node.fields["alias"] = alias
    _, direct, _, deserialized = drive(build, node, "create build", "aliases", "deserialize", "aliases")
    assert direct["aliases"] == deserialized["aliases"] == expected


@pytest.mark.parametrize("case", [PLAIN, FULL], ids=lambda case: case.name)
def test_output_shapes_and_types(build: Build, case: Case) -> None:
    _, shapes, types = drive(build, node_of(case), "create build", "shapes", "types")
    # [input, axis] of each size: those of query, past_key, past_value
    assert shapes["shapes"] == [[[i, axis] for axis in range(rank)] for i, rank in ((0, 3), (3, 4), (4, 4))]
    t, kv = TRT_CODES[TYPES[case.dtype]], TRT_CODES[TYPES[case.cache_dtype]]
    assert types["types"] == [t, kv, kv]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_formats_of_every_case_fit(build: Build, case: Case) -> None:
    node = node_of(case)
    _, formats, configured = drive(build, node, "create build", "formats", "configure")
    assert formats["formats"] == [1] * (len(node.inputs) + 3)
    assert configured["status"] == 0, configured["log"]


OTHER_TYPES = {
    "query": ["int8", "int32", "float32/1"],
    "key": ["float32", "float16"],
    "value": ["float16"],
    "past_key": ["bfloat16", "float32", "fp8/8"],
    "past_value": ["int8", "bfloat16"],
    "length": ["int32"],
    "count": ["int32"],
    "cos": ["float32"],
    "sin": ["float32"],
    "q_norm": ["float32"],
    "k_norm": ["float16"],
    "k_scale": ["bfloat16"],
    "v_scale": ["float16"],
    "sinks": ["bfloat16"],
    "attention": ["float32"],
    "present_key": ["int8"],
    "present_value": ["bfloat16"],
}


@pytest.mark.parametrize("name", OTHER_TYPES)
def test_other_formats_do_not_fit(build: Build, name: str) -> None:
    for dtype in OTHER_TYPES[name]:
        node = node_of(FULL)
        tensors = node.outputs if name in node.outputs else node.inputs
        tensors[name] = (dtype, tensors[name][1])
        position = list(node.inputs | node.outputs).index(name)
        _, formats, configured = drive(build, node, "create build", "formats", "configure")
        assert formats["formats"][: position + 1] == [1] * position + [0]
        assert configured["status"] != 0
        assert configured["log"][-1].startswith(f"{ERROR}SkipWriteKVAttention: configurePlugin: ")


def test_int8_cache_without_scales_does_not_fit(build: Build) -> None:
    node = node_of(PLAIN)
    node.inputs["past_key"] = ("int8", node.inputs["past_key"][1])
    _, formats = drive(build, node, "create build", "formats")
    assert formats["formats"][3] == 0


def dynamic(node: Node, batch: int, new_tokens: int) -> Node:
    """With B and S still unknown, and a profile up to these sizes."""
    for tensors in (node.inputs, node.outputs):
        for name, (dtype, dims) in tensors.items():
            if name in ("q_norm", "k_norm", "k_scale", "v_scale", "sinks"):
                continue
            by_token = len(dims) == 3
            node.largest[name] = (batch, new_tokens, *dims[2:]) if by_token else (batch, *dims[1:])
            tensors[name] = (dtype, (-1, -1, *dims[2:]) if by_token else (-1, *dims[1:]))
    return node


def test_unknown_sizes_fit_while_the_engine_is_built_and_not_when_it_runs(build: Build) -> None:
    node = dynamic(node_of(FULL), batch=4, new_tokens=8)
    _, configured, changed = drive(build, node, "create build", "configure", "shape_change")
    assert configured["status"] == 0, configured["log"]
    assert changed["status"] != 0


def test_workspace_is_enough_for_every_smaller_problem(build: Build) -> None:
    """5 tokens a row take another path than 4, with fewer blocks; the largest problem alone would not be enough."""
    case = replace(PLAIN, heads=4, kv_heads=4, multiprocessors=20, spare_slots=2000)
    kernels = load_library(build.library("kernels_host"))

    def needed(batch: int, new_tokens: int) -> int:
        call = make_call(case, lambda name: 256)
        call.batch, call.new_tokens = batch, new_tokens
        return kernels.lora_drop_workspace_bytes(call, case.multiprocessors)

    _, workspace = drive(build, dynamic(node_of(case), batch=24, new_tokens=5), "create build", "workspace")
    sizes = {(b, s): needed(b, s) for b in range(1, 25) for s in range(1, 6)}
    assert workspace["bytes"] == max(sizes.values()) > 0
    assert sizes[24, 5] < max(sizes.values())


def test_workspace_of_a_refused_profile_fits_no_device(build: Build) -> None:
    node = dynamic(node_of(PLAIN), batch=0, new_tokens=1)
    _, configured, workspace = drive(build, node, "create build", "configure", "workspace")
    assert configured["status"] != 0
    assert "largest batch is 0" in configured["log"][-1]
    assert workspace["bytes"] >= 2**60


WRONG_SHAPES = {
    "query": (3, 1, 4 * 64 + 1),
    "key": (3, 1, 4 * 64),
    "value": (2, 1, 2 * 64),
    "past_key": (3, 1, 138, 64),
    "past_value": (3, 2, 136, 64),
    "length": (1,),
    "count": (3, 1),
    "cos": (3, 1, 64),
    "sin": (3, 2, 32),
    "attention": (3, 1, 2 * 64),
    "present_key": (3, 2, 64, 138),
    "present_value": (3, 2, 139, 64),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_one_checker_refuses_wrong_shapes_everywhere(build: Build, tmp_path: Path, name: str) -> None:
    node = with_files(node_of(PLAIN), make_arrays(PLAIN), tmp_path)
    tensors = node.outputs if name in node.outputs else node.inputs
    dtype, right = tensors[name]
    assert right != WRONG_SHAPES[name]
    tensors[name] = (dtype, WRONG_SHAPES[name])
    node.files = {key: file for key, file in node.files.items() if key in node.outputs and "=" not in file}
    _, *results = drive(build, node, "create runtime", "configure", "shape_change", "enqueue")
    for result in results:
        assert result["status"] != 0
        assert f"is {list(WRONG_SHAPES[name])}; expected [" in result["log"][-1]


def test_a_missing_input_is_refused(build: Build) -> None:
    node = node_of(PLAIN)
    del node.inputs["sin"]
    _, *results = drive(build, node, "create build", "shapes", "types", "configure", "shape_change")
    for result in results:
        assert result["status"] != 0
        assert "8 inputs and 3 outputs; these fields call for 9 and 3" in result["log"][-1]


# ---- run -------------------------------------------------------------------------------------------------------------


def with_files(node: Node, arrays: dict, folder: Path, *, in_place: bool = True) -> Node:
    """Contents of the inputs, and files for the outputs."""
    for name in node.inputs:
        array = arrays[{"past_key": "key_cache", "past_value": "value_cache"}.get(name, name)]
        node.files[name] = str(folder / name)
        (folder / name).write_bytes(array.tobytes())
    for name in node.outputs:
        node.files[name] = str(folder / name)
    if in_place:
        node.files["present_key"] = f"=3:{folder / 'present_key'}"
        node.files["present_value"] = f"=4:{folder / 'present_value'}"
    return node


def run_case(build: Build, case: Case, folder: Path, **where: str) -> None:
    """What TensorRT does from the ONNX node to the outputs: create, configure, serialize, attach, enqueue."""
    before = make_arrays(case)
    node = with_files(node_of(case), before, folder)
    commands = ["create build", "configure", "workspace", "deserialize", "attach", "shape_change", "enqueue"]
    results = drive(build, node, *commands, **where)
    assert results[-1]["status"] == 0, results[-1]["log"]
    after = dict(before)
    for name, output in (("output", "attention"), ("key_cache", "present_key"), ("value_cache", "present_value")):
        data = (folder / output).read_bytes()
        after[name] = np.frombuffer(data, before[name].dtype).reshape(before[name].shape)
    check(case, before, after)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_end_to_end(build: Build, tmp_path: Path, case: Case) -> None:
    run_case(build, case, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_end_to_end_on_the_gpu(request: pytest.FixtureRequest, build: Build, tmp_path: Path, case: Case) -> None:
    drive(build, node_of(PLAIN), memory="cuda")  # skips without a GPU, before the kernels are compiled
    device_build = request.getfixturevalue("device_build")
    run_case(device_build, case, tmp_path, library="plugin", memory="cuda")


@pytest.mark.parametrize("alias", [0, 1])
def test_past_and_present_apart_are_refused(build: Build, tmp_path: Path, alias: int) -> None:
    node = with_files(node_of(PLAIN), make_arrays(PLAIN), tmp_path, in_place=False)
    node.fields["alias"] = alias
    *_, result = drive(build, node, "create runtime", "workspace", "enqueue")
    assert result["status"] != 0
    assert "updated in place" in result["log"][-1]
    assert f"(alias={alias})" in result["log"][-1]
    assert ("kALIASED_PLUGIN_IO_10_03" in result["log"][-1]) == bool(alias)
    assert set((tmp_path / "attention").read_bytes()) == {0x7F}, "something was written"


def test_the_builder_may_time_it_on_scratch_memory(build: Build, tmp_path: Path) -> None:
    node = with_files(node_of(PLAIN), make_arrays(PLAIN), tmp_path, in_place=False)
    _, _, timed, _, run = drive(build, node, "create build", "workspace", "enqueue", "deserialize", "enqueue")
    assert timed["status"] == 0
    assert "nothing was launched" in timed["log"][-1]
    assert run["status"] != 0, "a deserialized plugin must not take the builder's path"
    for name in node.outputs:
        assert set((tmp_path / name).read_bytes()) == {0x7F}


def test_null_memory_is_refused(build: Build) -> None:
    _, result = drive(build, node_of(PLAIN), "create runtime", "enqueue")
    assert result["status"] != 0
    assert "pointer is null" in result["log"][-1]


def test_no_workspace_where_one_is_needed_is_refused(build: Build, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "splits")
    node = with_files(node_of(case), make_arrays(case), tmp_path)
    _, result = drive(build, node, "create runtime", "enqueue")
    assert result["status"] != 0
    assert "no workspace" in result["log"][-1]


# ---- Int4Gemm --------------------------------------------------------------------------------------------------------


def gemm_node(case: GemmCase) -> Node:
    """x as [1, rows, inputs]."""
    t = TYPES[case.dtype]
    inputs = {
        "x": (t, (1, case.rows, case.inputs)),
        "weights": ("int8", (case.outputs, case.inputs // 2)),
        "scales": (t, (case.outputs, case.inputs // case.block)),
    }
    if case.zero_points:
        inputs["zero_points"] = ("int8", (case.outputs, case.inputs // case.block // 2))
    fields = {"block": case.block, "has_zero_points": int(case.zero_points)}
    return Node(fields, inputs, {"y": (t, (1, case.rows, case.outputs))})


def drive_gemm(build: Build, node: Node, *commands: str, **where: str) -> list[dict]:
    return drive(build, node, *commands, plugin="Int4Gemm", **where)


def run_gemm_case(build: Build, case: GemmCase, folder: Path, **where: str) -> None:
    arrays, weights = gemm_arrays(case)
    node = gemm_node(case)
    for name in (*node.inputs, "y"):
        node.files[name] = str(folder / name)
        (folder / name).write_bytes(arrays[name].tobytes())
    commands = ["create build", "configure", "workspace", "deserialize", "attach", "shape_change", "enqueue"]
    results = drive_gemm(build, node, *commands, **where)
    assert results[2]["bytes"] == 0
    assert results[-1]["status"] == 0, results[-1]["log"]
    y = np.frombuffer((folder / "y").read_bytes(), arrays["y"].dtype).reshape(arrays["y"].shape)
    check_gemm(case, arrays, weights, y)


@pytest.mark.parametrize("case", GEMM_CASES, ids=str)
def test_int4_gemm_end_to_end(build: Build, tmp_path: Path, case: GemmCase) -> None:
    run_gemm_case(build, case, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GEMM_CASES, ids=str)
def test_int4_gemm_end_to_end_on_the_gpu(
    request: pytest.FixtureRequest, build: Build, tmp_path: Path, case: GemmCase
) -> None:
    drive(build, node_of(PLAIN), memory="cuda")  # skips without a GPU, before the kernels are compiled
    run_gemm_case(request.getfixturevalue("device_build"), case, tmp_path, library="plugin", memory="cuda")


GEMM = GemmCase(3, 256, 48, block=64, dtype="bf16", zero_points=True)


def test_int4_gemm_answers(build: Build) -> None:
    node = gemm_node(GEMM)
    commands = ("create build", "names", "fields", "aliases", "shapes", "types", "formats", "clone", "fields")
    _, names, fields, _, shapes, types, formats, _, cloned = drive_gemm(build, node, *commands)
    assert names["plugin"] == ["Int4Gemm", "1", "lora_drop"]
    assert names["outputs"] == 1
    assert fields["fields"] == cloned["fields"] == [["block", 64, 5, 1], ["has_zero_points", 1, 5, 1]]
    assert shapes["shapes"] == [[[0, 0], [0, 1], [1, 0]]]  # [input, axis]: x, x, weights
    assert types["types"] == [TRT_CODES["bfloat16"]]
    assert formats["formats"] == [1] * 5


def test_int4_gemm_takes_unknown_rows_while_the_engine_is_built(build: Build) -> None:
    node = gemm_node(GEMM)
    for tensors in (node.inputs, node.outputs):
        for name in {"x", "y"} & set(tensors):
            dtype, dims = tensors[name]
            tensors[name] = (dtype, (-1, -1, dims[-1]))
            node.largest[name] = (4, 512, dims[-1])
    _, configured, changed = drive_gemm(build, node, "create build", "configure", "shape_change")
    assert configured["status"] == 0, configured["log"]
    assert changed["status"] != 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("block int32 48", "has_zero_points int32 0"), "block must be 16, 32, 64 or 128"),
        (("block float32 64", "has_zero_points int32 0"), "expected one int32"),
        (("blocks int32 64", "has_zero_points int32 0"), "expected two fields: block and has_zero_points"),
        (("block int32 64", "has_zero_points int32 2"), "expected 0 or 1"),
        (("block int32 64",), "expected two fields: block and has_zero_points"),
        ((), "expected two fields: block and has_zero_points"),
    ],
)
def test_int4_gemm_refuses_fields(build: Build, fields: tuple[str, ...], message: str) -> None:
    node = gemm_node(GEMM)
    node.fields = {}
    (result,) = drive_gemm(build, node, *(f"field {field}" for field in fields), "create build")
    assert not result["ok"]
    assert result["log"][-1].startswith(ERROR + "Int4Gemm: createPlugin: `node`: ")
    assert message in result["log"][-1]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("x", ("float32", (1, 3, 256)), "x is float32"),
        ("weights", ("bfloat16", (48, 128)), "weights is bfloat16"),
        ("scales", ("float16", (48, 4)), "scales is float16"),
        ("y", ("bfloat16/1", (1, 3, 48)), "TensorFormat 1"),
        ("x", ("bfloat16", (256,)), "x, weights, scales and y have 1, 2, 2 and 3 axes"),
        ("weights", ("int8", (48, 256)), "do not fit"),
        ("scales", ("bfloat16", (48, 2)), "do not fit"),
        ("zero_points", ("int8", (48, 4)), "half of 4"),
        ("zero_points", ("bfloat16", (48, 2)), "zero_points is bfloat16"),
        ("y", ("bfloat16", (1, 4, 48)), "do not fit"),
    ],
)
def test_int4_gemm_refuses_tensors(
    build: Build, name: str, tensor: tuple[str, tuple[int, ...]], message: str
) -> None:  # fmt: skip
    node = gemm_node(GEMM)
    (node.outputs if name == "y" else node.inputs)[name] = tensor
    _, *results = drive_gemm(build, node, "create build", "configure", "shape_change", "enqueue")
    for result in results:
        assert result["status"] != 0
        assert message in result["log"][-1]


# ---- TensorRT-RTX ----------------------------------------------------------------------------------------------------

RTX = """
import sys
import numpy as np
import tensorrt_rtx as trt

class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)

    def log(self, severity, message):
        print("log:", severity.name, message, flush=True)

logger = Logger()
builder = trt.Builder(logger)
registry = trt.get_plugin_registry()
handle = registry.load_library(sys.argv[1])
assert handle is not None
"""

REGISTRY = """
creator = registry.get_creator("SkipWriteKVAttention", "1", "lora_drop")
assert creator.interface_info.kind == "PLUGIN CREATOR_V3ONE"
print("names:", *[field.name for field in creator.field_names])
integers = dict(heads=4, kv_heads=2, head_dim=64, rotary_dim=64, interleaved=0, window=0, has_count=1, has_norm=1,
                has_kv_scale=0, alias=int(sys.argv[2]))
reals = dict(scale=0.125, softcap=0.0, norm_epsilon=1e-6)
if sys.argv[3:]:
    del integers[sys.argv[3]]
arrays = {name: np.array([value], np.int32) for name, value in integers.items()}
arrays |= {name: np.array([value], np.float32) for name, value in reals.items()}
kinds = {"i": trt.PluginFieldType.INT32, "f": trt.PluginFieldType.FLOAT32}
fields = trt.PluginFieldCollection(
    [trt.PluginField(name, array, kinds[array.dtype.kind]) for name, array in arrays.items()]
)
plugin = creator.create_plugin("node", fields, trt.TensorRTPhase.BUILD)
print("plugin:", plugin is not None)
if plugin is not None:
    core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
    print("core:", core.plugin_name, core.plugin_version, core.plugin_namespace)
    build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
    print("build:", type(build).__name__, build.interface_info.kind, build.interface_info.major, build.num_outputs)
    print("timing:", build.timing_cache_id)
print("end", flush=True)
"""

PARSE = """
network = builder.create_network()
parser = trt.OnnxParser(network, logger)
print("parsed:", parser.parse(open(sys.argv[2], "rb").read()), flush=True)
"""


def run_in_rtx(script: str, *arguments: str | Path) -> tuple[int, str]:
    """In a process of its own: TensorRT may end it."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    done = subprocess.run(
        [sys.executable, "-c", RTX + script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("alias", [0, 1])
def test_rtx_registry_loads_the_plugin(build: Build, alias: int) -> None:
    code, output = run_in_rtx(REGISTRY, build.library("plugin_host"), str(alias))
    assert code == 0, output
    lines = output.splitlines()
    assert "plugin: True" in lines
    assert "core: SkipWriteKVAttention 1 lora_drop" in lines
    assert "build: IPluginV3OneBuildV2 PLUGIN_V3ONE_BUILD 2 3" in lines
    assert re.search(f"^timing: heads=4 .*scale=0.125 .*alias={alias} ", output, re.MULTILINE)
    (names,) = (line for line in lines if line.startswith("names: "))
    assert set(names.split()[1:]) == set(node_of(PLAIN).fields) - {"multiprocessors"}


def headers_major() -> int:
    """Of TensorRT, or of the TensorRT that a TensorRT-RTX has the interfaces of."""
    version = (HEADERS / "NvInferVersion.h").read_text()
    found = re.search(r"#define (?:TRT_MAJOR_ENTERPRISE|NV_TENSORRT_MAJOR) (\d+)", version)
    assert found is not None
    return int(found[1])


def test_rtx_registry_gets_the_refusal_and_its_reason(build: Build) -> None:
    if headers_major() < 11:
        pytest.skip("ILoggerFinder is another interface since TensorRT 11, which TensorRT-RTX 1.7 has")
    code, output = run_in_rtx(REGISTRY, build.library("plugin_host"), "1", "heads")
    assert code == 0, output
    assert "plugin: False" in output
    assert "log: ERROR SkipWriteKVAttention: createPlugin: `node`: missing fields: heads" in output


def test_rtx_onnx_parser_makes_the_plugin_from_a_node(build: Build, tmp_path: Path) -> None:
    """NVIDIA's ONNX parser turns attributes into fields. (RTX has no plugin layer and ends the process then.)"""
    onnx = pytest.importorskip("onnx")
    node = node_of(replace(FULL, dtype="f16", kv_dtype=None))
    types = {name: onnx.TensorProto.DataType.Value(name.upper()) for name in ("float16", "int64")}
    types["float32"] = onnx.TensorProto.FLOAT

    def infos(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> list[onnx.ValueInfoProto]:
        return [onnx.helper.make_tensor_value_info(n, types[dtype], dims) for n, (dtype, dims) in tensors.items()]

    attributes = {name: value for name, value in node.fields.items() if name != "multiprocessors"}
    onnx_node = onnx.helper.make_node(
        "SkipWriteKVAttention", list(node.inputs), list(node.outputs), domain="lora_drop",
        plugin_version="1", plugin_namespace="lora_drop", **attributes,
    )  # fmt: skip
    graph = onnx.helper.make_graph([onnx_node], "graph", infos(node.inputs), infos(node.outputs))
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("lora_drop", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    path = tmp_path / "node.onnx"
    path.write_bytes(model.SerializeToString())
    _, output = run_in_rtx(PARSE, build.library("plugin_host"), path)
    assert "Successfully created plugin: SkipWriteKVAttention" in output
    assert "not found in plugin node" not in output  # each field of the creator was found
