"""Chat templates, which are programs that come with a model, run with limits.

Enters: Jinja source, and the variables of a rendering. Leaves: text, or one error. A template gives what it gives in
transformers.

Jinja's sandbox keeps a template from the machine, but not from its time and memory. Here all work is paid for out of a
budget before it is done (budget.py has the prices):

    a run of the body of a loop or a macro     one step, and the text that stands in the body
    a call, a filter, a test, an operator      one step, and what it may read and make
    what is printed                            its characters

Nothing is timed, so a template that renders does so on a busy machine too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

from lora_drop_runtime.errors import InputError, first_line

from . import budget
from .budget import Budget, TooMuch, spending

MOST_SOURCE = 1 << 18  # characters; the longest in use have some 20,000
# Methods that a template may call: none that changes anything, none that makes much of little but those of budget.py
_STR = """capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier
islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix
replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill"""
_METHODS: dict[type[Any], frozenset[str]] = {
    str: frozenset(_STR.split()),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    int: frozenset(("bit_length",)),
    float: frozenset(("is_integer",)),
}
_LEFT_OUT = ("random", "striptags", "urlize", "xmlattr")  # filters: of HTML pages, and slow on texts made for it
_STEP, _READ, _SLICED, _LOOPED = "_step", "_read", "_sliced", "_looped"  # filters that the parser puts in
_SCOPES = ("_loop_vars", "_block_vars")  # what Jinja hands on with a call, and takes off before the function runs


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; here it only opens a scope."""

    tags = {"generation"}  # noqa: RUF012 jinja2 declares it an instance variable

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Formatter(SandboxedFormatter):
    """Of `str.format`."""

    def format_field(self, value: Any, format_spec: str) -> str:
        budget.pay_for_field(value, format_spec)
        text: str = super().format_field(value, format_spec)
        return text

    def convert_field(self, value: Any, conversion: Any) -> Any:
        budget.pay_for_text(value)
        return super().convert_field(value, conversion)


class _Format:
    """`text.format` or `text.format_map`."""

    def __init__(self, environment: jinja2.Environment, method: Any) -> None:
        self._environment, self._text, self._name = environment, method.__self__, method.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        if self._name == "format_map":
            args, kwargs = (), dict(*args)
        text: str = _Formatter(self._environment).vformat(str(self._text), args, kwargs)
        return text


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML
    budget.pay_for_json(value, indent, separators)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _paid(name: str, function: Callable[..., Any], pay: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that pays first. It takes the context, so that Jinja does not run it while it compiles."""
    passed = getattr(function, "jinja_pass_arg", None)

    @jinja2.pass_context
    def paid(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        value = pay(name, value, args, kwargs)
        if passed is None:
            return function(value, *args, **kwargs)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}[passed.name]
        return function(first, value, *args, **kwargs)

    return paid


def _same(value: Any) -> Any:
    return value


def _filter(name: str, value: Any) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


def _text_in(body: list[nodes.Node]) -> int:
    """Characters that stand in a body as they are."""
    return sum(len(data.data) for node in body for data in node.find_all(nodes.TemplateData))


def _with_prices(tree: nodes.Template) -> nodes.Template:
    """A parsed template whose loops, macros, comparisons, slices and `~` pay, too: Jinja asks nobody about those."""
    for node in list(tree.find_all(nodes.Stmt)):
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block | nodes.FilterBlock):
            step = _filter(_STEP, nodes.Const(_text_in(node.body), lineno=node.lineno))
            node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        if isinstance(node, nodes.For):
            node.iter = _filter(_LOOPED, node.iter)
            if node.test is not None:  # of its iterations some have no body
                node.test = nodes.And(_filter(_STEP, nodes.Const(1, lineno=node.lineno)), node.test)
    for expression in list(tree.find_all(nodes.Expr)):
        if isinstance(expression, nodes.Compare):
            expression.expr = _filter(_READ, expression.expr)
            for operand in expression.ops:
                operand.expr = _filter(_READ, operand.expr)
        elif isinstance(expression, nodes.Concat):
            expression.nodes = [_filter(_READ, inner) for inner in expression.nodes]
        elif isinstance(expression, nodes.Getitem) and isinstance(expression.arg, nodes.Slice):
            expression.node = _filter(_SLICED, expression.node)
    return tree


class _Environment(ImmutableSandboxedEnvironment):
    """As `transformers.utils.chat_template_utils` has it, and with prices."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=jinja2.pass_context(lambda _, value: budget.pay_for_text(value)),
        )
        filters: dict[str, Any] = {name: f for name, f in self.filters.items() if name not in _LEFT_OUT}
        filters |= {"tojson": _tojson, _STEP: _same, _READ: _same, _SLICED: _same, _LOOPED: _same}
        self.filters = {name: _paid(name, function, budget.pay_for_filter) for name, function in filters.items()}
        tests: dict[str, Any] = self.tests
        self.tests = {name: _paid(name, function, budget.pay_for_test) for name, function in tests.items()}
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self._functions = tuple(self.globals.values())

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _with_prices(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget.pay_for_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        return None if super().wrap_str_format(value) is None else _Format(self, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", type(__obj).__name__)
        given = {key: value for key, value in kwargs.items() if key not in _SCOPES}
        kind = next((kind for kind in _METHODS if isinstance(owner, kind)), None)
        if kind is not None and name in _METHODS[kind]:
            args = budget.pay_for_method(owner, name, args, given)
        elif isinstance(owner, LoopContext):
            budget.pay_for_text((*args, *given.values()))  # loop.changed compares
        else:
            of_jinja = type(__obj).__module__.startswith("jinja2.") or type(owner).__module__.startswith("jinja2.")
            known = of_jinja or isinstance(__obj, _Format) or any(__obj is function for function in __self._functions)
            if not known and not isinstance(__obj, Undefined):
                raise TooMuch(f"it calls {name!r}, which is not offered to templates")
            args = budget.pay_for_function(args, given)
        return super().call(__context, __obj, *args, **kwargs)


_ENVIRONMENT: _Environment | None = None


def _refused(error: Exception, fact: str, hint: str) -> InputError:
    endless = isinstance(error, RecursionError)
    note = "It is nested too deep, or calls itself without an end." if endless else first_line(error)[:300]
    return InputError(f"The model's chat template {fact}.", note=note, hint=f"{hint}, or pass a plain prompt.")


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja, as the model brings it.

    Raises:
        InputError: it is no template.
    """

    def __init__(self, source: str) -> None:
        global _ENVIRONMENT
        _ENVIRONMENT = _ENVIRONMENT or _Environment()
        try:
            if len(source) > MOST_SOURCE:
                raise TooMuch(f"it has {len(source)} characters, {MOST_SOURCE} are the most")
            self._template = _ENVIRONMENT.from_string(source)
        except Exception as error:  # whatever Jinja and Python make of a text that is no template
            hint = "Mend the checkpoint's chat_template.jinja and export again"
            raise _refused(error, "is no template that can be read", hint) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's text.

        Raises:
            InputError: it refuses the variables, fails, or asks for more than the limits.
        """
        try:
            with spending(Budget(variables)):
                text: str = self._template.render(variables)
        except Exception as error:  # it is a program that somebody else wrote, and may fail in any way
            hint = "Check the messages' roles, their order and content"
            raise _refused(error, "does not accept these messages", hint) from error
        return text
