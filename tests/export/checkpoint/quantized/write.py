"""Writes the checkpoints beside this file with the libraries themselves, each in an environment of its own.

    python write.py llmcompressor DIRECTORY      llmcompressor and compressed-tensors
    python write.py gptqmodel DIRECTORY
    python write.py autoawq DIRECTORY

Each is a Llama of two layers with random weights, quantized on random tokens, in a folder of its own. Beside the files
that the library wrote lies reference.json: the library and its version, and the SHA-256 of each quantized weight [N, K]
as the library itself dequantizes it, in the dtype of the scales, little-endian.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, WINDOWS, WINDOW = 40, 16, 32


def model(dtype: torch.dtype) -> LlamaForCausalLM:
    """Down projections have 96 columns: three groups of 32, an odd number."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(7)
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return made.to(dtype)


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token; the libraries ask for one, and the checkpoints have none."""
    words = {f"w{token}": token for token in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w0")), pad_token="w0")


def saved(dtype: torch.dtype, scratch: str) -> str:
    """The float checkpoint."""
    directory = f"{scratch}/float"
    model(dtype).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def token_windows() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (WINDOWS, WINDOW), generator=torch.Generator().manual_seed(8))


def keep(source: Path, target: Path, library: str, weights: Mapping[str, torch.Tensor], what: str) -> None:
    """Take over config and weights, and say what the library makes of them."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, target / name)
    digests = {
        name: hashlib.sha256(weight.detach().contiguous().view(torch.int16).numpy().tobytes()).hexdigest()
        for name, weight in sorted(weights.items())
    }
    (dtype,) = {str(weight.dtype).removeprefix("torch.") for weight in weights.values()}
    versions = {name: importlib.metadata.version(name) for name in (library, "transformers", "torch")}
    written = {"written_by": what, "versions": versions, "dtype": dtype, "sha256": digests}
    (target / "reference.json").write_text(json.dumps(written, indent=1) + "\n")


# ── llmcompressor, compressed-tensors ────────────────────────────────────────────────────────────────────────────


def llmcompressor(out: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from safetensors.torch import load_file

    data = Dataset.from_dict({"input_ids": token_windows().tolist(), "attention_mask": [[1] * WINDOW] * WINDOWS})
    floats, blocks = {"type": "float", "num_bits": 8}, {"strategy": "block", "block_structure": [32, 32]}
    nvfp4 = {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16}
    nvfp4 |= {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
    rows: list[tuple[str, type, torch.dtype, dict[str, Any], dict[str, Any] | None]] = [
        ("group-32", GPTQModifier, torch.bfloat16, {"num_bits": 4, "strategy": "group", "group_size": 32}, None),
        ("asymmetric", GPTQModifier, torch.float16, {"num_bits": 4, "strategy": "group", "group_size": 32}, None),
        ("channel", QuantizationModifier, torch.bfloat16, {"num_bits": 4, "strategy": "channel"}, None),
        ("8-bit", QuantizationModifier, torch.float16, {"num_bits": 8, "strategy": "group", "group_size": 32}, None),
        ("fp8-channel", QuantizationModifier, torch.bfloat16, floats | {"strategy": "channel"}, None),
        (
            *("fp8-dynamic", QuantizationModifier, torch.bfloat16, floats | {"strategy": "channel"}),
            floats | {"strategy": "token", "dynamic": True},
        ),
        (
            *("fp8-tensor", QuantizationModifier, torch.float16, floats | {"strategy": "tensor"}),
            floats | {"strategy": "tensor"},
        ),
        ("fp8-block", QuantizationModifier, torch.bfloat16, floats | blocks, None),
        ("nvfp4", QuantizationModifier, torch.bfloat16, nvfp4, None),
    ]
    for name, modifier, dtype, given, activations in rows:
        symmetric = name not in ("asymmetric", "8-bit")
        args = QuantizationArgs(**({"type": "int", "symmetric": symmetric} | given))
        inputs = None if activations is None else QuantizationArgs(**activations)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
        options = {"actorder": None} if modifier is GPTQModifier else {}
        recipe = modifier(config_groups={"group_0": scheme}, ignore=["lm_head"], **options)
        with tempfile.TemporaryDirectory() as scratch:
            whole, made = saved(dtype, scratch), Path(scratch, "quantized")
            sizes = {"max_seq_length": WINDOW, "num_calibration_samples": WINDOWS}
            oneshot(model=whole, dataset=data, recipe=recipe, output_dir=str(made), precision="auto", **sizes)
            stored = load_file(made / "model.safetensors")
            form = json.loads((made / "config.json").read_text())["quantization_config"]["format"]
            library = BaseCompressor.get_value_from_registry(form)
            weights = {}
            for full_name in [n for n in stored if n.endswith(".weight_scale")]:
                prefix = full_name.removesuffix("weight_scale")
                parts = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
                weights[f"{prefix}weight"] = library.decompress(parts, scheme)["weight"]
            what = f"{modifier.__name__} of llmcompressor, dequantized by compressed-tensors"
            keep(made, out / f"compressed-tensors-{name}", "llmcompressor", weights, what)


# ── GPTQModel ────────────────────────────────────────────────────────────────────────────────────────────────────


def gptqmodel(out: Path) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    data = [{"input_ids": row.tolist(), "attention_mask": [1] * WINDOW} for row in token_windows()]
    rows: dict[str, dict[str, Any]] = {
        "gptq-group-32": {"bits": 4, "group_size": 32, "sym": True},
        "gptq-asymmetric": {"bits": 4, "group_size": 32, "sym": False},
        "gptq-v2": {"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"},
        "gptq-8-bit-channel": {"bits": 8, "group_size": -1, "sym": True},
        "gptq-act-order": {"bits": 4, "group_size": 32, "sym": True, "desc_act": True},
    }
    for name, options in rows.items():
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch, "quantized")
            config = QuantizeConfig(
                **({"desc_act": False, "act_group_aware": False, "device": "cpu", "offload_to_disk": False} | options)
            )
            whole = GPTQModel.load(saved(torch.float16, scratch), config, dtype=torch.float16)
            whole.quantize(data, batch_size=1)
            whole.save(str(made))
            again = GPTQModel.load(str(made), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
            weights = {
                f"{module_name}.weight": module.dequantize_weight().T
                for module_name, module in again.model.named_modules()
                if isinstance(module, BaseQuantLinear)
            }
            keep(made, out / name, "gptqmodel", weights, "GPTQModel, dequantized by its TorchQuantLinear")


# ── AutoAWQ ──────────────────────────────────────────────────────────────────────────────────────────────────────


def autoawq(out: Path) -> None:
    from awq import AutoAWQForCausalLM
    from awq.modules.linear import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, "quantized")
        whole = AutoAWQForCausalLM.from_pretrained(saved(torch.float16, scratch), device_map="cpu")
        config = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
        windows = token_windows().tolist()
        options = {"max_calib_seq_len": WINDOW, "apply_clip": False}  # clipping wants multiples of 64 rows
        whole.quantize(tokenizer(), quant_config=config, calib_data=windows, **options)
        whole.save_quantized(str(made))
        weights = {
            f"{name}.weight": dequantize_gemm(m.qweight, m.qzeros, m.scales, m.w_bit, m.group_size).T
            for name, m in whole.model.named_modules()
            if isinstance(m, WQLinear_GEMM)
        }
        keep(made, out / "awq-group-32", "autoawq", weights, "AutoAWQ, dequantized by its dequantize_gemm")


if __name__ == "__main__":
    {"llmcompressor": llmcompressor, "gptqmodel": gptqmodel, "autoawq": autoawq}[sys.argv[1]](Path(sys.argv[2]))
