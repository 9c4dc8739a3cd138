"""Text on either side of the token loop.

Enters: a bundle's `tokenizer/` directory; text or chat messages; generated token ids, one at a time.
Leaves: prompt token ids; generated text, in pieces that are safe to print.
Encoding, chat templates and decoding give what transformers gives. This module knows no model, no engine and
no sampling, and not which token ids end a text. It needs `tokenizers` and, for chat, `jinja2`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError, InputError, first_line, is_failure, wrong_type
from .files import is_file, is_utf8, read_bounded
from .reasoning import Thoughts, reasoning_style

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .templates.chat_template import ChatTemplate

MOST_CONFIG_BYTES = 64 << 20  # special tokens of a model may be many
MOST_TOKENIZER_BYTES = 1 << 30

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field of a message, first come first
_OWN_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt"}
_PROBE = "CONTENT_OF_A_MESSAGE"
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # its space tells whether a template trims

INCOMPLETE = "\ufffd"  # what a tokenizer decodes the bytes of an incomplete character to
_END_TOKENS = 8  # of a prompt, among which a mark of reasoning stands if it has begun one
_BYTES = 64  # tokens without a whole character, so many that they are hardly text
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


def _chat_template(tokenizer_dir: Path, config: Mapping[str, Any], name: str) -> str | None:
    """The template of that name; one without a name is `default`."""
    is_default = name == "default"
    path = tokenizer_dir / ("chat_template.jinja" if is_default else f"additional_chat_templates/{name}.jinja")
    if is_file(path):
        try:
            return read_bounded(path, MOST_CONFIG_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _unreadable("The model's chat template cannot be read.", f"{path} is not UTF-8 text") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == name]
        template = named[0].get("template") if named else None
    elif not is_default:
        template = None
    return template if isinstance(template, str) else None


def _check_chat(messages: object, tools: object) -> None:
    if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)):
        raise wrong_type("The list of tools", tools, "a list of dictionaries", "Use the tools of the OpenAI API.")
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise wrong_type("The chat", messages, "a list of dictionaries", 'Use [{"role": "user", "content": "Hi"}].')
    if not messages:
        raise InputError("The chat is empty.", note="There are no messages.", hint="Give at least one message.")


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it to a template.

    What is None is left out: many templates would print the word. Reasoning has the names that templates look for.
    """
    found = {name: value for name, value in message.items() if value is not None}
    reasoning = next((found[name] for name in _REASONING if name in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose text is a list of one part."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


def _shows(template: ChatTemplate, message: Mapping[str, Any], constants: Mapping[str, Any]) -> bool:
    with contextlib.suppress(InputError):
        return _PROBE in template.render({"messages": [message], "tools": None, "documents": None, **constants})
    return False


def checked_variables(variables: object) -> dict[str, Any]:
    """Variables of a chat template by name, none of which a rendering sets itself. Raises InputError."""
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise wrong_type(
            "The set of a template's variables",
            variables,
            "a dictionary",
            'Use for example {"enable_thinking": False}.',
        )
    own = sorted(_OWN_VARIABLES & variables.keys())
    if own:
        raise InputError(
            "A variable of the chat template has a value already.",
            note=f"{own[0]} was given; it is what the request says.",
            hint="Leave it out.",
        )
    return dict(variables)


def _continued(text: str, content: str) -> str:
    """A rendering up to the end of its last message, which has the tag there. As transformers does it.

    Raises:
        InputError: the template changes the message, or leaves it out.
    """
    place = text.rfind(_TAG.strip())
    if place < 0 or content.strip() not in text:
        raise InputError(
            "The last message cannot be continued.",
            note="The model's chat template leaves it out, or changes it.",
            hint="Let the model begin an answer of its own.",
        )
    trims = text[place : place + len(_TAG)] != _TAG
    return text[:place].rstrip() if trims else text[:place]


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
    character at the end. Special tokens are skipped, so a stop string never matches one but those that are kept.
    Bytes that are not UTF-8 become U+FFFD and never raise, unlike in `tokenizers.decoders.DecodeStream`.

    Args:
        codec: decodes the ids.
        stop: strings that end the text; the one completed first counts, whatever tokens it came in.
        kept: special tokens that are text, as for `codec.decode`.

    Attributes:
        stopped: whether a stop string was completed. Nothing is returned after it.

    Raises:
        InputError: a stop string is empty.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str] = (), kept: Collection[str] = ()) -> None:
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
        self._codec, self._kept = codec, kept
        self._stop = tuple(stop)
        # Ids are decoded after the ones before them, since a tokenizer may strip the space at a text's start.
        self._ids: list[int] = []  # context and new ids
        self._context = 0  # how many of them are context
        self._taken = 0  # how many characters of their text have been taken
        self._due = 0  # how many ids are decoded for sure
        self._held = ""  # text that may begin a stop string

    def push(self, token_id: int) -> str:
        """Takes the next id and returns the text that is ready, maybe none."""
        if self.stopped or self._codec.skips(int(token_id), self._kept):  # which may be thousands in a row
            return ""
        self._ids.append(int(token_id))
        # Bytes that are no character may go on for thousands of ids, which are then not decoded again at each of them
        if _BYTES < len(self._ids) < self._due and not self._text([self._ids[-1]]).rstrip(INCOMPLETE):
            return ""
        return self._new()

    def _text(self, ids: list[int]) -> str:
        return self._codec.decode(ids, kept=self._kept)

    def _new(self) -> str:
        """What is ready of the text of all ids, and has not been taken."""
        text, self._due = self._text(self._ids), len(self._ids) * 9 // 8
        ready = text.rstrip(INCOMPLETE)
        new = ready[self._taken :]
        if new and ready == text:
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._taken = len(self._text(self._ids))
        else:
            # Not less than before: with byte fallback, an incomplete character spoils the bytes before it.
            self._taken = max(self._taken, len(ready))
        return self._before_stop(new)

    def finish(self) -> str:
        """Returns the text held back: the possible beginning of a stop string, and what long rows of bytes ended in."""
        new = self._new() if self._ids and not self.stopped else ""
        text, self._held = new + self._held, ""
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


def _compiled(source: str) -> ChatTemplate:
    from .templates.chat_template import ChatTemplate

    return ChatTemplate(source)


class TextCodec:
    """The tokenizer and chat template of one model.

    Args:
        tokenizer: without truncation and padding.
        special_tokens: names as in tokenizer_config.json ("bos_token"), for the chat template.
        chat_template: Jinja source, or None for a model without one.
        tool_template: the one for chats with tools, where the model has two.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: str | None,
        tool_template: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)
        self.chat_template, self.tool_template = chat_template, tool_template
        self._parts_taken: dict[ChatTemplate, bool] = {}

    @classmethod
    def open(cls, tokenizer_dir: str | Path) -> TextCodec:
        """Reads tokenizer.json and, where present, tokenizer_config.json and the chat templates.

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
                hint="Export again from a checkpoint that has its tokenizer.json, or pass token ids from Python.",
            )
        try:
            tokenizer = Tokenizer.from_buffer(read_bounded(path, MOST_TOKENIZER_BYTES))
        except (BundleError, MemoryError):
            raise
        except BaseException as error:  # tokenizers raises nothing narrower than Exception, and panics
            if not is_failure(error):
                raise
            raise _unreadable("The tokenizer cannot be read.", f"{path}: {first_line(error):.200}") from error
        tokenizer.no_truncation()  # a file may carry its training set-up
        tokenizer.no_padding()
        config = _read_config(tokenizer_dir / "tokenizer_config.json")
        templates = (_chat_template(tokenizer_dir, config, name) for name in ("default", "tool_use"))
        return cls(tokenizer, _special_tokens(config), *templates)

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
        variables: Mapping[str, Any] | None = None,
        most_tokens: int | None = None,
    ) -> NDArray[np.int64]:
        """Messages to the ids int64 [T] of a prompt for the assistant's answer.

        Arguments as for `render_chat` and `encode`.

        Raises:
            InputError: as `render_chat`, or the template writes nothing.
            TextTooLong: as `encode`.
        """
        text = self.render_chat(messages, tools=tools, variables=variables)
        ids = self._encoded(text, most_tokens, special_tokens=False)  # the template's own are in it
        if not ids.size:
            raise InputError(
                "The model's chat template writes nothing for these messages.",
                note=f"Its text is {text!r}, which has no tokens.",
                hint="Mend the checkpoint's chat_template.jinja and export again, or pass a plain prompt.",
            )
        return ids

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """Messages, such as {"role": "user", "content": "Hi"}, to the text that the model was trained on.

        Args:
            tools: that the model may call, {"type": "function", "function": {"name": …, "parameters": …}} each.
            variables: others that the model's template knows, such as {"enable_thinking": False}.
            continue_final_message: end within the last message, which the model goes on with.

        Raises:
            InputError: the model has no chat template, or one that says nothing of tools, there is no message, or the
                template refuses them.
        """
        _check_chat(messages, tools)
        given = {} if variables is None else checked_variables(variables)
        if continue_final_message:
            last = messages[-1]
            content = last.get("content")
            if not isinstance(content, str):
                raise InputError("The last message cannot be continued.", note="It has no text.", hint="Give it some.")
            tagged = [*messages[:-1], {**last, "content": content + _TAG}]
            text = self._rendered(tagged, add_generation_prompt, tools, given)
            return _continued(text, content)
        text = self._rendered(messages, add_generation_prompt, tools, given)
        plain = None
        if tools and self.tool_template is None:
            with contextlib.suppress(InputError):  # of a template that is for chats with tools alone
                plain = self._rendered(messages, add_generation_prompt, None, given)
        if tools and text == plain:
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
        given: Mapping[str, Any],
    ) -> str:
        template = self._compiled_tool_template if tools and self.tool_template else self._compiled_template
        asked = map(_for_template, messages)
        variables = {
            "messages": list(map(_in_parts, asked) if self._takes_parts(template) else asked),
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return template.render(variables | self._special_tokens | dict(given))

    def thoughts(self, prompt: NDArray[np.int64], *, with_tools: bool = False) -> Thoughts | None:
        """Reasoning that the answer to a chat's prompt, int64 [T], may begin with; None where its template knows none.

        Args:
            with_tools: the prompt tells of tools.
        """
        style = reasoning_style(self.tool_template if with_tools and self.tool_template else self.chat_template)
        if style is None:
            return None
        return Thoughts(style, style.begun_by(self.decode(prompt[-_END_TOKENS:], skip_special_tokens=False)))

    def decode(
        self,
        ids: Sequence[int] | NDArray[np.integer[Any]],
        skip_special_tokens: bool = True,
        kept: Collection[str] = (),
    ) -> str:
        """Ids [T] to text. Bytes that are not UTF-8 become U+FFFD.

        Args:
            kept: special tokens that are not skipped, such as the marks of a tool call.

        Raises:
            InputError: they are no ids of one text, such as all rows of `generate`.
            BundleError: the tokenizer fails.
        """
        try:
            array = np.asarray(ids)
        except (TypeError, ValueError, OverflowError):  # rows of different lengths, or anything
            array = np.asarray(None)
        given: list[int] = array.tolist()
        if array.ndim != 1 or (given and (array.dtype.kind not in "iu" or min(given) < 0 or max(given) >= 2**32)):
            hint = "Use for example decode(rows[0]), where rows is what generate returned."
            raise wrong_type("The list of tokens", ids, "the token ids of one text", hint)
        if skip_special_tokens and kept:
            given = [one for one in given if one not in self._special or self._special[one] in kept]
            skip_special_tokens = False
        try:
            return self._tokenizer.decode(given, skip_special_tokens)
        except BaseException as error:
            if not is_failure(error):
                raise
            raise _unreadable("The tokenizer cannot write tokens as text.", f"{first_line(error):.200}") from error

    def skips(self, token_id: int, kept: Collection[str] = ()) -> bool:
        """Whether `decode` leaves it out: it is a special token, and not one of those that are kept."""
        return token_id in self._special and self._special[token_id] not in kept

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 of one token within a text, which may be a part of a character."""
        text, token = self.decode([token_id], skip_special_tokens=False), self._tokenizer.id_to_token(token_id)
        if INCOMPLETE not in text or not token:
            return (text if token_id in self._added else self._behind_another(token_id, text)).encode()
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(byte[1])
        byte_of = _bytes_of_characters()
        return bytes(map(byte_of.__getitem__, token)) if byte_of.keys() >= {*token} else text.encode()

    def special_id(self, name: str) -> int | None:
        """The id of a special token by its name in tokenizer_config.json ("bos_token"), None without one."""
        text = self._special_tokens.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)

    def tokenizer_json(self) -> str:
        """The tokenizer as text, in the format of tokenizer.json."""
        return self._tokenizer.to_str()

    def stream(self, stop: Sequence[str] = (), kept: Collection[str] = ()) -> TextStream:
        """A new text stream for one generated sequence."""
        return TextStream(self, stop, kept)

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
        except BaseException as error:  # an unknown token in a vocabulary without one, or an expression gives up
            if not is_failure(error):
                raise
            raise InputError(
                "The tokenizer cannot take the text.",
                note=f"{first_line(error):.200}.",
                hint="Give other text, or pass token ids; the tokenizer of the checkpoint may be damaged.",
            ) from error
        return np.array(ids, np.int64)

    def _behind_another(self, token_id: int, alone: str) -> str:
        """What a token adds to a text. Alone, one with a space in front may lose it."""
        anchor, before = self._anchor
        whole = self.decode([anchor, token_id], skip_special_tokens=False) if before else ""
        return whole[len(before) :] if before and whole.startswith(before) else alone

    @cached_property
    def _added(self) -> frozenset[int]:
        """Tokens beside the vocabulary's own, such as special ones."""
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def _special(self) -> dict[int, str]:
        """Special tokens by their ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token_id: token.content for token_id, token in added.items() if token.special}

    @cached_property
    def _anchor(self) -> tuple[int, str]:
        """An ordinary token to decode others behind, and its text; empty where there is none such."""
        ids = self._encoded("a", None, special_tokens=False)
        text = self.decode(ids[-1:], skip_special_tokens=False)
        return (int(ids[-1]), text) if text == "a" else (0, "")

    def _takes_parts(self, template: ChatTemplate) -> bool:
        """Whether it leaves out a text that is no list of parts, as those of many models that see do."""
        if template not in self._parts_taken:
            message = {"role": "user", "content": _PROBE}
            constants = {"add_generation_prompt": False, **self._special_tokens}
            whole, parts = (_shows(template, one, constants) for one in (message, _in_parts(message)))
            self._parts_taken[template] = parts and not whole
        return self._parts_taken[template]

    @cached_property
    def _compiled_template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise InputError(
                "The model has no chat template.",
                note="It has no chat_template.jinja, and no (default) chat_template in tokenizer_config.json.",
                hint="Pass a plain prompt.",
            )
        return _compiled(self.chat_template)

    @cached_property
    def _compiled_tool_template(self) -> ChatTemplate:
        assert self.tool_template is not None
        return _compiled(self.tool_template)
