"""`lora-drop`: parses, calls the function of the command's name, prints."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_drop_runtime.command_line import (
    Parser,
    add_options,
    add_version,
    check_text,
    given_path,
    run_command,
    settings_of,
)
from lora_drop_runtime.errors import InputError, counted, first_line

from lora_drop_tools.bench.command import add_bench, run_bench
from lora_drop_tools.eval.command import add_eval, run_eval, run_harness
from lora_drop_tools.fit.command import add_fit, run_fit
from lora_drop_tools.profile.command import add_profile, run_profile

from .compare import CompareSettings, compare
from .generate import BYTE_ORDER_MARK, ChatSettings, GenerateSettings, chat, generate
from .inspect import inspect
from .serve import ServeSettings, serve

HARNESS = "lm-eval"
MOST_PROMPT_BYTES = 64 << 20  # many times what the longest context holds


def _read_prompt(path: Path) -> str:
    """A file's text, or standard input's. A pipe has no size, and a device no end, so neither is read whole."""
    if str(path) == "-":
        data: str | bytes = sys.stdin.read(MOST_PROMPT_BYTES + 1)
    else:
        with path.open("rb") as file:
            data = file.read(MOST_PROMPT_BYTES + 1)
    if len(data) > MOST_PROMPT_BYTES:
        raise ValueError(f"it has more than {MOST_PROMPT_BYTES} bytes")
    return data.removeprefix(BYTE_ORDER_MARK) if isinstance(data, str) else data.decode("utf-8-sig")


def _prompts(args: argparse.Namespace) -> list[str]:
    """Texts of --prompt, then those of --prompt-file."""
    prompts = list(args.prompt or [])
    if [str(path) for path in args.prompt_file or []].count("-") > 1:
        raise InputError(
            "Standard input is given twice.",
            note="--prompt-file - is there more than once, and it is read once.",
            hint="Give it once, or files by their names.",
        )
    for path in args.prompt_file or []:
        try:
            prompts.append(_read_prompt(path))
        except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a zero byte in the name
            raise InputError(
                "The prompt file cannot be read.", note=f"{path}: {first_line(error)}.", hint="Give a UTF-8 text file."
            ) from None
    for prompt in prompts:
        check_text("A prompt", prompt)
    return prompts


def _generate(args: argparse.Namespace) -> None:
    completions = generate(args.bundle, _prompts(args), settings_of(GenerateSettings, args), chat=args.chat)
    tokens = sum(completion.tokens for completion in completions)
    seconds, kv = completions[0].seconds, completions[0].kv_bytes
    print(
        f"{counted(tokens, 'token')} in {seconds:.2f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s with prefill); "
        f"K/V {(kv['kept'] + kv['dropped']) / 2**20:.2f} MiB",
        *completions[0].notes,
        sep="\n",
        file=sys.stderr,
    )


def _chat(args: argparse.Namespace) -> None:
    check_text("--system", args.system or "")
    chat(args.bundle, settings_of(ChatSettings, args), system=args.system)


def _serve(args: argparse.Namespace) -> None:
    serve(args.bundle, settings_of(ServeSettings, args))


def _inspect(args: argparse.Namespace) -> None:
    inspect(args.bundle, check=args.check)


def _compare(args: argparse.Namespace) -> None:
    compare(args.bundle, settings_of(CompareSettings, args))


def _harness(_: argparse.Namespace) -> None:
    """lm-eval's command without a word for it."""
    run_harness(())


@functools.cache  # nothing that is parsed stays in it
def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lora-drop", description="Run, look at and check bundles made by lora-drop-export.")
    add_version(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, function: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        return command

    def add_bundle(command: argparse.ArgumentParser, count: str | None = None) -> None:
        what = "directory written by lora-drop-export"
        command.add_argument("bundle", type=given_path, metavar="BUNDLE", nargs=count, help=what)

    command = add("generate", _generate, "Continue a prompt, streaming; several prompts run as a batch.")
    add_bundle(command)
    command.add_argument("--prompt", action="append", metavar="TEXT", help="continue this text; repeat for a batch")
    command.add_argument(
        "--prompt-file", action="append", type=given_path, metavar="FILE", help="continue a file; - is standard input"
    )
    command.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    add_options(command, GenerateSettings)
    command = add("chat", _chat, "Talk to the model; Ctrl-C ends a reply, Ctrl-D the chat.")
    add_bundle(command)
    command.add_argument("--system", metavar="TEXT", help="begin with this system message")
    add_options(command, ChatSettings)
    command = add("serve", _serve, "Serve a bundle with OpenAI's API until SIGTERM or Ctrl-C.")
    add_bundle(command)
    add_options(command, ServeSettings)
    command = add("inspect", _inspect, "Print what a bundle is, and what the paper's equations predict for it.")
    add_bundle(command)
    command.add_argument("--check", action="store_true", help="hash every file")
    command = add("compare", _compare, "Compare every step with eager PyTorch.")
    add_bundle(command)
    add_options(command, CompareSettings)
    command = add("bench", run_bench, "Measure speed, latency and memory against the full schedule and other runtimes.")
    add_bundle(command, "+")
    add_bench(command)
    command = add("eval", run_eval, "Measure quality against the full schedule: a text, tasks, or both.")
    add_bundle(command, "+")
    add_eval(command)
    command = add(
        "profile", run_profile, "Measure on text which layers of a model can be dropped, and write drop lists."
    )
    add_profile(command)
    command = add("fit", run_fit, "Fit adapters for a plan on plain text: in closed form, then by distillation.")
    add_fit(command)
    add(HARNESS, _harness, "Run lm-eval's own command, with a bundle as --model lora-drop.")
    return parser


def _run(arguments: Sequence[str]) -> None:
    if arguments and arguments[0] == HARNESS:  # whose options this parser does not know
        run_harness(arguments[1:])
        return
    args = _parser().parse_args(arguments)
    args.command(args)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(_run, arguments)


if __name__ == "__main__":
    sys.exit(main())
