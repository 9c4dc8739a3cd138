"""Compiles a grammar in a process of its own first: llguidance has limits, but not for everything.

Some schemas keep it busy for minutes (`multipleOf` with a large number), and long chains of rules overflow its stack,
which ends the process. Who serves strangers' schemas can have neither. So the first compilation has little stack, and
limits of processor time and memory, where the system has them; what passes is compiled again here. Signals that end a
server are not for that process, though Ctrl-C and systemd send them to it, too: the server lets what it has taken end.
"""

from __future__ import annotations

import signal
import subprocess
import sys

from lora_drop_runtime.errors import LoraDropError

SECONDS = 3  # of the processor, which a busy machine does not shorten
MEMORY = 192 << 20  # bytes; 2500 properties or 15000 values of an enum need half of it
STACK = 3 << 19  # bytes, less than a thread has anywhere
_WALL = 120  # seconds, where a system has no limit of processor time
_PROGRAM = f"""
import contextlib, signal, sys
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    if hasattr(signal, name):  # not on Windows
        signal.signal(getattr(signal, name), signal.SIG_IGN)
try:
    import resource
except ImportError:  # Windows
    pass
else:
    for limit, most in (
        (resource.RLIMIT_CPU, ({SECONDS}, {SECONDS + 1})),  # SIGXCPU, where one limit for both would be SIGKILL
        (resource.RLIMIT_AS, ({MEMORY}, {MEMORY})),
        (resource.RLIMIT_STACK, ({STACK}, resource.getrlimit(resource.RLIMIT_STACK)[1])),
        (resource.RLIMIT_CORE, (0, 0)),
    ):
        with contextlib.suppress(ValueError):  # macOS takes none of memory, and none of the stack
            resource.setrlimit(limit, most)
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper


class Bytes:
    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = [bytes([byte]) for byte in range(256)] + [b"<end>"]

    def __call__(self, text):
        return list(text.encode() if isinstance(text, str) else text)


grammar, tokenizer = sys.stdin.buffer.read().decode(), LLTokenizer(TokenizerWrapper(Bytes()))
matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
if not matcher.is_error():
    matcher.compute_bitmask()
sys.stdout.buffer.write(matcher.get_error().encode())
"""


def _lack(note: str) -> LoraDropError:
    return LoraDropError(
        "The schema or grammar cannot be compiled now.",
        note=note,
        hint="Free memory, processes or open files, or raise the limits on them (ulimit -v, -u, -n).",
    )


def _end(code: int) -> str:
    """How a process that wrote nothing came to its end. Raises LoraDropError: others have ended it."""
    if -code == getattr(signal, "SIGXCPU", None):
        return f"it takes more than {SECONDS} seconds to compile"
    if -code == getattr(signal, "SIGKILL", None):
        raise _lack("The process that compiles it was killed, as the system does where memory is short.")
    return "it is nested too deep, or takes too much memory"


def compile_apart(grammar: str) -> str:
    """What is wrong with a grammar of llguidance's; empty where nothing is.

    Raises:
        LoraDropError: this machine cannot say so now.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROGRAM],
            input=grammar.encode(),
            capture_output=True,
            timeout=_WALL,
            start_new_session=True,  # no Ctrl-C comes before it ignores them
        )
    except subprocess.TimeoutExpired:
        return f"it takes more than {_WALL} seconds to compile"
    except OSError as error:
        raise _lack(f"The process that compiles it cannot be started: {error}.") from None
    if done.returncode:
        return _end(done.returncode)
    return done.stdout.decode(errors="replace")
