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

from lora_drop_tools.bench.command import add_bench, run_bench
from lora_drop_tools.eval.command import add_eval, run_eval
from lora_drop_tools.fit.command import add_fit, run_fit
from lora_drop_tools.profile.command import add_profile, run_profile
from lora_drop_tools.shared.arguments import add_engine, add_policy

from .compare import compare
from .generate import chat, generate
from .inspect import inspect


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


def _add_decoding(command: argparse.ArgumentParser, max_new_tokens: int) -> None:
    command.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=f"default {max_new_tokens}"
    )
    command.add_argument("--k", type=int, help="LoRA steps between refreshes, 0 for none (default: the bundle's)")
    add_policy(command)
    command.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    command.add_argument("--top-k", type=int, default=0, metavar="N", help="0 is off (default)")
    command.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 is off (default)")
    command.add_argument("--repetition-penalty", type=float, default=1.0, metavar="P", help="1 is off (default)")
    command.add_argument("--seed", type=int, metavar="N", help="for the same text every time")
    command.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    add_engine(command)


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
    add_policy(command)
    command.add_argument("--trust-remote-code", action="store_true", help="run the code that the model brings")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every step's figures")
    add_engine(command)
    command = add(
        "bench", run_bench, "Measure speed, latency and memory against the full schedule and other runtimes.", "+"
    )
    add_bench(command)
    add_engine(command)
    command = add("eval", run_eval, "Measure quality against the full schedule: a text, tasks, or both.", "+")
    add_eval(command)
    add_engine(command)
    text = "Measure on text which layers of a model can be dropped, and write drop lists."
    command = commands.add_parser("profile", help=text, description=text)
    command.add_argument("model", metavar="MODEL", help="a Hugging Face directory, hub id, GGUF file or bundle")
    command.set_defaults(command=run_profile)
    add_profile(command)
    text = "Fit adapters for a plan on plain text: in closed form, then by distillation."
    command = commands.add_parser("fit", help=text, description=text)
    command.add_argument(
        "model", metavar="MODEL", help="a Hugging Face directory, hub id, GGUF file, or a bundle, which brings its plan"
    )
    command.set_defaults(command=run_fit)
    add_fit(command)
    return parser


def _run(arguments: Sequence[str]) -> None:
    args = _parser().parse_args(arguments)
    args.command(args)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(_run, arguments)


if __name__ == "__main__":
    sys.exit(main())
