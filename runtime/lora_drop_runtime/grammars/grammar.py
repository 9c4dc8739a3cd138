"""Constraints by llguidance: JSON by a schema, a regular expression, a Lark grammar.

Enters: the tokenizer of a bundle, and a schema or a grammar. Leaves: constraints (decoding/constraint.py). Knows no
model and no sampling. Needs the package llguidance, which is imported when a tokenizer is opened.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.errors import InputError, first_line, wrong_type
from lora_drop_runtime.files import is_utf8
from lora_drop_runtime.text import TextCodec

from .schema import followed
from .trial import compile_apart

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_CHARACTERS = 1 << 18  # of a schema or grammar
_COMPILED = 16  # grammars that are kept, of 100 MiB each at worst
# JSON on one line, as Python writes it: white space where a model likes costs tokens, and small ones do not end it
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _refused(reason: str) -> InputError:
    reason = " ".join(reason.replace("\\n", " ").split())  # llguidance draws lines, and marks the place
    if "NoExtensionBias" in reason:  # its name for what a schema allows that only refers to itself
        reason = "it allows no text"
    return InputError(
        "The schema or grammar cannot be followed.",
        note=f"The reason: {reason[:500]}",
        hint="Use a simpler one; docs/run.md says what is supported.",
    )


def _not_installed(error: ImportError) -> InputError:
    return InputError(
        "llguidance cannot be imported.",
        note=f"{first_line(error)}; JSON schemas, grammars and tools need it.",
        hint="Run: pip install 'lora-drop-export[serve]'",
    )


def _checked_text(what: str, text: object) -> str:
    if not isinstance(text, str):
        raise wrong_type(what, text, "a text", "Use a str.")
    if len(text) > MOST_CHARACTERS or not is_utf8(text):
        found = f"It has {len(text)} characters, {MOST_CHARACTERS} are the most" if is_utf8(text) else "It is not UTF-8"
        raise InputError(f"{what} cannot be read.", note=f"{found}.", hint="Use a smaller one, in UTF-8.")
    return text


def _tokenizer_json(codec: TextCodec) -> str:
    """The tokenizer, whose decoder is that of bytes alone where others stand beside it: of GGUF files transformers 5.6
    makes such lists, and llguidance takes them for a vocabulary with ▁ for a space."""
    text = codec.tokenizer_json()
    if not ('"ByteFallback"' in text and '"ByteLevel"' in text):  # whole vocabularies: read only if need be
        return text
    tokenizer = json.loads(text)
    for decoder in (tokenizer["decoder"] or {}).get("decoders", ()):
        if decoder["type"] == "ByteLevel":
            return json.dumps(tokenizer | {"decoder": decoder})
    return text


def checked_schema(schema: str | Mapping[str, Any] | bool) -> str:
    """A JSON schema as JSON, with the options that every schema is compiled with.

    Raises:
        InputError: it is no JSON, or no schema.
    """
    try:
        value = json.loads(_checked_text("The JSON schema", schema)) if isinstance(schema, str) else schema
        if isinstance(value, bool):
            value = {} if value else {"not": {}}
        if not isinstance(value, Mapping):
            raise wrong_type("The JSON schema", value, "an object", 'Use for example {"type": "object"}.')
        # Before each of maybe a million parts is looked at
        _checked_text("The JSON schema", json.dumps(value, allow_nan=False, default=dict))
        return json.dumps({**followed(value), "x-guidance": _JSON_OPTIONS}, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            "The JSON schema is not JSON.", note=f"{first_line(error)}.", hint='Use for example {"type": "object"}.'
        ) from error


class GrammarConstraint:
    """A `Constraint` that follows a compiled grammar.

    Args:
        matcher: in any state.
        tokenizer: with as many ids as the model has.
    """

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._matcher, self._tokenizer = matcher, tokenizer

    @property
    def is_over(self) -> bool:
        return self._matcher.is_stopped()

    def allowed(self) -> npt.NDArray[np.bool_]:
        """bool [V]. Raises InputError where llguidance reaches a limit."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())
        found = np.unpackbits(bits, count=self._tokenizer.vocab_size, bitorder="little").view(np.bool_)
        if np.count_nonzero(bits) == 1:  # bytes, which are fewer to look at
            self._spell_out(found)
        return found

    def _spell_out(self, allowed: npt.NDArray[np.bool_]) -> None:
        """Where a text is forced that is a special token's too, llguidance allows that token alone, and then refuses
        it: let the text come by ordinary tokens."""
        first, *more = map(int, np.flatnonzero(allowed))
        if more or not self._tokenizer.is_special_token(first) or self._matcher.validate_tokens([first]):
            return
        text = self._tokenizer.decode_bytes([first])
        ordinary = self._tokenizer.tokenize_bytes(text[:-1])[:1]
        if ordinary and self._matcher.validate_tokens(ordinary):
            allowed[[first, *ordinary]] = False, True

    def accept(self, token: int) -> None:
        """Raises InputError where the token is not allowed, or llguidance reaches a limit."""
        if not self._matcher.consume_token(token):
            raise _refused(self._matcher.get_error())

    def behind(self, text: bytes) -> GrammarConstraint | None:
        """A fork that has accepted a text; None where it is not allowed."""
        fork = self.fork()
        tokens = self._tokenizer.tokenize_bytes(text)
        return fork if not tokens or fork._matcher.consume_tokens(tokens) else None

    def fork(self) -> GrammarConstraint:
        return GrammarConstraint(self._matcher.deep_copy(), self._tokenizer)


class Grammars:
    """Makes constraints for the tokenizer of one model. Threads may share it.

    A grammar takes a process and a moment to compile; the latest ones are kept.

    Args:
        codec: of the tokenizer.
        vocab_size: of the model.
        eos: ids that end a text, at least one.

    Raises:
        InputError: llguidance is missing, or cannot take the tokenizer.
    """

    def __init__(self, codec: TextCodec, vocab_size: int, eos: Sequence[int]) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise _not_installed(error) from error
        if not eos:
            raise InputError(
                "The model has no end token.",
                note="A text that may end needs one, and the bundle names none.",
                hint="Add eos_token_id to the checkpoint's generation_config.json, and export again.",
            )
        try:
            self.tokenizer: LLTokenizer = LLTokenizer(_tokenizer_json(codec), n_vocab=vocab_size, eos_token=list(eos))
        except ValueError as error:
            raise InputError(
                "The tokenizer cannot be used with a schema or grammar.",
                note=f"llguidance says: {first_line(error):.300}",
                hint="Needed is a tokenizer of bytes, as nearly all models have.",
            ) from error
        self.codec = codec
        self._compiled = functools.lru_cache(_COMPILED)(self._compile)

    @classmethod
    def of(cls, bundle: Bundle) -> Grammars:
        """Those of a bundle.

        Raises:
            BundleError: there is no tokenizer.
            InputError: as the constructor.
        """
        manifest = bundle.manifest
        return cls(TextCodec.open(bundle.root / "tokenizer"), manifest.model.vocab_size, manifest.special_tokens.eos)

    def json_schema(self, schema: str | Mapping[str, Any] | bool) -> GrammarConstraint:
        """JSON that is valid under a schema, as text or as what JSON makes of it.

        Raises:
            InputError: it is no schema, too large, or has a keyword that llguidance does not support.
        """
        return self.constraint(f'{{"grammars": [{{"json_schema": {checked_schema(schema)}}}]}}')

    def json_object(self) -> GrammarConstraint:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> GrammarConstraint:
        """A text that a regular expression matches as a whole, in Rust's syntax.

        Raises:
            InputError: it is none, matches nothing but an empty text, or is too large.
        """
        from llguidance import LLMatcher

        return self.constraint(LLMatcher.grammar_from_regex(_checked_text("The regular expression", pattern)))

    def lark(self, grammar: str) -> GrammarConstraint:
        """A text of llguidance's variant of Lark grammars, whose first rule is `start`, without special tokens.

        Raises:
            InputError: it is none, or too large.
        """
        from llguidance import LLMatcher

        return self.constraint(LLMatcher.grammar_from_lark(_checked_text("The grammar", grammar)))

    def token(self, text: str) -> int | None:
        """The special token that is written so; None where it is ordinary text."""
        tokens = self.tokenizer.tokenize_str(text, parse_special=True)
        return tokens[0] if len(tokens) == 1 and self.tokenizer.is_special_token(tokens[0]) else None

    def constraint(self, grammar: str, trial: str | None = None) -> GrammarConstraint:
        """Of a grammar in llguidance's own form.

        Args:
            trial: the same without special tokens, which is compiled apart first (trial.py); `grammar` when None.
        """
        trial = _checked_text("The schema or grammar", trial or grammar)
        return GrammarConstraint(self._compiled(grammar, trial).deep_copy(), self.tokenizer)

    def _compile(self, grammar: str, trial: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        if reason := compile_apart(trial):
            raise _refused(reason)
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise _refused(matcher.get_error())
        first = GrammarConstraint(matcher, self.tokenizer).allowed()
        if matcher.is_stopped() or first.sum() == first[self.tokenizer.eos_tokens].sum():
            raise _refused("it allows nothing but an empty text")
        return matcher
