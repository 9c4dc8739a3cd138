"""Forms of quantized checkpoints that are not read, each refused by its name.

Enters: `quantization_config` of config.json. What only the tensors tell is refused in packed.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_drop_runtime.errors import ModelError

BITS = (4, 8)
FLOAT_FORMATS = ("float-quantized", "naive-quantized")  # the latter where weights alone are rounded
_ACTIVATIONS = ["input_activations", "output_activations"]


def refusal(what: str) -> ModelError:
    """The error of a checkpoint that has `what`."""
    return ModelError(
        "The checkpoint is quantized in a form that is not read.",
        note=f"It has {what}. Read are gptq, awq (gemm) and compressed-tensors (pack-quantized) of 4 or 8 bits, "
        "with inputs in their order, compressed-tensors of fp8 (float-quantized), a scale per channel or tensor, and "
        "mxfp4 of GPT-OSS.",
        hint="Take the model's float checkpoint, a GGUF file, or one that is quantized otherwise.",
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


def in_float8(config: Mapping[str, Any]) -> bool:
    """Whether a config that is read is one of compressed-tensors in fp8."""
    return config.get("format") in FLOAT_FORMATS


def rounded_activations(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint in fp8 is meant for engines that round activations, too."""
    groups = config["config_groups"].values() if in_float8(config) else ()
    return any(group.get("input_activations") for group in groups)


def _check_compressed(config: Mapping[str, Any]) -> None:
    _one_of("compressed-tensors of format", config.get("format"), ("pack-quantized", *FLOAT_FORMATS))
    floats = in_float8(config)
    formats, rounded = (FLOAT_FORMATS, ["output_activations"]) if floats else (("pack-quantized",), _ACTIVATIONS)
    _one_of("compressed-tensors with quantized caches, kv_cache_scheme", config.get("kv_cache_scheme"), (None,))
    _one_of("compressed-tensors with transform_config", config.get("transform_config") or {}, ({},))
    _one_of("sparse weights, sparsity_config", (config.get("sparsity_config") or {}).get("format"), (None, "dense"))
    for group in config["config_groups"].values():
        _one_of("compressed-tensors of format", group.get("format") or formats[0], formats)
        for what in rounded:
            _one_of(f"compressed-tensors with quantized {what}", group.get(what), (None,))
        weights = group["weights"]
        _one_of("compressed-tensors of type", weights.get("type"), ("float",) if floats else ("int",))
        _one_of("compressed-tensors with num_bits", weights.get("num_bits"), (8,) if floats else BITS)
        strategies = ("tensor", "channel") if floats else ("group", "channel")
        _one_of("compressed-tensors with strategy", weights.get("strategy"), strategies)
        if floats:
            _one_of("fp8 weights with symmetric", weights.get("symmetric", True), (True,))


_CHECKS = {"gptq": _check_gptq, "awq": _check_awq, "compressed-tensors": _check_compressed}


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a form that is not read.

    Raises:
        ModelError: it is one. Whatever else a config of no such shape makes it stumble over.
    """
    _one_of("quant_method", config.get("quant_method"), tuple(_CHECKS))
    _CHECKS[config["quant_method"]](config)
