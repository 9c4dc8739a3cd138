"""Styles in which models write calls of tools, as data.

A model is trained on one, which its chat template tells it. A text has sections of calls:

    section = begin opening call (between call)* closing end
    call = head[0] name head[1] arguments tail

The arguments are JSON. A style that is new is a row of `STYLES`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_drop_runtime.errors import InputError


@dataclass(frozen=True)
class CallStyle:
    """How calls are written.

    Attributes:
        models: that write so, for messages.
        signs: all of them are in the chat template of such a model.
        others: none of them is.
        marks: parts of the text that are special tokens of some models.
        begin: of a section. Where it is empty, a call is the whole text.
        between: calls of a section; None where a section has one.
        after: a section, if another one follows; None where a text has one.
    """

    models: str
    signs: tuple[str, ...]
    head: tuple[str, str]
    tail: str
    others: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    begin: str = ""
    opening: str = ""
    between: str | None = None
    closing: str = ""
    end: str = ""
    after: str | None = None

    def head_of(self, name: str) -> str:
        return name.join(self.head)


_ARGUMENTS = ('{"name": "', '", "arguments": ')
_MISTRAL = CallStyle(
    models="Mistral",
    signs=("[AVAILABLE_TOOLS]", "[TOOL_CALLS]"),
    others=("[ARGS]", "[CALL_ID]"),
    marks=("[TOOL_CALLS]",),
    begin="[TOOL_CALLS]",
    opening="[",
    head=_ARGUMENTS,
    tail="}",
    between=", ",
    closing="]",
)
STYLES = (
    CallStyle(
        models="Hermes, Qwen2.5 and Qwen3",
        signs=("<tool_call>",),
        others=("<function=", "<arg_key>", "<invoke", "<tool_calls>"),  # in XML (Qwen3-Coder, GLM, MiniMax), in a list
        marks=("<tool_call>", "</tool_call>"),
        begin="<tool_call>",
        opening="\n",
        head=_ARGUMENTS,
        tail="}",
        closing="\n",
        end="</tool_call>",
        after="\n",
    ),
    CallStyle(
        models="Llama 3.1 to 3.3",
        signs=('{"name": function name, "parameters": dictionary of argument name and its value}',),
        head=('{"name": "', '", "parameters": '),
        tail="}",
    ),
    replace(_MISTRAL, signs=(*_MISTRAL.signs, "[TOOL_CALLS] ["), opening=" ["),
    _MISTRAL,
    CallStyle(
        models="Ministral 3",
        signs=("[TOOL_CALLS]", "[ARGS]"),
        others=("[CALL_ID]",),
        marks=("[TOOL_CALLS]", "[ARGS]"),
        begin="[TOOL_CALLS]",
        head=("", "[ARGS]"),
        tail="",
        after="",
    ),
)


def style_of(chat_template: str | None) -> CallStyle:
    """The style that a chat template tells.

    Raises:
        InputError: none that is known.
    """
    template = (chat_template or "").replace('\\"', '"')
    for style in STYLES:
        if all(sign in template for sign in style.signs) and not any(other in template for other in style.others):
            return style
    raise InputError(
        "The model's chat template has no tool calls of a known style.",
        note=f"Known are those of {', '.join(dict.fromkeys(style.models for style in STYLES))}.",
        hint="Leave the tools out, or describe them in a message and use a JSON schema.",
    )
