"""What a row may write next, such as JSON by a schema.

Enters: the tokens of a row, one after another. Leaves: which tokens may follow. Knows no logits, no engine and no text;
lora_drop_runtime/grammars makes constraints of schemas and grammars.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.errors import wrong_type


class Constraint(Protocol):
    """Follows a row token by token. One's own may be any object with these four.

    A request works on a fork of the one that it is given, so one may be given to many requests.
    """

    @property
    def is_over(self) -> bool:
        """Whether no further token may follow: the row then ends without an end token."""
        ...

    def allowed(self) -> npt.NDArray[np.bool_]:
        """bool [V], at least one: tokens that may come next. An end token (`stop_token_ids`) where the text may end.

        Only read, and only until the next call.
        """
        ...

    def accept(self, token: int) -> None:
        """The token has come; it was allowed."""
        ...

    def fork(self) -> Constraint:
        """Another one in the same state, which goes its own way."""
        ...


def check_parts(what: str, constraint: object) -> None:
    """Raises InputError: it is no constraint."""
    parts = ("is_over", "allowed", "accept", "fork")
    if not all(hasattr(constraint, part) for part in parts):
        hint = "Use for example Grammars.of(bundle).json_schema(schema), of lora_drop_runtime.grammars."
        raise wrong_type(what, constraint, f"an object with {', '.join(parts)}", hint)


def forked(constraint: Constraint | None) -> Constraint | None:
    """A fork of its own for a row or its drafts, where there is a constraint. Raises InputError: `fork` returns none,
    under which any token would be allowed."""
    if constraint is None:
        return None
    fork = constraint.fork()
    check_parts("What a constraint's fork returns", fork)
    return fork
