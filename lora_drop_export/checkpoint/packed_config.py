"""Forms of quantized checkpoints that are not read, each refused by its name.

Enters: `quantization_config` of config.json. What only the tensors tell is refused in packed.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_drop_runtime.errors import ModelError

from .foreign import CHECKPOINT_HINT

BITS = (4, 8)
FLOAT_FORMATS = ("float-quantized", "naive-quantized")  # the latter where weights alone are rounded
_FLOAT4 = "nvfp4-pack-quantized"
FLOAT_METHODS = ("fp8", "fbgemm_fp8", "modelopt")
_ACTIVATIONS = ["input_activations", "output_activations"]


def refusal(what: str) -> ModelError:
    """The error of a checkpoint that has `what`."""
    return ModelError(
        "The checkpoint is quantized in a form that is not read.",
        note=f"It has {what}. Read are gptq, awq (gemm) and compressed-tensors (pack-quantized) of 4 or 8 bits, "
        "with inputs in their order, fp8 (fp8, fbgemm_fp8, modelopt, and float-quantized of compressed-tensors), NVFP4 "
        "(modelopt, compressed-tensors) and mxfp4 of GPT-OSS.",
        hint="Take the model's float checkpoint, a GGUF file, or one that is quantized otherwise.",
    )


def damaged(name: str, reason: str) -> ModelError:
    """The error of a weight whose parts do not fit."""
    return ModelError(
        "A quantized weight of the checkpoint is damaged.", note=f"{name} {reason}.", hint=CHECKPOINT_HINT
    )


def gptq_format(config: Mapping[str, Any]) -> Any:
    """How zero points are stored, where it is one of those that are read: `gptq` or `gptq_v2`."""
    return config.get("checkpoint_format") or config.get("format") or "gptq"


def _one_of(what: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise refusal(f"{what} {value!r:.80}")


def _check_gptq(config: Mapping[str, Any]) -> None:
    _one_of("gptq with bits", config.get("bits"), BITS)
    _one_of("gptq of format", gptq_format(config), ("gptq", "gptq_v2"))
    _one_of("gptq with is_marlin_format", config.get("is_marlin_format") or False, (False,))
    _one_of("gptq with pack_dtype", config.get("pack_dtype") or "int32", ("int32",))


def _check_awq(config: Mapping[str, Any]) -> None:
    _one_of("awq with bits", config.get("bits", config.get("w_bit")), (4,))
    version = config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
    _one_of("awq of version", str(version).lower(), ("gemm",))


def in_floats(config: Mapping[str, Any]) -> bool:
    """Whether a config that is read is one of weights in fp8 or NVFP4."""
    return config["quant_method"] in FLOAT_METHODS or config.get("format") in (*FLOAT_FORMATS, _FLOAT4)


def in_float4(config: Mapping[str, Any]) -> bool:
    """Whether a config that is read is one of weights in NVFP4."""
    modelopt = config["quant_method"] == "modelopt"
    return config.get("quant_algo") == "NVFP4" if modelopt else config.get("format") == _FLOAT4


def rounds_more(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint in fp8 or NVFP4 is meant for engines that round activations or caches, too."""
    if config["quant_method"] in FLOAT_METHODS:
        return True
    groups = config["config_groups"].values()
    return bool(config.get("kv_cache_scheme")) or any(group.get("input_activations") for group in groups)


def _block(sizes: Any) -> tuple[int, int]:
    """Rows and columns that share a scale, as `[128, 128]` or `128x128`."""
    high, wide = (int(size) for size in (sizes.split("x") if isinstance(sizes, str) else sizes))
    if min(high, wide) < 1:
        raise ValueError(f"blocks of {sizes!r:.80}")
    return high, wide


def float8_blocks(config: Mapping[str, Any]) -> set[tuple[int, int]]:
    """Rows and columns of the blocks that share a scale; none where rows or whole weights do."""
    if config["quant_method"] in FLOAT_METHODS:
        sizes = config.get("weight_block_size", (128, 128)) if config["quant_method"] == "fp8" else None
        return set() if sizes is None else {_block(sizes)}
    weights = [group["weights"] for group in config["config_groups"].values()]
    return {_block(one["block_structure"]) for one in weights if one["strategy"] == "block"}


def _check_float8(config: Mapping[str, Any]) -> None:
    _one_of("fp8 of format", config.get("fmt") or "e4m3", ("e4m3",))
    _one_of("experts of dtype", config.get("expert_dtype") or "fp8", ("fp8",))
    if config["quant_method"] == "modelopt":
        _one_of("modelopt with quant_algo", config.get("quant_algo"), ("FP8", "NVFP4"))
    float8_blocks(config)


def _check_compressed(config: Mapping[str, Any]) -> None:
    _one_of("compressed-tensors of format", config.get("format"), ("pack-quantized", *FLOAT_FORMATS, _FLOAT4))
    floats, small = in_floats(config), in_float4(config)
    formats: tuple[str, ...] = (_FLOAT4,) if small else FLOAT_FORMATS if floats else ("pack-quantized",)
    rounded = ["output_activations"] if floats else _ACTIVATIONS
    if not floats:
        _one_of("compressed-tensors with quantized caches, kv_cache_scheme", config.get("kv_cache_scheme"), (None,))
    _one_of("compressed-tensors with transform_config", config.get("transform_config") or {}, ({},))
    _one_of("sparse weights, sparsity_config", (config.get("sparsity_config") or {}).get("format"), (None, "dense"))
    for group in config["config_groups"].values():
        _one_of("compressed-tensors of format", group.get("format") or formats[0], formats)
        for what in rounded:
            _one_of(f"compressed-tensors with quantized {what}", group.get(what), (None,))
        weights = group["weights"]
        _one_of("compressed-tensors of type", weights.get("type"), ("float",) if floats else ("int",))
        bits = (4,) if small else (8,) if floats else BITS
        _one_of("compressed-tensors with num_bits", weights.get("num_bits"), bits)
        of_floats = ("tensor_group",) if small else ("tensor", "channel", "block")
        _one_of(
            "compressed-tensors with strategy", weights.get("strategy"), of_floats if floats else ("group", "channel")
        )
        if floats:
            _one_of("floats with symmetric", weights.get("symmetric", True), (True,))
        if small:
            _one_of("NVFP4 with group_size", weights.get("group_size"), (16,))
    float8_blocks(config)


_CHECKS = {"gptq": _check_gptq, "awq": _check_awq, "compressed-tensors": _check_compressed}
_CHECKS |= dict.fromkeys(FLOAT_METHODS, _check_float8)


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a form that is not read.

    Raises:
        ModelError: it is one. Whatever else a config of no such shape makes it stumble over.
    """
    _one_of("quant_method", config.get("quant_method"), tuple(_CHECKS))
    _CHECKS[config["quant_method"]](config)
