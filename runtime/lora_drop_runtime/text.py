"""Text on either side of the token loop.

Enters: a bundle's `tokenizer/` directory; text or chat messages; generated token ids, one at a time.
Leaves: prompt token ids; generated text, in pieces that are safe to print.
Encoding, chat templates and decoding give what transformers gives. This module knows no model, no engine and
no sampling, and not which token ids end a text. It needs `tokenizers` and, for chat, `jinja2`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError, InputError

if TYPE_CHECKING:
    import jinja2
    from tokenizers import Tokenizer

INCOMPLETE = "\ufffd"  # what a tokenizer decodes the bytes of an incomplete character to


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError("The tokenizer's configuration cannot be read.", note=f"{path}: {error}") from error
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}  # add_bos_token is a bool


def _chat_template(tokenizer_dir: Path, config: Mapping[str, Any]) -> str | None:
    path = tokenizer_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template: str | list[dict[str, str]] | None = config.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _compile_template(source: str) -> jinja2.Template:
    """Compiles as `transformers.utils.chat_template_utils` does. Templates come with the model: sandboxed."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):  # pyproject.toml leaves jinja2 untyped
        """`{% generation %}` marks the assistant's text for training; here it only opens a scope."""

        tags = {"generation"}  # noqa: RUF012 jinja2 declares it an instance variable

        def parse(self, parser: Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(source)


class TextStream:
    """Generated token ids in, text out, as soon as it can no longer change.

    The pieces joined are `codec.decode` of all ids, up to the first stop string and without an incomplete
    character at the end. Special tokens are skipped, so a stop string never matches one.
    Bytes that are not UTF-8 become U+FFFD and never raise, unlike in `tokenizers.decoders.DecodeStream`.

    Args:
        codec: decodes the ids.
        stop: strings that end the text; the one completed first counts, whatever tokens it came in.

    Attributes:
        stopped: whether a stop string was completed. Nothing is returned after it.

    Raises:
        InputError: a stop string is empty.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise InputError(
                "A stop string is empty.",
                note=f"Given are {', '.join(map(repr, stop))}.",
                hint="Leave it out, or give at least one character.",
            )
        self.stopped = False
        self._codec = codec
        self._stop = tuple(stop)
        # Ids are decoded after the ones before them, since a tokenizer may strip the space at a text's start.
        self._ids: list[int] = []  # context and new ids
        self._context = 0  # how many of them are context
        self._taken = 0  # how many characters of their text have been taken
        self._held = ""  # text that may begin a stop string

    def push(self, token_id: int) -> str:
        """Takes the next id and returns the text that is ready, maybe none."""
        if self.stopped:
            return ""
        self._ids.append(int(token_id))
        text = self._codec.decode(self._ids)
        ready = text.rstrip(INCOMPLETE)
        new = ready[self._taken :]
        if new and ready == text:
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._taken = len(self._codec.decode(self._ids))
        else:
            # Not less than before: with byte fallback, an incomplete character spoils the bytes before it.
            self._taken = max(self._taken, len(ready))
        return self._before_stop(new)

    def finish(self) -> str:
        """Returns the text held back as the possible beginning of a stop string."""
        text, self._held = self._held, ""
        return text

    def _before_stop(self, new: str) -> str:
        text = self._held + new
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        begun = [n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        ready = len(text) - max(begun, default=0)
        self._held = text[ready:]
        return text[:ready]


class TextCodec:
    """The tokenizer and chat template of one model.

    Args:
        tokenizer: without truncation and padding.
        special_tokens: names as in tokenizer_config.json ("bos_token"), for the chat template.
        chat_template: Jinja source, or None for a model without one.
    """

    def __init__(self, tokenizer: Tokenizer, special_tokens: Mapping[str, str], chat_template: str | None) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)
        self.chat_template = chat_template

    @classmethod
    def open(cls, tokenizer_dir: Path) -> TextCodec:
        """Reads tokenizer.json and, where present, tokenizer_config.json and chat_template.jinja.

        Raises:
            BundleError: tokenizer.json is missing, or a file cannot be read.
        """
        from tokenizers import Tokenizer

        path = tokenizer_dir / "tokenizer.json"
        if not path.is_file():
            raise BundleError(
                "There is no tokenizer.",
                note=f"{path} does not exist.",
                hint="Pass token ids instead of text.",
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise BundleError("The tokenizer cannot be read.", note=f"{path}: {error}") from error
        tokenizer.no_truncation()  # a file may carry its training set-up
        tokenizer.no_padding()
        config = _read_config(tokenizer_dir / "tokenizer_config.json")
        return cls(tokenizer, _special_tokens(config), _chat_template(tokenizer_dir, config))

    def encode(self, text: str) -> NDArray[np.int64]:
        """Text to ids int64 [T], with the special tokens the tokenizer itself adds (such as BOS)."""
        return np.array(self._tokenizer.encode(text).ids, np.int64)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> NDArray[np.int64]:
        """Messages to the ids int64 [T] of a prompt for the assistant's answer.

        Raises:
            InputError: as `render_chat`.
        """
        text = self.render_chat(messages)  # special tokens included
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Messages, such as {"role": "user", "content": "Hi"}, to the text that the model was trained on.

        Raises:
            InputError: the model has no chat template, there is no message, or the template refuses them.
        """
        import jinja2

        if not messages:
            raise InputError("The chat is empty.", hint="give at least one message.")
        try:
            text: str = self._compiled_template.render(
                # transformers, too, drops what is None: many templates would print the word.
                messages=[{k: v for k, v in message.items() if v is not None} for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:  # TypeError: content of a type it does not handle
            raise InputError(
                "The model's chat template does not accept these messages.",
                note=str(error),
                hint="Check the messages' roles, their order and content, or pass a plain prompt.",
            ) from error
        return text

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]], skip_special_tokens: bool = True) -> str:
        """Ids [T] to text. Bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens)

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """A new text stream for one generated sequence."""
        return TextStream(self, stop)

    @cached_property
    def _compiled_template(self) -> jinja2.Template:
        if self.chat_template is None:
            raise InputError(
                "The model has no chat template.",
                note="It has no chat_template.jinja, and no (default) chat_template in tokenizer_config.json.",
                hint="Pass a plain prompt.",
            )
        return _compile_template(self.chat_template)
