"""What a session refuses, before anything is allocated or run, and in which words.

Enters: ids, lengths, the bundle's limits. Leaves: nothing, or an InputError. Knows no engine and no cache.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_drop_runtime.bounds import THREADS
from lora_drop_runtime.bundle.manifest import Limits, too_many_lora_steps
from lora_drop_runtime.errors import BundleError, InputError, counted, whole_number, wrong_type

from .constraint import Constraint, check_parts
from .prompts import token_mask
from .sampling import Ids, SamplingOptions

SLOTS = 8  # of a batch, where nothing is said


def checked_threads(threads: int | None) -> int | None:
    return None if threads is None else THREADS.whole("The number of threads", threads)


def not_pickled(what: str, instead: str) -> InputError:
    """Processes and `copy` pickle what they are given."""
    return InputError(
        f"A {what} can be neither copied nor sent to another process.",
        note="It holds an engine, and the caches of what is running.",
        hint=f"Open one there with {what.capitalize()}.open{instead}.",
    )


def check_name(what: str, name: str | None, hint: str) -> None:
    """Whether what is chosen by its name is said by one; None is the bundle's, or a default."""
    if name is not None and not isinstance(name, str):
        raise wrong_type(what, name, "a name", hint)


def check_path(what: str, path: str | Path) -> None:
    if not isinstance(path, str | os.PathLike):
        raise wrong_type(what, path, "the path of a directory", 'Use for example "adapters/".')


def checked_sampling(sampling: SamplingOptions | None, vocab_size: int) -> SamplingOptions:
    """Greedy when None. A bias of a token that the vocabulary does not have is refused."""
    if sampling is not None and not isinstance(sampling, SamplingOptions):
        raise wrong_type("The sampling", sampling, "SamplingOptions", "Use for example SamplingOptions(temperature=1).")
    sampling = sampling or SamplingOptions()
    outside = next((token for token in sampling.logit_bias if token >= vocab_size), None)
    if outside is not None:
        raise InputError(
            "The sampling option logit_bias names a token that the model does not have.",
            note=f"It is {outside}, the model has ids 0 to {vocab_size - 1}.",
            hint="Use the tokenizer of the bundle.",
        )
    return sampling


def check_constraint(constraint: Constraint | None) -> None:
    if constraint is None:
        return
    check_parts("The constraint", constraint)
    if constraint.is_over:
        raise InputError(
            "The constraint allows no text.",
            note="It is over before the first token.",
            hint="Give one that begins anew, and allows at least one token.",
        )


def stop_ids(stop_token_ids: Sequence[int] | None, eos: Sequence[int]) -> set[int]:
    """The ids that end a row; the model's own when None."""
    hint = "Use for example stop_token_ids=[2]."
    if stop_token_ids is None:
        return set(eos)
    scalar = isinstance(stop_token_ids, np.ndarray) and not stop_token_ids.ndim
    if scalar or isinstance(stop_token_ids, str | bytes) or not isinstance(stop_token_ids, Collection | np.ndarray):
        raise wrong_type("The list of stop tokens", stop_token_ids, "a list of token ids", hint)
    return {whole_number("A stop token", token, hint) for token in stop_token_ids}


def new_tokens_asked(max_new_tokens: int | None) -> int | None:
    if max_new_tokens is None:
        return None
    return whole_number("The number of new tokens", max_new_tokens, "Use for example max_new_tokens=64.")


def check_one_prompt(rows: list[Any]) -> None:
    if len(rows) > 1:
        raise InputError(
            "A stream continues one prompt.", note=f"{len(rows)} were given.", hint="Use generate for a batch."
        )


def lengths_that_stay(tokens: int | Sequence[int], lengths: Sequence[int]) -> list[int]:
    """How many tokens stay in each row, which have so many."""
    hint = "Use for example tokens=20."
    texts = str | bytes | bytearray | memoryview
    if (isinstance(tokens, np.ndarray) and tokens.ndim) or (
        isinstance(tokens, Sequence) and not isinstance(tokens, texts)
    ):
        asked = [whole_number("The number of tokens that stay", one, hint) for one in tokens]
        if len(asked) != len(lengths):
            raise InputError(
                "The list of tokens that stay does not fit the request.",
                note=f"It has {len(asked)} numbers, the request {len(lengths)} rows.",
                hint="Give a number for each row, or one for all.",
            )
    else:
        asked = [whole_number("The number of tokens that stay", tokens, hint)] * len(lengths)
    if min(asked) < 1:
        raise InputError(
            "No token of a row would stay.", note=f"Asked for are {min(asked)}, at least 1 is needed.", hint=hint
        )
    return [min(one, length) for one, length in zip(asked, lengths, strict=True)]


def forgotten(row: int, length: int, tokens: int) -> InputError:
    return InputError(
        "Layers have forgotten what the tokens behind that many would see.",
        note=f"Row {row} has {tokens} tokens, of which {length} would stay.",
        hint="Open the session without forget=True; or begin a new request.",
    )


def states_are_ahead(row: int, length: int, tokens: int) -> InputError:
    return InputError(
        "The model's recurrent states do not go back that far.",
        note=f"Row {row} has {tokens} tokens, of which {length} would stay; the states have later ones.",
        hint="Begin a new request; or fork the session before that refresh.",
    )


def states_are_torn() -> InputError:
    return InputError(
        "A run in several calls was interrupted before it was counted.",
        note="Its first call has put tokens into recurrent states, and the next one has written over those before.",
        hint="Begin the request again.",
    )


def check_lora_steps(steps: int, most: int | None) -> None:
    """That follow each other."""
    if most is not None and steps > most:
        raise too_many_lora_steps(steps)


def interrupted_cycle() -> InputError:
    return InputError(
        "A cycle on the device was interrupted as it was begun.",
        note="How many of its steps have run is not known.",
        hint="Add the row again.",
    )


def too_few_logits(found: int, wanted: int) -> BundleError:
    return BundleError(
        "A step of the bundle has left no logits.",
        note=f"Of {wanted} rows of them that were asked for there are {found}.",
        hint="Free memory, and begin the request again.",
    )


def forks_use_the_adapters(count: int) -> InputError:
    return InputError(
        "The adapters are in use by other sessions.",
        note=f"{count} fork(s) of this session are open.",
        hint="Close them first.",
    )


def one_prompt(rows: list[Ids]) -> Ids:
    """The one row that `add` takes, int64 [T]; T may be 0."""
    if len(rows) > 1:
        raise InputError(
            "A row of a batch is one prompt.", note=f"{len(rows)} were given.", hint="Call add for each of them."
        )
    return rows[0] if rows else np.zeros(0, np.int64)


def checked_slots(slots: int | None, limits: Limits) -> int:
    """Rows of a batch that run at once; 8 when None, or what the bundle allows."""
    if slots is None:
        return min(SLOTS, limits.max_batch)
    if not 1 <= whole_number("The number of slots", slots, "Use for example slots=8.") <= limits.max_batch:
        raise InputError(
            "The bundle does not allow so many slots.",
            note=f"It is {slots}; possible is 1 to {limits.max_batch}.",
            hint="Use fewer slots, or export with a larger --max-batch.",
        )
    return int(slots)


def limit(what: str, tokens: int | None, most: int, name: str) -> int:
    """Tokens of a row in a batch, at most what the bundle allows; that when None."""
    if tokens is None:
        return most
    least = 2 if name == "max_seq_len" else 1
    if not least <= whole_number(what, tokens, f"Use for example {name}={most}.") <= most:
        raise InputError(
            f"{what} have an impossible length.",
            note=f"{name} is {tokens}; possible is {least} to {most}.",
            hint=f"Leave {name} out, or export with a larger --{name.replace('_', '-')}.",
        )
    return int(tokens)


def row_limits(max_seq_len: int | None, max_prompt_len: int | None, limits: Limits) -> tuple[int, int]:
    """Tokens of a row in a batch and of its prompt, at most what the bundle allows; that when None."""
    longest = limit("The sequences of a batch", max_seq_len, limits.max_seq_len, "max_seq_len")
    most = min(limits.max_prompt_len, longest - 1)
    return longest, limit("The prompts of a batch", max_prompt_len, most, "max_prompt_len")


def batch_limits(max_seq_len: int, max_prompt_len: int) -> Limits:
    """Of one row of a batch."""
    return Limits(max_seq_len, max_prompt_len, 1)


def check_row(row: int, added: int) -> None:
    hint = "Use what add returned."
    if not 0 <= whole_number("The row", row, hint) < added:
        raise InputError("The batch has no such row.", note=f"It is {row}, {added} were added.", hint=hint)


def flag(what: str, value: bool) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise wrong_type(f"The option {what}", value, "True or False", f"Use for example {what}=True.")
    return bool(value)


def check_fits(needed: int, slots: int) -> None:
    if needed > slots:
        raise InputError(
            "The row does not fit into the caches of the dropped layers.",
            note=f"It needs {needed} slots, the batch has {slots}.",
            hint="Ask for fewer new tokens or a larger k, or open the batch with a smaller k, or with policy backfill.",
        )


def checked_cache_bytes(most: int | None, paged: bool) -> int | None:
    """The most bytes of K/V in a batch; None for no limit."""
    if most is None:
        return None
    if not paged:
        raise InputError(
            "The target's caches are allocated in advance.",
            note=f"kv_cache_bytes is {most}, and applies only where caches are paged (target openvino).",
            hint="Leave it out, and use fewer slots or a smaller max_seq_len.",
        )
    if whole_number("The size of the K/V caches", most, "Use for example kv_cache_bytes=2**30.") < 1:
        raise InputError(
            "The size of the K/V caches is out of range.",
            note=f"It is {most}; needed is a number of bytes above 0.",
            hint="Use for example kv_cache_bytes=2**30.",
        )
    return int(most)


def check_block(block: int, row: int, most: int | None) -> None:
    """There has to be room for the shortest row, `block` bytes; the longest one may take `row` bytes."""
    if most is not None and block > most:
        raise InputError(
            "The K/V caches have no room for a block.",
            note=f"kv_cache_bytes is {most}; a block of all layers takes {block}, and a row up to {row}.",
            hint="Give more, or leave it out.",
        )


def check_pool(needed: int, most: int | None) -> None:
    if most is not None and needed > most:
        raise InputError(
            "A row can never fit into the K/V caches.",
            note=f"Its blocks take {needed} bytes, the batch has {most}.",
            hint="Ask for fewer new tokens, or open the batch with a larger kv_cache_bytes.",
        )


def checked_logprobs(logprobs: int | None) -> int | None:
    if logprobs is None:
        return None
    if not 0 <= whole_number("The number of logprobs", logprobs, "Use for example logprobs=5.") <= 1024:
        raise InputError(
            "The number of logprobs is out of range.",
            note=f"It is {logprobs}; possible is 0 to 1024.",
            hint="Use for example logprobs=5; 0 tells that of the chosen token alone.",
        )
    return int(logprobs)


def checked_context(context_tokens: int | None, length: int, scores: bool) -> int:
    """How many tokens of a prompt of `length` run as a prompt does."""
    if context_tokens is None:
        return length
    hint = "Use for example prompt_logprobs=True, context_tokens=1."
    if not scores:
        raise InputError(
            "A context needs a prompt that is scored.",
            note=f"context_tokens is {context_tokens}, prompt_logprobs is False.",
            hint=hint,
        )
    if not 1 <= whole_number("The number of context tokens", context_tokens, hint) <= length:
        raise InputError(
            "The number of context tokens is out of range.",
            note=f"It is {context_tokens}, and the prompt has {length}; possible is 1 to {length}.",
            hint="Count the tokens that stand before the first one that is scored.",
        )
    return int(context_tokens)


def check_prompts(ids: Ids) -> None:
    """Whether ids are [B, T] and neither is 0."""
    note = f"input_ids has shape {ids.shape}, needed is [batch, tokens]."
    if not ids.size:
        raise InputError("The prompt is empty.", note=note, hint="Give at least one token.")
    if ids.ndim != 2:
        hint = "Give a list of rows, such as [[1, 2]] for one."
        raise InputError("The prompts are not one row of token ids each.", note=note, hint=hint)


def check_vocabulary(ids: Ids, vocab_size: int) -> None:
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise InputError(
            "A token id is outside the vocabulary.",
            note=f"It is {wrong}, the model has ids 0 to {vocab_size - 1}.",
            hint="Use the tokenizer of the bundle.",
        )


def _check_lengths(ids: Ids, lengths: Ids) -> None:
    if lengths.shape != (len(ids),) or lengths.min() < 1 or lengths.max() > ids.shape[1]:
        empty = lengths.shape == (len(ids),) and lengths.min() < 1
        raise InputError(
            "A prompt is empty." if empty else "The lengths do not fit the prompts.",
            note=f"lengths is {lengths.tolist()}, input_ids has shape {ids.shape}.",
            hint="Give each row between 1 and T tokens.",
        )


def _larger(name: str, taker: str) -> str:
    """How whoever allows too little is made to allow more."""
    option = f"--{name.replace('_', '-')}"
    return f"export with a larger {option}" if taker == "bundle" else f"open the {taker} with a larger {name}"


def _check_rows(batch: int, limits: Limits) -> None:
    if batch > limits.max_batch:
        raise InputError(
            "The batch is larger than the bundle allows.",
            note=f"It has {batch} rows, the bundle allows {limits.max_batch}.",
            hint="Split the batch, or export with a larger --max-batch.",
        )


def checked_batch(batch: int, limits: Limits) -> int:
    if whole_number("The batch", batch, "Use for example batch=1.") < 1:
        raise InputError("The batch is empty.", note=f"It has {batch} rows.", hint="Give at least one row.")
    _check_rows(batch, limits)
    return int(batch)


def _check_limits(batch: int, longest: int, limits: Limits, taker: str) -> None:
    _check_rows(batch, limits)
    if longest > limits.max_prompt_len:
        raise InputError(
            f"A prompt is longer than the {taker} allows.",
            note=f"It has {longest} tokens, the {taker} allows {limits.max_prompt_len}.",
            hint=f"Shorten it, or {_larger('max_prompt_len', taker)}.",
        )


def _room_for_new_tokens(longest: int, max_new_tokens: int | None, max_seq_len: int, taker: str) -> int:
    """The new tokens to make room for: as many as were asked for, or as fit."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(
            "There is nothing to generate.",
            note=f"max_new_tokens is {max_new_tokens}, the smallest is 1.",
            hint="Use for example --max-new-tokens 64.",
        )
    room = max_seq_len - longest
    new_tokens = room if max_new_tokens is None else max_new_tokens
    if new_tokens > room or new_tokens < 1:
        raise InputError(
            f"Prompt and new tokens are longer than the {taker} allows.",
            note=f"They are {longest} + {max(1, new_tokens)} tokens, the {taker} allows {max_seq_len}.",
            hint=f"Ask for fewer new tokens, or {_larger('max_seq_len', taker)}.",
        )
    return new_tokens


def check_request(
    ids: Ids, lengths: Ids, max_new_tokens: int | None, limits: Limits, vocab_size: int, taker: str = "bundle"
) -> int:
    """Refuse what does not fit.

    Args:
        ids: [B, T], right-padded.
        lengths: [B], real tokens per row.
        max_new_tokens: None for as many as the bundle allows.
        limits: of the `taker`: `bundle`, or `batch`.
        vocab_size: of the model; padding may be any id.

    Returns:
        The number of new tokens to make room for.
    """
    _check_lengths(ids, lengths)
    longest = int(lengths.max())
    _check_limits(len(ids), longest, limits, taker)
    new_tokens = _room_for_new_tokens(longest, max_new_tokens, limits.max_seq_len, taker)
    check_vocabulary(ids[token_mask(ids, lengths)], vocab_size)
    return new_tokens


def check_step(ids: Ids, batch: int, vocab_size: int) -> None:
    """Whether ids are one token for each of the request's rows."""
    if ids.shape != (batch,):
        raise InputError(
            "The step has another batch than the request.",
            note=f"token_ids has shape {ids.shape}, the prefill had {batch} rows.",
            hint="Give one token per row.",
        )
    check_vocabulary(ids, vocab_size)


def check_room_for_adapters(rank: int) -> None:
    if not rank:
        raise InputError(
            "The bundle has no room for adapters.",
            note="It was exported with rank 0.",
            hint="Export with --adapters DIR, or with --rank R to load adapters later.",
        )


# ── a session that is not where the caller thinks it is ────────────────────────────────────────────────────────


def closed() -> InputError:
    return InputError(
        "The session is closed.",
        note="close was called, or its with block has ended.",
        hint="Open it again with Session.open.",
    )


def closed_batch() -> InputError:
    return InputError(
        "The batch is closed.",
        note="close was called, or its with block has ended.",
        hint="Open it again with Batch.open.",
    )


def used_by_another_thread(what: str = "session") -> InputError:
    """For a call that would disturb one that is running, or a stream that is not at its end, in another thread."""
    if what == "batch":
        return InputError(
            "The batch is in use by another thread.",
            note="A tick of another thread is running, or was interrupted there.",
            hint="Tick, cancel and close from one thread; add may come from any.",
        )
    return InputError(
        "The session is in use by another thread.",
        note="A session serves one request at a time; another thread's is not finished.",
        hint="Wait for it, close its stream, or open a session for each thread.",
    )


def no_request() -> InputError:
    return InputError(
        "There is no running request.",
        note="step, next_step, truncate and fork need one.",
        hint="Call prefill first.",
    )


def torn_request() -> InputError:
    return InputError(
        "The request was interrupted as a step was counted.",
        note="Whether its caches have the step's tokens is not known.",
        hint="Begin it again.",
    )


def read_by_a_stream() -> InputError:
    return InputError(
        "A stream is reading the tokens of this request.",
        note="A step, a truncation or a fork would come between its tokens.",
        hint="Close the stream first, or begin a request of your own with prefill.",
    )


def caches_full(tokens: int) -> InputError:
    return InputError(
        "The request's caches are full.",
        note=f"The longest row has {counted(tokens, 'token')}, and there is no room for another one.",
        hint="Call prefill with a larger max_new_tokens.",
    )


def ended_by_a_request() -> InputError:
    """For a stream whose next step would run on the caches of another request."""
    return InputError(
        "The request of this stream is over.",
        note="A session holds one request, and another one has begun since.",
        hint="Finish a stream before the next one, or open a second session.",
    )


def ended_by_adapters() -> InputError:
    """For a stream whose next step would run with other adapters than its caches were computed with."""
    return InputError(
        "The request of this stream is over.",
        note="The adapters were replaced while it ran (load_adapters), and a request keeps to one set of them.",
        hint="Finish a stream before you load adapters, or load them into a second session.",
    )


def ended_by_a_failure() -> InputError:
    """For a stream that was open when other adapters could not be loaded."""
    return InputError(
        "The request of this stream is over.",
        note="The adapters were to be replaced while it ran (load_adapters), which failed, and ended it all the same.",
        hint="Finish a stream before you load adapters, or load them into a second session.",
    )
