"""`lora-drop`: parses, calls the function of the command's name, prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_drop_runtime.command_line import Parser, run_command
from lora_drop_runtime.decoding.sampling import SamplingOptions
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.drop_plan import INJECTIONS, POLICIES, SURROGATES, parse_layers

from lora_drop_tools.bench.bench import bench
from lora_drop_tools.bench.peers.peer import PEERS
from lora_drop_tools.eval.eval import eval
from lora_drop_tools.eval.tasks.files import TASKS
from lora_drop_tools.fit.fit import LEARNING_RATE, fit
from lora_drop_tools.profile.profile import RANKINGS, profile
from lora_drop_tools.shared.corpus import DTYPES

from .compare import compare
from .generate import chat, generate
from .inspect import inspect


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> None:
    args = _parser().parse_args(arguments)
    args.command(args)


def _generate(args: argparse.Namespace) -> None:
    prompts = list(args.prompt or [])
    for path in args.prompt_file or []:
        try:
            prompts.append(sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                "The prompt file cannot be read.", note=f"{path}: {error}.", hint="Give a UTF-8 text file."
            ) from None
    completions = generate(
        args.bundle,
        prompts,
        chat=args.chat,
        max_new_tokens=args.max_new_tokens,
        **_session_arguments(args),
    )
    tokens = sum(completion.tokens for completion in completions)
    seconds, kv = completions[0].seconds, completions[0].kv_bytes
    print(
        f"{tokens} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s with prefill); "
        f"K/V {(kv['kept'] + kv['dropped']) / 2**20:.2f} MiB",
        *completions[0].engine_notes,
        sep="\n",
        file=sys.stderr,
    )


def _chat(args: argparse.Namespace) -> None:
    chat(args.bundle, system=args.system, max_new_tokens=args.max_new_tokens, **_session_arguments(args))


def _inspect(args: argparse.Namespace) -> None:
    inspect(args.bundle, check=args.check)


def _compare(args: argparse.Namespace) -> None:
    compare(
        args.bundle,
        k=args.k,
        target=args.target,
        provider=args.provider,
        threads=args.threads,
        json_file=args.json,
        trust_remote_code=args.trust_remote_code,
        policy=args.policy,
    )


def _bench(args: argparse.Namespace) -> None:
    bench(
        args.bundle,
        k=args.k,
        contexts=args.contexts,
        batches=args.batches,
        new_tokens=args.new_tokens,
        policy=args.policy,
        repeats=args.repeats,
        target=args.target,
        provider=args.provider,
        threads=args.threads,
        peers=args.peers,
        model=args.model,
        peer_cache=args.peer_cache,
        peer_python=args.peer_python or (),
        json_file=args.json,
        plots=args.plots,
    )


def _eval(args: argparse.Namespace) -> None:
    eval(
        args.bundle,
        labels=args.label or (),
        k=args.k,
        policies=args.policy,
        text=args.text,
        window=args.window,
        prompt=args.prompt,
        windows=args.windows,
        tasks=args.tasks,
        data=args.data,
        limit=args.limit,
        seed=args.seed,
        out_dir=args.out,
        bench_file=args.bench,
        target=args.target,
        provider=args.provider,
        threads=args.threads,
        json_file=args.json,
        plots=args.plots,
    )


def _profile(args: argparse.Namespace) -> None:
    profile(
        args.model,
        args.text,
        args.out,
        k=args.k,
        policy=args.policy,
        rankings=args.rankings,
        tokens=args.tokens,
        window=args.window,
        sensitivity_tokens=args.sensitivity_tokens,
        always_first=args.always_first,
        always_last=args.always_last,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        force=args.force,
        trust_remote_code=args.trust_remote_code,
    )


def _fit(args: argparse.Namespace) -> None:
    from lora_drop_export.checkpoint.drop_list import DropList, read_drop_list

    if args.drop_layers is not None and args.drop_list is not None:
        raise InputError(
            "The drop list is given twice.",
            note="--drop-layers and --drop-list exclude each other.",
            hint="Give one of --drop-ratio, --drop-layers and --drop-list.",
        )
    listed = None if args.drop_layers is None else DropList(parse_layers(args.drop_layers))
    if args.drop_list is not None:
        listed = read_drop_list(args.drop_list)
    fit(
        args.model,
        args.text,
        args.out,
        drop_layers=None if listed is None else listed.layers,
        drop_list_fingerprint=None if listed is None else listed.fingerprint,
        drop_ratio=args.drop_ratio,
        always_first=args.always_first,
        always_last=args.always_last,
        surrogate=args.surrogate,
        injection=args.injection,
        k=args.k,
        policy=args.policy,
        rank=args.rank,
        alpha=args.alpha,
        tokens=args.tokens,
        steps=args.steps,
        learning_rate=args.learning_rate,
        batch=args.batch,
        window=args.window,
        accumulate=args.accumulate,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        resume=args.resume,
        force=args.force,
        trust_remote_code=args.trust_remote_code,
    )


def _session_arguments(args: argparse.Namespace) -> dict[str, Any]:
    sampling = SamplingOptions(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    return {
        "k": args.k,
        "policy": args.policy,
        "sampling": sampling,
        "stop": tuple(args.stop or ()),
        "target": args.target,
        "provider": args.provider,
        "threads": args.threads,
    }


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lora-drop", description="Run, look at and check bundles made by lora-drop-export.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, function: object, text: str, bundles: str | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "bundle", type=Path, metavar="BUNDLE", nargs=bundles, help="directory written by lora-drop-export"
        )
        command.set_defaults(command=function)
        return command

    command = add("generate", _generate, "Continue a prompt, streaming; several prompts run as a batch.")
    command.add_argument("--prompt", action="append", metavar="TEXT", help="repeat for a batch")
    command.add_argument("--prompt-file", action="append", type=Path, metavar="FILE", help="- is standard input")
    command.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    _add_decoding(command, 64)
    command = add("chat", _chat, "Talk to the model; Ctrl-C ends a reply, Ctrl-D the chat.")
    command.add_argument("--system", metavar="TEXT", help="system message")
    _add_decoding(command, 256)
    command = add("inspect", _inspect, "Print what a bundle is, and what the paper's equations predict for it.")
    command.add_argument("--check", action="store_true", help="hash every file")
    command = add("compare", _compare, "Compare every step with eager PyTorch.")
    command.add_argument("--k", type=int, help="window to compare under (default: the bundle's)")
    _add_policy(command)
    command.add_argument("--trust-remote-code", action="store_true", help="run the code that the model brings")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every step's figures")
    _add_engine(command)
    command = add(
        "bench", _bench, "Measure speed, latency and memory against the full schedule and other runtimes.", "+"
    )
    _add_bench(command)
    _add_engine(command)
    command = add("eval", _eval, "Measure quality against the full schedule: a text, tasks, or both.", "+")
    _add_eval(command)
    _add_engine(command)
    text = "Measure on text which layers of a model can be dropped, and write drop lists."
    command = commands.add_parser("profile", help=text, description=text)
    command.add_argument("model", metavar="MODEL", help="a Hugging Face directory, hub id, GGUF file or bundle")
    command.set_defaults(command=_profile)
    _add_profile(command)
    text = "Fit adapters for a plan on plain text: in closed form, then by distillation."
    command = commands.add_parser("fit", help=text, description=text)
    command.add_argument(
        "model", metavar="MODEL", help="a Hugging Face directory, hub id, GGUF file, or a bundle, which brings its plan"
    )
    command.set_defaults(command=_fit)
    _add_fit(command)
    return parser


def _add_bench(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--k", type=_numbers, default=(1, 3, 5), metavar="K,…", help="windows (default 1,3,5); 0 always runs"
    )
    command.add_argument(
        "--contexts",
        type=_numbers,
        metavar="T,…",
        help="tokens of a prompt (default 128,2048, or what the bundles allow)",
    )
    command.add_argument("--batches", type=_numbers, default=(1,), metavar="B,…", help="rows (default 1)")
    command.add_argument("--new-tokens", type=int, default=64, metavar="N", help="default 64")
    _add_policy(command)
    command.add_argument("--repeats", type=int, default=5, metavar="R", help="default 5")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure and every step's time")
    command.add_argument("--plots", type=Path, metavar="DIR", help="write figures; needs matplotlib")
    command.add_argument(
        "--peers",
        type=_names,
        nargs="?",
        const=(),
        metavar="NAME,…",
        help=f"other runtimes in the same run: {', '.join(PEERS)} (without names: all)",
    )
    command.add_argument(
        "--model",
        action="append",
        type=Path,
        metavar="DIR|FILE.gguf",
        help="what the peers load, the same weights; a directory, a GGUF file, or repeated for both",
    )
    command.add_argument("--peer-cache", type=Path, metavar="DIR", help="keeps what peers build from the model")
    command.add_argument(
        "--peer-python", action="append", metavar="NAME=PATH", help="the Python that a peer is installed in"
    )


def _add_eval(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--label", action="append", metavar="NAME", help="for the tables, once for each bundle (default: directories)"
    )
    command.add_argument(
        "--k", type=_numbers, default=(1, 3), metavar="K,…", help="windows (default 1,3); 0 always runs"
    )
    command.add_argument(
        "--policy", type=_names, default=POLICIES[:1], metavar="NAME,…", help=f"{', '.join(POLICIES)} (default skip)"
    )
    command.add_argument("--text", type=Path, metavar="FILE", help="for perplexity, agreement and KL")
    command.add_argument("--window", type=int, default=512, metavar="T", help="tokens of a piece of it (default 512)")
    command.add_argument("--prompt", type=int, default=32, metavar="T", help="of them given, not scored (default 32)")
    command.add_argument("--windows", type=int, default=32, metavar="N", help="how many pieces at most (default 32)")
    command.add_argument("--tasks", type=_names, default=(), metavar="NAME,…", help=f"of {', '.join(TASKS)}")
    command.add_argument("--data", type=Path, metavar="DIR", help="the tasks' files")
    command.add_argument("--limit", type=int, default=300, metavar="N", help="items of a task at most (default 300)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of subsets and phases (default 0)")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="keeps every item's result; a rerun goes on from there"
    )
    command.add_argument("--bench", type=Path, metavar="FILE", help="speed-ups, as lora-drop bench --json wrote them")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    command.add_argument("--plots", type=Path, metavar="DIR", help="write figures; needs matplotlib")


def _add_profile(command: argparse.ArgumentParser) -> None:
    command.add_argument("--text", action="append", required=True, type=Path, metavar="FILE", help="repeat for more")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="for figures and drop lists")
    command.add_argument("--k", type=int, default=3, help="LoRA steps between two refreshes (default 3)")
    command.add_argument("--policy", choices=POLICIES, default=POLICIES[0], help="refresh policy (default skip)")
    command.add_argument(
        "--rankings", type=_names, default=RANKINGS, metavar="NAME,…", help=f"of {', '.join(RANKINGS)} (default all)"
    )
    command.add_argument("--tokens", type=int, default=8192, metavar="N", help="for the layers' figures (default 8192)")
    command.add_argument("--window", type=int, default=256, metavar="T", help="tokens of a piece of it (default 256)")
    command.add_argument(
        "--sensitivity-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="to rank by sensitivity, which takes longest, and as many others to compare the lists on (default 1024)",
    )
    command.add_argument("--always-first", type=int, default=3, metavar="N", help="never drop the first N (default 3)")
    command.add_argument("--always-last", type=int, default=1, metavar="N", help="never drop the last N (default 1)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="which pieces of the text (default 0)")
    command.add_argument("--device", default="cpu", metavar="NAME", help="of PyTorch (default cpu)")
    command.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the model (default fp32)")
    command.add_argument("--force", action="store_true", help="replace an existing profile at --out")
    command.add_argument("--trust-remote-code", action="store_true", help="run the code that the model brings")


def _add_fit(command: argparse.ArgumentParser) -> None:
    command.add_argument("--text", action="append", required=True, type=Path, metavar="FILE", help="repeat for more")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="for the adapters, in PEFT's format")
    plan = command.add_argument_group("the plan (of a bundle: its own)")
    plan.add_argument("--drop-ratio", type=float, metavar="ρ", help="as for lora-drop-export (default 0.5)")
    plan.add_argument("--drop-layers", metavar="4,6,9", help="the layers to drop, counted from 0")
    plan.add_argument("--drop-list", type=Path, metavar="FILE", help="the same from a file of lora-drop profile")
    plan.add_argument("--always-first", type=int, metavar="N", help="never drop the first N (default 3)")
    plan.add_argument("--always-last", type=int, metavar="N", help="never drop the last N (default 1)")
    plan.add_argument("--surrogate", choices=SURROGATES, help="default residual")
    plan.add_argument("--injection", choices=INJECTIONS, help="default block")
    plan.add_argument("--k", type=_numbers, default=(3,), metavar="K,…", help="windows, mixed if several (default 3)")
    plan.add_argument("--policy", choices=POLICIES, help="of the refreshes at deployment (default skip)")
    plan.add_argument("--rank", type=int, default=16, metavar="R", help="default 16")
    plan.add_argument("--alpha", type=float, metavar="A", help="PEFT's; the scale is alpha / r (default: the rank)")
    how = command.add_argument_group("how")
    how.add_argument(
        "--tokens", type=int, default=32768, metavar="N", help="of the closed form, 0 to skip it (default 32768)"
    )
    how.add_argument("--steps", type=int, default=300, metavar="N", help="of distillation, 0 to skip it (default 300)")
    how.add_argument("--learning-rate", type=float, default=LEARNING_RATE, metavar="X", help=f"default {LEARNING_RATE}")
    how.add_argument("--batch", type=int, default=4, metavar="B", help="texts of a batch (default 4)")
    how.add_argument("--window", type=int, default=256, metavar="T", help="tokens of a text (default 256)")
    how.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches of a step (default 1)")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="which pieces of the text (default 0)")
    how.add_argument("--device", default="cpu", metavar="NAME", help="of PyTorch (default cpu)")
    how.add_argument(
        "--dtype", choices=tuple(DTYPES), default="fp32", help="of the model; adapters stay fp32 (default fp32)"
    )
    how.add_argument("--threads", type=int, metavar="N", help="of PyTorch on the CPU (default: its own choice)")
    how.add_argument("--resume", action="store_true", help="go on where an interrupted fit with these options stopped")
    how.add_argument("--force", action="store_true", help="replace adapters at --out, and begin anew")
    how.add_argument("--trust-remote-code", action="store_true", help="run the code that the model brings")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,3,5") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _add_decoding(command: argparse.ArgumentParser, max_new_tokens: int) -> None:
    command.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=f"default {max_new_tokens}"
    )
    command.add_argument("--k", type=int, help="LoRA steps between refreshes, 0 for none (default: the bundle's)")
    _add_policy(command)
    command.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    command.add_argument("--top-k", type=int, default=0, metavar="N", help="0 is off (default)")
    command.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 is off (default)")
    command.add_argument("--repetition-penalty", type=float, default=1.0, metavar="P", help="1 is off (default)")
    command.add_argument("--seed", type=int, metavar="N", help="for the same text every time")
    command.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    _add_engine(command)


def _add_policy(command: argparse.ArgumentParser) -> None:
    what = "of refreshes: skip leaves holes, backfill fills them (default: the bundle's)"
    command.add_argument("--policy", choices=POLICIES, help=what)


def _add_engine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--target", metavar="NAME", help="of the bundle's targets (default: its first)")
    command.add_argument(
        "--provider",
        metavar="cpu|cuda|rtx",
        help="of ONNX Runtime (default cpu for ort; another target runs its own engines without it)",
    )
    command.add_argument("--threads", type=int, metavar="N", help="default: one per physical core")


if __name__ == "__main__":
    sys.exit(main())
