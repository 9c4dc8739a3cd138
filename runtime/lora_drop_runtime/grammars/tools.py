"""Tools as the OpenAI API has them.

Enters: a list of tools and a choice, the chat template of the model. Leaves: calls of them (calls.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_drop_runtime.errors import InputError, wrong_type

from .call_styles import style_of
from .calls import AUTO, NAME, NONE, REQUIRED, Calls

MOST_TOOLS = 128
ALLOWED = "allowed_tools"
_TOOL = '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}'


def _checked(tools: object) -> dict[str, Mapping[str, Any]]:
    """Name → function."""
    hint = f"Use for example [{_TOOL}]."
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise wrong_type("The list of tools", tools, "a list of objects", hint)
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise InputError(
                "A tool is none, or has no name.",
                note=f"It is {tool!r:.100}; a name has up to 64 letters, digits, dots, dashes and underscores.",
                hint=hint,
            )
        if name in found:
            raise InputError(
                "Two tools have one name.", note=f"It is {name}.", hint="Give each tool a name of its own."
            )
        assert isinstance(function, Mapping)
        parameters = function.get("parameters")
        if parameters is not None and (
            not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object"
        ):
            raise InputError(
                "The parameters of a tool are no schema of an object.",
                note=f"Those of {name} are {parameters!r:.100}.",
                hint='Use for example {"type": "object", "properties": {"city": {"type": "string"}}}.',
            )
        found[name] = function
    if not 1 <= len(found) <= MOST_TOOLS:
        raise InputError(
            "The number of tools is out of range.",
            note=f"It is {len(found)}; possible is 1 to {MOST_TOOLS}.",
            hint=hint,
        )
    return found


def _named(choice: object) -> object:
    """The name in `{"type": "function", "function": {"name": …}}`."""
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    return function.get("name") if isinstance(function, Mapping) else None


def _allowed(choice: object) -> tuple[object, list[object]]:
    """The mode and the names in `{"type": "allowed_tools", "allowed_tools": {"mode": …, "tools": […]}}`."""
    allowed = choice.get(ALLOWED) if isinstance(choice, Mapping) and choice.get("type") == ALLOWED else None
    tools = allowed.get("tools") if isinstance(allowed, Mapping) else None
    if not isinstance(allowed, Mapping) or not isinstance(tools, list | tuple) or len(tools) > MOST_TOOLS:
        return None, []
    return allowed.get("mode"), [*map(_named, tools)]


def _chosen(choice: object, names: Sequence[str]) -> tuple[str, Sequence[str]]:
    """`auto`, `none`, `required`, or the name of a tool behind a colon; and the tools that may be called."""
    if choice in (AUTO, NONE, REQUIRED):
        return str(choice), names
    if (name := _named(choice)) in names:
        return f":{name}", names
    mode, allowed = _allowed(choice)
    if mode in (AUTO, REQUIRED) and allowed and all(one in names for one in allowed):
        return str(mode), [one for one in names if one in allowed]
    raise InputError(
        "The choice of a tool is not known.",
        note=f"It is {choice!r:.100}; possible are auto, none, required, one of the tools {', '.join(names)}, and some "
        "of them as allowed_tools, in the mode auto or required.",
        hint='Use for example {"type": "function", "function": {"name": "' + names[0] + '"}}.',
    )


class Tools:
    """The tools of a request.

    Args:
        tools: as in the API, `{"type": "function", "function": {"name": …, "parameters": a JSON schema}}`.
        choice: `auto`, where the model is free until it begins a call; `none`; `required`, where it writes calls alone;
            `{"type": "function", "function": {"name": …}}`, which it then calls; or `{"type": "allowed_tools",
            "allowed_tools": {"mode": "auto" or "required", "tools": […]}}`, of which alone it may call some. The
            template is told of all.
        parallel: whether it may write several calls.

    Attributes:
        for_template: what `TextCodec.encode_chat` takes as its tools; None where the model is to call none.

    Raises:
        InputError: they are none, or the choice is not one of them.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]], choice: object = AUTO, *, parallel: bool = True) -> None:
        self._functions = _checked(tools)
        self._choice, allowed = _chosen(choice, list(self._functions))
        self._functions = {name: self._functions[name] for name in allowed}
        self._parallel = parallel
        self.for_template = None if self._choice == NONE else list(tools)

    def calls(self, chat_template: str | None) -> Calls | None:
        """Calls of the tools as a model writes them; None where it is to call none.

        Args:
            chat_template: of the model for chats with tools.

        Raises:
            InputError: the template has calls of another style, or none.
        """
        if self._choice == NONE:
            return None
        return Calls(self._functions, self._choice, style_of(chat_template), parallel=self._parallel)
