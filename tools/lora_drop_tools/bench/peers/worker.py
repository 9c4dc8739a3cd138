"""One other runtime in a process of its own, for `lora-drop bench --peers`.

    python worker.py prepare NAME '{"source": …, "precision": …, "out": …, "threads": n}'
    python worker.py serve   NAME '{"model": …, "threads": n, "capacity": tokens}'

`prepare` makes what the peer loads and prints one line, {"model": path, "built": what was done}. `serve` loads it once,
prints {"ready": what it loaded, "version": the peer's}, then answers each line {"prompt": [ids], "new_tokens": N} with
{"tokens": [N ids], "prefill_seconds": to the first token, "step_seconds": [N − 1]}. Tokens are greedy, end tokens are
ignored. A failure is {"error": text}. Between requests it waits in a read, without using the processor.

Runs as a file and imports nothing of this project: a peer may live in another Python than the tools. No file beside
it may have the name of a module that others import.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Emit = Callable[[int], None]
Generate = Callable[[list[int], int, Emit], None]  # prompt, number of new tokens, called with each as it is chosen
# llama.cpp's general.file_type: what counts as a precision, and what another file is requantized to (the first)
LLAMA_FILE_TYPES = {"float32": (0,), "int8": (7,), "int4": (2, 3)}
LLAMA_NAMES = {0: "F32", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0"}
WEIGHT_FORMATS = {"float32": "fp32", "int8": "int8", "int4": "int4"}  # in onnxruntime-genai's words, and OpenVINO's
PACKAGES = {"llama.cpp": "llama-cpp-python"}  # whose version is a peer's, where that has another name
# Without modules of the directory that the user is in, where this Python can leave them out
PYTHON = [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else [])]
PREFILL_CHUNK = 512  # tokens, llama.cpp's own default


def _end_with_parent() -> None:
    """Have Linux kill this process when the one that started it dies, however that dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def _build(command: list[str]) -> None:
    """Run a peer's own builder, a module of this Python, whose output goes to the log.

    Raises:
        RuntimeError: it fails; with the last line that it wrote.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    last = ""
    with subprocess.Popen(command, preexec_fn=_end_with_parent, **pipes) as process:
        for line in process.stdout or ():
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip() or last
    if process.returncode:
        raise RuntimeError(f"{command[len(PYTHON) + 1]} ended with code {process.returncode}: {last[-200:]}")


@contextlib.contextmanager
def _made(model: Path) -> Iterator[str]:
    """Another name, under which to make a model; whole, it gets its own, in place of what an earlier run made."""
    part = f"{model}.part"
    shutil.rmtree(part, ignore_errors=True)
    yield part
    if model.is_dir():
        shutil.rmtree(model)
    Path(part).replace(model)


def prepare_genai(source: str, precision: str, out: str, threads: int) -> dict[str, str]:
    """Its own model builder on a Hugging Face directory."""
    model = Path(out) / "genai"
    options = [] if precision == "float32" else ["--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]
    options = ["-p", WEIGHT_FORMATS[precision], *options]
    builder = [*PYTHON, "-m", "onnxruntime_genai.models.builder", "-i", source]
    with _made(model) as part:
        _build([*builder, "-o", part, "-e", "cpu", "-c", f"{out}/genai-cache", *options])
    return {"model": str(model), "built": " ".join(["builder", *options])}


def open_genai(model: str, threads: int, capacity: int) -> Generate:
    import onnxruntime_genai as og

    config = og.Config(model)
    options = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    loaded = og.Model(config)

    def generate(prompt: list[int], new_tokens: int, emit: Emit) -> None:
        length = len(prompt) + new_tokens
        params = og.GeneratorParams(loaded)
        # min_length keeps end tokens from ending it
        params.set_search_options(
            max_length=length, min_length=length, do_sample=False, repetition_penalty=1.0, batch_size=1
        )
        generator = og.Generator(loaded, params)
        generator.append_tokens(prompt)
        for _ in range(new_tokens):
            generator.generate_next_token()
            emit(int(generator.get_next_tokens()[0]))

    return generate


def _pointer(pointer: Any, what: str) -> Any:
    if not pointer:
        raise RuntimeError(f"llama.cpp could not {what}")
    return pointer


def prepare_llama(source: str, precision: str, out: str, threads: int) -> dict[str, str]:
    """The GGUF file as it is where its type matches, else requantized."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    vocabulary = _pointer(llama_cpp.llama_model_load_from_file(source.encode(), params), "read the GGUF file")
    text = ctypes.create_string_buffer(64)
    llama_cpp.llama_model_meta_val_str(vocabulary, b"general.file_type", text, len(text))
    llama_cpp.llama_model_free(vocabulary)
    file_type = int(text.value or b"-1")
    wanted = LLAMA_FILE_TYPES[precision]
    if file_type in wanted:
        return {"model": source, "built": f"{LLAMA_NAMES[file_type]} as given"}
    model = Path(out) / f"llama-{LLAMA_NAMES[wanted[0]]}.gguf"
    quantize = llama_cpp.llama_model_quantize_default_params()
    quantize.nthread = threads
    quantize.ftype = wanted[0]
    quantize.allow_requantize = True
    with _made(model) as part:
        if llama_cpp.llama_model_quantize(source.encode(), part.encode(), ctypes.byref(quantize)):
            raise RuntimeError(f"llama.cpp could not make {LLAMA_NAMES[wanted[0]]} of file type {file_type}")
    return {"model": str(model), "built": f"requantized to {LLAMA_NAMES[wanted[0]]}"}


def open_llama(model: str, threads: int, capacity: int) -> Generate:
    """Its C interface: a decode and an argmax over the logits for each token."""
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    loaded = _pointer(llama_cpp.llama_model_load_from_file(model.encode(), params), "load the model")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = capacity
    options.n_batch = PREFILL_CHUNK
    options.n_threads = options.n_threads_batch = threads
    context = _pointer(llama_cpp.llama_init_from_model(loaded, options), "make a context")
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))

    def decode(tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)  # the batch only points to it
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")

    def generate(prompt: list[int], new_tokens: int, emit: Emit) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        for begin in range(0, len(prompt), PREFILL_CHUNK):
            decode(prompt[begin : begin + PREFILL_CHUNK])
        for index in range(new_tokens):
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocab_size,))
            token = int(logits.argmax())
            emit(token)
            if index + 1 < new_tokens:
                decode([token])

    return generate


def prepare_directory(source: str, precision: str, out: str, threads: int) -> dict[str, str]:
    return {"model": source, "built": "the directory as given"}


def _generate_of(model: Any) -> Generate:
    """`generate` with a streamer, which is given the prompt and then each token as it is chosen."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):  # type: ignore[misc]
        def __init__(self, emit: Emit) -> None:
            self.emit, self.prompt_seen = emit, False

        def put(self, value: Any) -> None:
            if self.prompt_seen:
                self.emit(int(value.reshape(-1)[0]))
            self.prompt_seen = True

        def end(self) -> None:
            pass

    # Greedy, and no end tokens, whatever the checkpoint's own generation config says
    model.generation_config = GenerationConfig(do_sample=False, use_cache=True)

    def generate(prompt: list[int], new_tokens: int, emit: Emit) -> None:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, streamer=Streamer(emit)
            )

    return generate


def open_transformers(model: str, threads: int, capacity: int) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    return _generate_of(loaded)


def prepare_optimum(source: str, precision: str, out: str, threads: int) -> dict[str, str]:
    from optimum.onnxruntime import ORTModelForCausalLM

    model = Path(out) / "optimum"
    with _made(model) as part:
        ORTModelForCausalLM.from_pretrained(source, export=True, trust_remote_code=False).save_pretrained(part)
    return {"model": str(model), "built": "ORTModelForCausalLM.from_pretrained(export=True)"}


def open_optimum(model: str, threads: int, capacity: int) -> Generate:
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    torch.set_num_threads(threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return _generate_of(ORTModelForCausalLM.from_pretrained(model, session_options=options, trust_remote_code=False))


def _group_size(source: str) -> int:
    """The largest of 128, 64 and 32 that divides what a layer's matrices read; 128 is the exporter's default."""
    config = json.loads(Path(source, "config.json").read_text(encoding="utf-8"))
    hidden, heads, inner = (config.get(name) for name in ("hidden_size", "num_attention_heads", "intermediate_size"))
    if None in (hidden, heads, inner):
        return 128
    widths = (hidden, inner, heads * (config.get("head_dim") or hidden // heads))
    return next(size for size in (128, 64, 32) if size == 32 or not any(width % size for width in widths))


def prepare_openvino_genai(source: str, precision: str, out: str, threads: int) -> dict[str, str]:
    """Its own export, by Optimum."""
    model = Path(out) / "openvino-genai"
    options = ["--weight-format", WEIGHT_FORMATS[precision]]
    if precision == "int4":
        options += ["--group-size", str(_group_size(source))]
    exporter = [*PYTHON, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", source]
    with _made(model) as part:
        _build([*exporter, "--task", "text-generation-with-past", *options, part])
    return {"model": str(model), "built": " ".join(["optimum-cli export openvino", *options])}


def open_openvino_genai(model: str, threads: int, capacity: int) -> Generate:
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # else a prompt that comes again is not read again
    pipeline = openvino_genai.LLMPipeline(model, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads)

    class Streamer(openvino_genai.StreamerBase):  # type: ignore[misc]
        def __init__(self, emit: Emit) -> None:
            super().__init__()
            self.emit = emit

        def write(self, token: Any) -> Any:
            for one in token if isinstance(token, list) else [token]:
                self.emit(int(one))
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def generate(prompt: list[int], new_tokens: int, emit: Emit) -> None:
        config = openvino_genai.GenerationConfig(max_new_tokens=new_tokens, do_sample=False, ignore_eos=True)
        ids = np.array([prompt], np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        pipeline.generate(inputs, config, Streamer(emit))

    return generate


PEERS: dict[str, tuple[Callable[..., dict[str, str]], Callable[..., Generate]]] = {
    "onnxruntime-genai": (prepare_genai, open_genai),
    "llama.cpp": (prepare_llama, open_llama),
    "transformers": (prepare_directory, open_transformers),
    "optimum-onnx": (prepare_optimum, open_optimum),
    "openvino-genai": (prepare_openvino_genai, open_openvino_genai),
}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(PACKAGES.get(name, name))
    except importlib.metadata.PackageNotFoundError:  # it is found on a path, and pip knows nothing of it
        return None


def timed(generate: Generate, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """Run one request and time each token."""
    tokens: list[int] = []
    times: list[float] = []

    def emit(token: int) -> None:
        times.append(time.perf_counter())
        tokens.append(token)

    begin = time.perf_counter()
    generate(prompt, new_tokens, emit)
    if len(tokens) != new_tokens:
        raise RuntimeError(f"{len(tokens)} tokens came, {new_tokens} were asked for")
    steps = [after - before for before, after in itertools.pairwise(times)]
    return {"tokens": tokens, "prefill_seconds": times[0] - begin, "step_seconds": steps}


def main(command: str, name: str, argument: str) -> None:
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes with the errors

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        prepare, open_peer = PEERS[name]
        arguments = json.loads(argument)
        if command == "prepare":
            answer(prepare(**arguments))
            return
        generate = open_peer(**arguments)
        answer({"ready": arguments["model"], "version": _version(name)})
        for line in sys.stdin:
            request = json.loads(line)
            answer(timed(generate, request["prompt"], request["new_tokens"]))
    except Exception as error:  # whatever another library raises, the benchmark goes on without it
        text = str(error).strip().splitlines()
        answer({"error": f"{type(error).__name__}: {text[0] if text else 'no message'}"})


if __name__ == "__main__":
    main(*sys.argv[1:4])
