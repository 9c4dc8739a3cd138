"""What the tests of refusals share."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.models import SIZES

Refused = Callable[..., str]
LIMITS = {"max_seq_len": 32, "max_prompt_len": 8, "max_batch": 2}
CONTEXT = SIZES["max_position_embeddings"]
