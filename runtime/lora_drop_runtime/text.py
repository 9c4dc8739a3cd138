"""Text on either side of the token loop.

Enters: a bundle's `tokenizer/` directory; text or chat messages; generated token ids, one at a time.
Leaves: prompt token ids; generated text, in pieces that are safe to print.
Encoding, chat templates and decoding give what transformers gives. This module knows no model, no engine and
no sampling, and not which token ids end a text. It needs `tokenizers` and, for chat, `jinja2`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError, InputError, first_line, wrong_type
from .files import is_file, is_utf8, read_bounded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .templates.chat_template import ChatTemplate

MOST_CONFIG_BYTES = 64 << 20  # special tokens of a model may be many
MOST_TOKENIZER_BYTES = 1 << 30

INCOMPLETE = "\ufffd"  # what a tokenizer decodes the bytes of an incomplete character to
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")  # of tokenizers that fall back to bytes


def _unreadable(fact: str, reason: str) -> BundleError:
    return BundleError(fact, note=f"{reason}.", hint="Copy the tokenizer's files from the checkpoint again.")


def _read_config(path: Path) -> dict[str, Any]:
    """The tokenizer's configuration, {} without one."""
    if not is_file(path):
        return {}
    try:
        config = json.loads(read_bounded(path, MOST_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise _unreadable("The tokenizer's configuration cannot be read.", f"{path}: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise _unreadable("The tokenizer's configuration cannot be read.", f"{path} holds no JSON object")
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}  # add_bos_token is a bool


def _chat_template(tokenizer_dir: Path, config: Mapping[str, Any]) -> str | None:
    path = tokenizer_dir / "chat_template.jinja"
    if is_file(path):
        try:
            return read_bounded(path, MOST_CONFIG_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _unreadable("The model's chat template cannot be read.", f"{path} is not UTF-8 text") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


@cache
def _bytes_of_characters() -> dict[str, int]:
    """What the characters stand for that byte-level tokenizers write bytes as (Radford et al. 2019): themselves where
    they are printed, else those from 256 on in the bytes' order.
    """
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _check_text(what: str, text: object) -> None:
    """Refuse what no tokenizer takes: a terminal's or a file's bytes that were no UTF-8 are halves of characters."""
    if not isinstance(text, str):
        raise wrong_type(what, text, "a text", "Use a str.")
    if not is_utf8(text):
        raise InputError(
            f"{what} is not UTF-8.",
            note=f"It is {text!a:.80}.",
            hint="Give UTF-8 text; a file in another encoding can be converted with iconv.",
        )


class TextTooLong(InputError):
    """A text has more characters than so many tokens can have."""


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
        if isinstance(stop, str) or not isinstance(stop, Sequence):
            raise wrong_type("The list of stop strings", stop, "a list of texts", 'Use for example ["\\n"].')
        for text in stop:
            _check_text("A stop string", text)
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
    def open(cls, tokenizer_dir: str | Path) -> TextCodec:
        """Reads tokenizer.json and, where present, tokenizer_config.json and chat_template.jinja.

        Raises:
            BundleError: tokenizer.json is missing, or a file cannot be read.
        """
        from tokenizers import Tokenizer

        tokenizer_dir = Path(tokenizer_dir)
        path = tokenizer_dir / "tokenizer.json"
        if not is_file(path):
            raise BundleError(
                "There is no tokenizer.",
                note=f"{path} does not exist.",
                hint="Put the tokenizer's files there, or pass token ids from Python.",
            )
        try:
            tokenizer = Tokenizer.from_buffer(read_bounded(path, MOST_TOKENIZER_BYTES))
        except (BundleError, MemoryError):
            raise
        except Exception as error:  # tokenizers raises nothing narrower
            raise _unreadable("The tokenizer cannot be read.", f"{path}: {first_line(error):.200}") from error
        tokenizer.no_truncation()  # a file may carry its training set-up
        tokenizer.no_padding()
        config = _read_config(tokenizer_dir / "tokenizer_config.json")
        return cls(tokenizer, _special_tokens(config), _chat_template(tokenizer_dir, config))

    def encode(self, text: str, *, most_tokens: int | None = None) -> NDArray[np.int64]:
        """Text to ids int64 [T], with the special tokens the tokenizer itself adds (such as BOS).

        Args:
            most_tokens: a text that cannot be so few is refused without reading it, which may take seconds.

        Raises:
            TextTooLong: the text has more characters than so many tokens can have.
        """
        return self._encoded(text, most_tokens, special_tokens=True)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        most_tokens: int | None = None,
    ) -> NDArray[np.int64]:
        """Messages to the ids int64 [T] of a prompt for the assistant's answer.

        Arguments as for `render_chat` and `encode`.

        Raises:
            InputError: as `render_chat`.
            TextTooLong: as `encode`.
        """
        text = self.render_chat(messages, tools=tools)
        return self._encoded(text, most_tokens, special_tokens=False)  # the template's own are in it

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Messages, such as {"role": "user", "content": "Hi"}, to the text that the model was trained on.

        Args:
            tools: that the model may call, {"type": "function", "function": {"name": …, "parameters": …}} each.

        Raises:
            InputError: the model has no chat template, or one that says nothing of tools, there is no message, or the
                template refuses them.
        """
        text = self._rendered(messages, add_generation_prompt, tools)
        if tools and text == self._rendered(messages, add_generation_prompt, None):
            raise InputError(
                "The model's chat template says nothing of tools.",
                note=f"{len(tools)} were given, and its text is the same without them.",
                hint="Use a model that was trained to call tools, or describe them in a message.",
            )
        return text

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> str:
        if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)):
            raise wrong_type("The list of tools", tools, "a list of dictionaries", "Use the tools of the OpenAI API.")
        if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
            raise wrong_type("The chat", messages, "a list of dictionaries", 'Use [{"role": "user", "content": "Hi"}].')
        if not messages:
            raise InputError("The chat is empty.", note="There are no messages.", hint="Give at least one message.")
        variables = {
            # transformers, too, drops what is None: many templates would print the word.
            "messages": [{k: v for k, v in message.items() if v is not None} for message in messages],
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._compiled_template.render(variables | self._special_tokens)

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]], skip_special_tokens: bool = True) -> str:
        """Ids [T] to text. Bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 of one token, which may be a part of a character."""
        text, token = self.decode([token_id], skip_special_tokens=False), self._tokenizer.id_to_token(token_id)
        if INCOMPLETE not in text or not token:
            return text.encode()
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(byte[1])
        byte_of = _bytes_of_characters()
        return bytes(map(byte_of.__getitem__, token)) if byte_of.keys() >= {*token} else text.encode()

    def tokenizer_json(self) -> str:
        """The tokenizer as text, in the format of tokenizer.json."""
        return self._tokenizer.to_str()

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """A new text stream for one generated sequence."""
        return TextStream(self, stop)

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the vocabulary's longest token; what stands for a byte counts as one."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)

    def _encoded(self, text: str, most_tokens: int | None, *, special_tokens: bool) -> NDArray[np.int64]:
        _check_text("The text", text)
        if most_tokens is not None and len(text) > most_tokens * self._longest_token:
            raise TextTooLong(
                "The text is too long.",
                note=f"It has {len(text)} characters, and {most_tokens} tokens are the most.",
                hint="Shorten it.",
            )
        try:
            # `encode` would hold the GIL meanwhile, for seconds where the text is long
            ids = self._tokenizer.encode_batch([text], add_special_tokens=special_tokens)[0].ids
        except Exception as error:  # tokenizers raises nothing narrower: an unknown token in a vocabulary without one
            raise InputError(
                "The tokenizer cannot take the text.",
                note=f"{first_line(error):.200}.",
                hint="Give other text, or pass token ids; the tokenizer of the checkpoint may be damaged.",
            ) from error
        return np.array(ids, np.int64)

    @cached_property
    def _compiled_template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise InputError(
                "The model has no chat template.",
                note="It has no chat_template.jinja, and no (default) chat_template in tokenizer_config.json.",
                hint="Pass a plain prompt.",
            )
        from .templates.chat_template import ChatTemplate

        return ChatTemplate(self.chat_template)
