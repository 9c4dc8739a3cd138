"""Mixtures of experts: their matrices in a checkpoint and in a bundle, their plain ONNX, the kernels of engines.

Whole families are exported and decoded in test_more_families.py.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.batch import Batch
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.engines.openvino.engine import OpenVinoEngine
from lora_drop_runtime.engines.openvino.package import import_openvino
from safetensors.numpy import load_file, save_file

from lora_drop_export.checkpoint.experts import ExpertRows
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.cli import main
from lora_drop_export.decoder.loaded import load_model
from lora_drop_export.weights.resolve import find_tensor
from tests.support.bundles import more_family
from tests.support.models import FEW, build, deepseek_v2, deepseek_v3, gemma4_experts, gpt_oss, granitemoe, qwen2_moe

BOTH = ["--target", "ort", "--target", "openvino"]
WHOLE = ["--always-first", "0", "--always-last", "0", "--max-seq-len", "32", "--threads", "1"]


def mixtral() -> transformers.PreTrainedModel:
    """Of which transformers renames the matrices of experts, and joins them."""
    options = FEW | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return build(transformers.MixtralForCausalLM, transformers.MixtralConfig, seed=63, **options)


def phimoe() -> transformers.PreTrainedModel:
    """Whose router masks scores with a constant of a shape that is known at run time."""
    options = FEW | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return build(transformers.PhimoeForCausalLM, transformers.PhimoeConfig, seed=64, **options)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model, its bundle on the engines that run it) by name and dtype; made when first asked for."""
    made = {}

    def get(builder, dtype):
        if (builder, dtype) not in made:
            source, out = more_family(builder.__name__), tmp_path_factory.mktemp("experts") / "out"
            options = ["--dtype", dtype, "--drop-layers", "1", "--k", "2", *WHOLE]
            with pytest.MonkeyPatch.context() as patch:  # its trace is made once for all files of tests
                patch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: source.traced)
                targets = BOTH[2:] if builder is gemma4_experts else BOTH
                assert main(["--model", str(source.directory), "--out", str(out), *targets, *options]) == 0
            made[builder, dtype] = source.model, out
        return made[builder, dtype]

    return get


@pytest.mark.parametrize("builder", [mixtral, qwen2_moe, granitemoe, gpt_oss, gemma4_experts])
def test_checkpoints_are_read_as_transformers_reads_them(builder, tmp_path):
    """Apart, apart under other names, as one tensor, or as a transposed one; in whatever pieces it is asked for."""
    builder().save_pretrained(tmp_path)
    theirs = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    ours = dict(load_model(str(tmp_path)).model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    checkpoint = open_checkpoint(str(tmp_path), tmp_path / "scratch")
    for name, parameter in theirs.items():
        if parameter.dim() != 3:
            continue
        is_apart = builder is gemma4_experts and "gate_up" in name
        rows = find_tensor(checkpoint, f"{name}.apart" if is_apart else f"{name}.rows")
        assert isinstance(rows, ExpertRows)
        if is_apart:
            want, height = (
                torch.cat([part.flatten(0, 1) for part in parameter.detach().chunk(2, 1)]),
                parameter.shape[1],
            )
        elif builder is gpt_oss:
            want = parameter.detach().transpose(1, 2).flatten(0, 1)
            height = parameter.shape[2]
        else:
            count, height, width = parameter.shape
            turns = 2 if "gate_up" in name else 1
            want = parameter.detach().reshape(count, turns, height // turns, width).transpose(1, 2).reshape(-1, width)
        assert rows.shape == tuple(want.shape)
        assert rows.size_bytes == want.nbytes
        for begin, end in ((0, len(want)), (0, 1), (1, 2), (height - 1, height + 2), (3, 2 * height + 1), (5, 5)):
            assert np.array_equal(rows.rows(begin, end), want[begin:end].numpy()), (name, begin, end)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("builder", [qwen2_moe, granitemoe, gpt_oss, gemma4_experts])
def test_bundles_are_read_back(builder, dtype, exported):
    """What transformers is given of a bundle are the checkpoint's experts, up to their rounding."""
    model, bundle = exported(builder, dtype)
    ours = dict(load_model(str(bundle)).model.named_parameters())
    for name, want in model.named_parameters():
        error = (ours[name] - want).abs().max() / want.abs().max()
        assert error <= (0 if dtype == "fp32" else 1 / 127), name


def neutral_logits(root, ids):
    """Of each token of a prompt, by ONNX Runtime without its own operators for experts."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(root))
    session = onnxruntime.InferenceSession((root / "refresh.onnx").read_bytes(), options)
    rows, length = ids.shape
    feeds = {"input_ids": ids, "logits_index": np.tile(np.arange(length), (rows, 1))}
    for one in session.get_inputs():
        if one.name.startswith("past_"):
            heads = Bundle.open(root).manifest.model.heads[int(one.name.rpartition(".")[2])]
            feeds[one.name] = np.zeros((rows, heads.kv_heads, length, heads.head_dim), np.float32)
        elif one.name.startswith("len_"):
            feeds[one.name] = np.zeros(rows, np.int64)
    return session.run(["logits"], feeds)[0]


@pytest.mark.parametrize("builder", [granitemoe, gpt_oss, gemma4_experts])
def test_the_neutral_graph_is_plain_onnx(builder, exported):
    """Any runtime of ONNX computes what transformers does."""
    model, root = exported(builder, "fp32")
    ids = np.random.default_rng(3).integers(0, 131, (2, 7))
    with torch.no_grad():
        want = model(torch.tensor(ids)).logits.numpy()
    assert np.abs(neutral_logits(root, ids) - want).max() < 3e-5 * np.abs(want).max()


def test_what_overflows_and_was_not_chosen_counts_nothing(tmp_path, monkeypatch):
    """In the neutral graph every expert computes every token; in fp16 one need not have numbers for all."""
    source = more_family("qwen2_moe")
    model = copy.deepcopy(source.model)
    mixture = model.model.layers[1].mlp
    with torch.no_grad():
        mixture.experts.down_proj[0] *= 3e38
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: source.traced)
    model.save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--target", "none", *WHOLE]
    assert main([option for option in options if option not in ("--threads", "1")]) == 0
    ids, chosen = np.random.default_rng(3).integers(0, 131, (2, 20)), []
    hook = mixture.experts.register_forward_pre_hook(lambda _, args: chosen.append((args[1] == 0).any(-1)))
    with torch.no_grad():
        want = model(torch.tensor(ids)).logits.numpy()
    hook.remove()
    others = ~chosen[0].numpy().reshape(ids.shape)
    assert 10 < others.sum() < 38
    found = neutral_logits(tmp_path / "out", ids)[others]
    assert np.abs(found - want[others]).max() < 3e-5 * np.abs(want[others]).max()


def test_experts_may_count_less_than_nothing(tmp_path, monkeypatch):
    """A router's weights are those of Gemma 4 times a factor that each expert has, of any sign."""
    source = more_family("gemma4_experts")
    model = copy.deepcopy(source.model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.router.per_expert_scale.copy_(torch.tensor([0.7, -0.8, 0.0, 1.3, -1.1, 0.9]))
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: source.traced)
    options = ["--target", "openvino", "--drop-layers", "1", *WHOLE]
    assert main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *options]) == 0
    ids = np.random.default_rng(3).integers(0, 131, (2, 7))
    with torch.no_grad():
        want = model(torch.tensor(ids)).logits.numpy()
    assert np.abs(neutral_logits(tmp_path / "out", ids) - want).max() < 3e-5 * np.abs(want).max()
    with Session.open(tmp_path / "out", threads=1) as session:
        logits = session.prefill(list(ids), max_new_tokens=1)
    assert np.abs(logits - want[:, -1]).max() < 3e-5 * np.abs(want).max()


@pytest.mark.parametrize(
    ("builder", "router"),
    [(qwen2_moe, "model.layers.*.mlp.gate.weight"), (granitemoe, "model.layers.*.block_sparse_moe.router.weight")],
)
def test_routers_alone_stay_in_float(builder, router, exported):
    """Linear layers of shared experts are quantized, which torch writes as another operator."""
    _, root = exported(builder, "int4")
    departures = Bundle.open(root).manifest.quantization["departures"]
    assert [one["weights"] for one in departures if one["block_size"] is None] == [router]


@pytest.mark.parametrize("target", ["ort", "openvino"])
@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_rows_do_not_depend_on_their_neighbours(target, dtype, exported):
    """Tokens of several rows go to the same experts in one call."""
    _, bundle = exported(granitemoe, dtype)
    prompts = [np.array(ids) for ids in ([5, 7, 9], [1, 2, 3, 4, 5, 6, 7, 8], [100], [9, 8, 7, 6])]
    with Session.open(bundle, target=target, threads=1) as session:
        alone = [session.generate([prompt], max_new_tokens=9)[0].tolist() for prompt in prompts]
    found = {}
    with Batch.open(bundle, slots=3, target=target, threads=1) as batch:
        rows = {batch.add(prompt, max_new_tokens=9): n for n, prompt in enumerate(prompts[:3])}
        waiting = prompts[3:]
        while len(found) < len(prompts) or batch.rows:
            for event in batch.tick():
                if event.token is not None:
                    found.setdefault(rows[event.row], []).append(event.token)
                if event.finished is not None and waiting:
                    rows[batch.add(waiting.pop(), max_new_tokens=9)] = len(rows)
    assert [found[n] for n in range(len(prompts))] == alone


def test_openvino_reads_the_chosen_experts_alone(exported):
    """Its plugin finds the form that a mixture is written in; else all experts would run, right and many times slower.

    The dropped layer's stands in an If, whose inside it does not show.
    """
    for builder, dtype, products in (
        (granitemoe, "fp32", 2),
        (granitemoe, "int4", 2),
        (gpt_oss, "fp32", 2),
        (gpt_oss, "int8", 2),
        (gemma4_experts, "fp32", 3),
        (gemma4_experts, "int8", 3),
    ):
        _, root = exported(builder, dtype)
        engine = OpenVinoEngine(Bundle.open(root), threads=1)
        nodes = engine.compiled.model.get_runtime_model().get_ops()
        kinds = [node.get_rt_info()["layerType"].astype(str) for node in nodes]
        assert kinds.count("GatherMatmul") == products, (builder, dtype)
        assert "Tile" not in kinds


def test_ort_refuses_gates_of_gelu(exported, tmp_path, monkeypatch, capsys):
    source = more_family("gemma4_experts")
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: source.traced)
    _, bundle = exported(gemma4_experts, "fp32")
    capsys.readouterr()
    for options in (["--model", str(source.directory), "--out", str(tmp_path / "out")], ["--out", str(bundle)]):
        assert main([*options, *(["--add-target", "ort"] if len(options) == 2 else WHOLE)]) == 2
        printed = " ".join(capsys.readouterr().err.split())
        assert "Target ort does not run experts whose gate is GELU." in printed
        assert "Use --target openvino." in printed


def test_biases_of_nothing(tmp_path, monkeypatch):
    """OpenVINO leaves out what adds zeros, and the form that it knows is another one then: all experts would run, and
    their matrices lie in memory as floats."""
    source = more_family("gpt_oss")
    model = copy.deepcopy(source.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj_bias"):
                parameter.zero_()
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: source.traced)
    options = ["--target", "openvino", "--dtype", "int4", "--drop-layers", "1", *WHOLE]
    assert main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *options]) == 0
    engine = OpenVinoEngine(Bundle.open(tmp_path / "out"), threads=1)
    nodes = engine.compiled.model.get_runtime_model().get_ops()
    assert [node.get_rt_info()["layerType"].astype(str) for node in nodes].count("GatherMatmul") == 2


def test_a_token_reads_a_share_of_the_experts(exported):
    """2 of 6 experts of layer 1; layer 0 is dense."""
    model, root = exported(qwen2_moe, "fp32")
    facts = Bundle.open(root).manifest.model
    sizes = [sum(p.numel() for p in layer.parameters()) * 4 for layer in model.model.layers]
    experts = sum(p.numel() for p in model.model.layers[1].mlp.experts.parameters()) * 4
    assert facts.layer_bytes == tuple(sizes)
    assert facts.expert_bytes == (0, experts)
    assert [facts.read_bytes(layer) for layer in (0, 1)] == [sizes[0], sizes[1] - experts * 2 // 3]
    assert facts.read_bytes(1, tokens=2) == sizes[1] - round(experts * (2 / 3) ** 2)


@pytest.mark.skipif(
    "BF16" not in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
    reason="this processor does not compute in bfloat16 (OpenVINO says so)",
)
@pytest.mark.parametrize("builder", [gpt_oss, phimoe])
def test_bfloat16_is_compared_in_float32(builder, tmp_path, capsys):
    """Where it does not tell two experts apart a router's choice falls the other way, and so does the token."""
    builder().save_pretrained(tmp_path / "model")
    bundle, options = tmp_path / "out", ["--target", "openvino", "--dtype", "bf16", "--drop-layers", "1", "--k", "2"]
    assert main(["--model", str(tmp_path / "model"), "--out", str(bundle), *options, *WHOLE]) == 0
    assert "those that round activations to bfloat16, which run, the median cosine is" in capsys.readouterr().err
    verification = Bundle.open(bundle).manifest.verification["openvino"]
    assert verification["min_cosine"] > 0.999999
    assert 0.95 < verification["rounded_cosine"] < 0.99999


def _other_rows(tensors, prefix):
    for part in ("gate", "up"):  # the first rows of which would do
        tensors[f"{prefix}.3.{part}_proj.weight"] = np.zeros((48, 64), np.float32)


def _other_columns(tensors, prefix):
    tensors[f"{prefix}.3.up_proj.weight"] = np.zeros((32, 48), np.float32)


def _no_matrix(tensors, prefix):
    tensors[f"{prefix}.0.gate_proj.weight"] = np.zeros(32 * 64, np.float32)


def _together_too(tensors, prefix):
    tensors[f"{prefix}.down_proj"] = np.zeros((6, 64, 32), np.float32)


def _integers(tensors, prefix):
    tensors[f"{prefix}.3.up_proj.weight"] = np.zeros((32, 64), np.uint8)


def _another_number(tensors, prefix):
    tensors[f"{prefix}.03.up_proj.weight"] = np.zeros((32, 64), np.float32)


def _none_there(tensors, prefix):
    del tensors[f"{prefix}.3.up_proj.weight"]


def _apart(tensors, prefix):
    for part in ("gate", "up"):
        matrices = [tensors.pop(f"{prefix}.{number}.{part}_proj.weight") for number in range(6)]
        tensors[f"{prefix}.{part}_proj"] = np.stack(matrices)


@pytest.mark.parametrize(
    ("damage", "error", "note"),
    [
        (_apart, "does not hold the model", "experts.gate_up_proj (6, 64, 64) is missing"),
        (_none_there, "does not hold the model", "64) model.layers.1.mlp.experts.3.up_proj.weight is missing."),
        (_other_rows, "not matrices of one shape", "3.gate_proj.weight is (48, 64), and"),
        (_other_columns, "not matrices of one shape", "3.up_proj.weight is (32, 48), and"),
        (_no_matrix, "not matrices of one shape", "0.gate_proj.weight is (2048,).\n"),
        (_integers, "in a dtype that is not taken", "3.up_proj.weight is uint8; "),
        (_together_too, "holds a matrix of an expert twice", "experts.down_proj and"),
        (_another_number, "holds a matrix of an expert twice", "03.up_proj.weight and"),
    ],
)
def test_experts_that_transformers_cannot_join(damage, error, note, tmp_path, capsys):
    """Nothing of a matrix is left out, and no one of two is taken."""
    qwen2_moe().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    damage(tensors, "model.layers.1.mlp.experts")
    save_file(tensors, file)
    assert main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *WHOLE]) == 2
    said = capsys.readouterr().err
    assert error in said
    assert note in said
    assert "tracing the model" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("builder", "name", "number"),
    [
        (qwen2_moe, "num_experts_per_tok", 0),
        (qwen2_moe, "num_experts_per_tok", 99),
        (gemma4_experts, "top_k_experts", 7),
    ],
)
def test_routers_that_choose_nothing_or_too_many(builder, name, number, tmp_path, capsys):
    builder().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {name: number}), "utf-8")
    assert main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *WHOLE]) == 2
    assert f"Its routers send a token to {number} experts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("builder", "numbers", "said"),
    [
        (deepseek_v3, {"n_group": 3}, "1 groups (topk_group) of 3 (n_group); there are 4 experts"),
        (deepseek_v3, {"n_group": 0}, "1 groups (topk_group) of 0 (n_group)"),
        (deepseek_v3, {"n_group": 4, "topk_group": 2}, "2 groups (topk_group) of 4 (n_group)"),
        (deepseek_v3, {"topk_group": 3}, "3 groups (topk_group) of 2 (n_group)"),
        (deepseek_v3, {"num_experts_per_tok": 3}, "3 experts out of 1 groups (topk_group) of 2 (n_group)"),
        (deepseek_v2, {"topk_method": "group_limited_greedy"}, "None groups (topk_group) of None (n_group)"),
    ],
)
def test_groups_that_the_experts_do_not_make(builder, numbers, said, tmp_path, capsys):
    builder().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | numbers), "utf-8")
    assert main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *WHOLE]) == 2
    assert said in capsys.readouterr().err


def test_experts_of_a_model_that_sees(tmp_path):
    """Its decoder's tensors have a prefix; transformers renames and joins what stands behind it, and so do we."""
    seen = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    seen |= {"image_size": 28, "patch_size": 14}
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=mixtral().config, vision_config=transformers.CLIPVisionConfig(**seen), image_token_id=130
        )
    ).eval()
    model.save_pretrained(tmp_path / "model")
    assert "language_model.model.layers.1.block_sparse_moe.experts.3.w2.weight" in load_file(
        tmp_path / "model" / "model.safetensors"
    )
    bundles = tmp_path / "out", tmp_path / "again"
    for source, out in zip((tmp_path / "model", bundles[0]), bundles, strict=True):
        assert main(["--model", str(source), "--out", str(out), "--drop-layers", "1", *WHOLE]) == 0
    prompt = [7, 3, 11, 19, 2]
    with torch.no_grad():
        want = model(input_ids=torch.tensor([prompt])).logits[0, -1].numpy()
    for bundle in bundles:
        with Session.open(bundle, threads=1) as session:
            logits = session.prefill([prompt], max_new_tokens=1)[0]
        assert np.abs(logits - want).max() < 3e-5 * np.abs(want).max()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_routers_in_float32(dtype, tmp_path):
    """They keep matrices in float32 whatever the model's dtype is; the types of the neutral graph fit all the same."""
    options = FEW | {"num_experts": 4, "moe_topk": 2, "head_dim": 16}
    model = build(transformers.HunYuanMoEV1ForCausalLM, transformers.HunYuanMoEV1Config, seed=64, **options)
    model.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--max-seq-len", "32"]
    assert main([*arguments, "--target", "none", "--dtype", dtype]) == 0
    onnx.checker.check_model(str(tmp_path / "out" / "refresh.onnx"), full_check=True)


def test_halves_on_ort(tmp_path, capsys):
    """Its operator runs in float32, or over integers; refused before weights are read."""
    granitemoe().save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--dtype", "bf16", *WHOLE]
    assert main(options) == 2
    printed = capsys.readouterr().err
    assert "does not run experts in half precision" in printed
    assert "Hint: Use --dtype fp32" in printed
    assert "weights:" not in printed
    assert main(["int4" if one == "bf16" else one for one in options] + ["--activation-dtype", "bf16"]) == 2
    assert "Hint: Leave --activation-dtype out." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([one for one in options if one not in ("--threads", "1")] + ["--target", "none"]) == 0
    capsys.readouterr()
    assert main(["--out", str(tmp_path / "out"), "--add-target", "ort"]) == 2
    printed = capsys.readouterr().err
    assert "does not run experts in half precision" in printed
    assert "Hint: Export the model again with --dtype fp32" in printed  # a bundle's is fixed


def _packed(tensors, name, values, size=16):
    """Put a weight into a checkpoint as compressed-tensors packs it, and return what it is then."""
    blocks = values.reshape(len(values), -1, size)
    scales = (np.abs(blocks).max(-1, keepdims=True) / 7).astype(np.float32)
    integers = np.clip(np.round(blocks / scales), -8, 7)
    nibbles = (integers + 8).astype(np.uint32).reshape(len(values), -1, 8)
    words = (nibbles << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32).view(np.int32)
    stem = name.removesuffix(".weight")
    tensors |= {f"{stem}.weight_packed": words, f"{stem}.weight_scale": scales[..., 0]}
    tensors[f"{stem}.weight_shape"] = np.array(values.shape, np.int64)
    return (integers * scales).reshape(values.shape)


def test_quantized_experts_keep_their_integers(tmp_path, capsys, monkeypatch):
    """Matrices that lie apart, each quantized, become one of the same integers; nothing is rounded again."""
    source = more_family("qwen2_moe")
    source.model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: source.traced)
    file, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    tensors, want = load_file(file), {}
    for name in [name for name in tensors if ".experts." in name]:
        want[name] = _packed(tensors, name, tensors.pop(name))
    save_file(tensors, file)
    weights = {"num_bits": 4, "group_size": 16, "strategy": "group", "symmetric": True, "type": "int"}
    group = {"format": "pack-quantized", "input_activations": None, "output_activations": None, "targets": ["Linear"]}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    quantization |= {"config_groups": {"group_0": group | {"weights": weights}}}
    config.write_text(
        json.dumps(json.loads(config.read_text("utf-8")) | {"quantization_config": quantization}), "utf-8"
    )
    options = [*BOTH, "--drop-layers", "1", *WHOLE]
    assert main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *options]) == 0
    for place in (tmp_path / "model", tmp_path / "out"):
        experts = load_model(str(place)).model.model.layers[1].mlp.experts
        prefix = "model.layers.1.mlp.experts"
        for e in range(6):
            gate, up, down = (want[f"{prefix}.{e}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            assert np.array_equal(experts.gate_up_proj[e].numpy(), np.concatenate([gate, up]))
            assert np.array_equal(experts.down_proj[e].numpy(), down)
    assert "left out" not in capsys.readouterr().err
