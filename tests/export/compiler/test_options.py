"""Options said once: what the command line makes of them, and what is refused under its own name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from lora_drop_runtime.command_line import Parser, add_options, given_flags, settings_of
from lora_drop_runtime.errors import InputError

from lora_drop_export.compiler.options import BuildOptions, ExportOptions, PlanOptions, with_files_read
from lora_drop_export.quantize.choice import Quantization
from lora_drop_export.targets.trt.options import BuilderOptions


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lora-drop-export")
    add_options(parser, ExportOptions)
    return parser


def test_nothing_given_is_the_defaults(parser):
    arguments = parser.parse_args([])
    assert vars(arguments) == {}
    assert settings_of(ExportOptions, arguments) == ExportOptions()


def test_help_says_how_each_dtype_is_rounded_and_which_head_is_slower(parser):
    text = " ".join(parser.format_help().split())
    defaults = (f"{Quantization.of(dtype).method} for {dtype}" for dtype in ("int4", "int8"))
    assert f"default {', '.join(defaults)})" in text
    assert "(default int4); int8 is more accurate, and slower" in text


def test_what_is_given_reaches_its_field(parser):
    line = (
        "--drop-layers 4,6 --always-first 2 --always-last 2 --k 5 --surrogate anchor --injection attn_mlp "
        "--policy backfill --adapters a --rank 4 --target tensorrt-rtx --dtype bf16 --max-seq-len 99 "
        "--max-prompt-len 9 --max-batch 2 --weights link --weight-sharing constants --attention native "
        "--workspace-mib 7 --optimization-level 2 --version-compatible "
        "--force --threads 2 --trust-remote-code"
    )
    arguments = parser.parse_args(line.split())
    assert settings_of(ExportOptions, arguments) == ExportOptions(
        drop_layers=("4", "6"),
        always_first=2,
        always_last=2,
        k=5,
        surrogate="anchor",
        injection="attn_mlp",
        policy="backfill",
        adapters=Path("a"),
        rank=4,
        targets=("tensorrt-rtx",),
        dtype="bfloat16",
        max_seq_len=99,
        max_prompt_len=9,
        max_batch=2,
        weights="link",
        weight_sharing="constants",
        attention="native",
        builder=BuilderOptions(workspace_mib=7, optimization_level=2, version_compatible=True),
        force=True,
        threads=2,
        trust_remote_code=True,
    )
    assert parser.parse_args(["--target", "ort", "--target", "none"]).targets == ["ort", "none"]
    assert settings_of(ExportOptions, parser.parse_args(["--no-verify"])) == ExportOptions(verify=False)


def test_flags_that_were_given_are_known_by_name(parser):
    arguments = parser.parse_args(["--k", "3", "--target", "ort", "--no-verify", "--compute-capability", "8.6"])
    assert given_flags(PlanOptions, arguments) == {"--k": 3}
    assert given_flags(BuildOptions, arguments) == {"--target": ["ort"]}
    assert given_flags(BuilderOptions, arguments) == {"--compute-capability": ["8.6"]}


@pytest.mark.parametrize("max_prompt_len", [None, 1])
def test_a_sequence_of_one_token_is_refused_under_its_own_name(max_prompt_len):
    with pytest.raises(InputError) as refused:
        ExportOptions(max_seq_len=1, max_prompt_len=max_prompt_len)
    assert refused.value.fact == "--max-seq-len is too small."
    assert "It is 1; the smallest possible is 2" in refused.value.note
    assert ExportOptions(max_seq_len=2).max_seq_len == 2


def test_a_drop_list_is_read_once(tmp_path):
    (tmp_path / "list.json").write_text('{"drop_layers": [6, 4], "fingerprint": "ab"}')
    options = with_files_read(ExportOptions(drop_list=tmp_path / "list.json", k=2))
    assert options == ExportOptions(drop_layers=(4, 6), drop_list_fingerprint="ab", k=2)
    assert with_files_read(options) is options


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"dtype": "bf16", "targets": ("openvino",)}, {"dtype": "bfloat16", "targets": ("openvino",)}),
        ({"dtype": "fp32"}, {"dtype": "float32"}),
        ({"dtype": "int4", "activation_dtype": "fp16"}, {"dtype": "int4", "activation_dtype": "float16"}),
        (
            {"dtype": "fp8", "kv_dtype": "fp8", "targets": ("none",)},
            {"dtype": "float8_e4m3fn", "kv_dtype": "float8_e4m3fn", "targets": ("none",)},
        ),
    ],
    ids=str,
)
def test_names_of_dtypes_are_those_of_the_command_line_too(given: dict[str, Any], meant: dict[str, Any]) -> None:
    assert ExportOptions(**given) == ExportOptions(**meant)
