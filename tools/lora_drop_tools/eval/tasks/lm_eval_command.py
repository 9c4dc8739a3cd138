"""`lora-drop lm-eval`: lm-eval's own command, in which a bundle is the model `lora-drop`.

lm-eval looks for models in its own registry alone, and a package cannot add to it from outside: the class has to be
imported in lm-eval's process. This command does that and hands all its arguments on as they are.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

from lora_drop_runtime.errors import InputError, LoraDropError, first_line

from .catalogue import check_lm_eval
from .code_eval import replaced, running
from .program import runs_to_its_end
from .run import is_of_lm_eval

PROGRAM = "lora-drop lm-eval"


@functools.cache
def _run(program: str) -> bool:
    return runs_to_its_end(program)


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Run lm-eval's command line with these arguments.

    Programs that a model writes run cut off from this machine, also under `--confirm_run_unsafe_code`.

    Raises:
        InputError: lm-eval is missing, programs cannot be cut off, the model has an argument that is not known, or
            lm-eval refuses what it was given.
        SystemExit: from lm-eval's own parser.
    """
    check_lm_eval()
    import lm_eval.__main__ as command

    from . import model, served  # noqa: F401 register their classes

    before = sys.argv
    sys.argv = [PROGRAM, *arguments]
    with replaced(), running(_run):
        try:
            command.cli_evaluate()
        except Exception as error:
            if isinstance(error, LoraDropError | OSError | MemoryError) or not is_of_lm_eval(error):
                raise
            raise InputError(
                "lm-eval ended with an error.",
                note=f"{type(error).__name__}: {first_line(error):.300}.",
                hint=f"See: {PROGRAM} run --help",
            ) from error
        finally:
            sys.argv = before
