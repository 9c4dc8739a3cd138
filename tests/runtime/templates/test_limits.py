"""Chat templates that would never end or fill the memory end with one error, and ordinary ones are what Jinja makes."""

from __future__ import annotations

import json
import resource

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.templates.chat_template import MOST_SOURCE, ChatTemplate

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Say "hi"\nto <b>him</b>'}]
CHAT += [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "a,b , c"}]
VARIABLES = {"messages": CHAT, "add_generation_prompt": True, "bos_token": "<s>"}
MOST_KIB = 400 << 10

GREEDY = r"""
{% for i in range(10**9) %}{% endfor %}
{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}
{% for i in range(99999) %}{% for j in range(99999) if j == 1 %}{% endfor %}{% endfor %}
{% for i in range(99999) %}{{ range(99999)|select|list|length }}{% endfor %}
{% for i in range(99999) %}{% if 5 in range(99999)|select('none') %}{% endif %}{% endfor %}
{% for i in range(99999) %}{% for j in range(99999)|select %}{{ loop.length }}{% break %}{% endfor %}{% endfor %}
{% for i in range(99999) %}{{ (-10**100)|_step }}{% for j in range(999) %}{% endfor %}{% endfor %}
{% for x in [[]] recursive %}{{ loop([[]]) }}{% endfor %}
{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}
{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}
{% block a %}{{ self.a() }}{% endblock %}
{{ 'x' * 10**10 }}
{{ 10**10 * 'x' }}
{{ [1] * 10**10 }}
{{ 2 ** (10**10) }}
{{ 10**1000 * 10**1000 }}
{% set ns = namespace(s='x') %}{% for i in range(100) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}
{% set ns = namespace(s='x') %}{% for i in range(100) %}{% set ns.s = ns.s + ns.s %}{% endfor %}
{% set ns = namespace(s='x') %}{% for i in range(100) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}
{% set ns = namespace(s=['x']) %}{% for i in range(100) %}{% set ns.s = ns.s + ns.s %}{% endfor %}
{% set ns = namespace(s=['x']) %}{% for i in range(100) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}
{% set ns = namespace(s=['x']) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s|tojson }}
{% set ns = namespace(s='x'*100000, l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + [ns.s[1:]] %}{% endfor %}
{% set s = 'x'*1000000 %}{% set t = 'x'*999999 ~ 'x' %}{% for i in range(99999) %}{% if s == t %}{% endif %}{% endfor %}
{% set s = 'x'*1000000 %}{% for i in range(99999) %}{% if 'y' in s or s is upper %}{% endif %}{% endfor %}
{{ '%1000000000d' % 1 }}
{{ '%.1000000000f' % 1 }}
{{ '%*d' % (1000000000, 1) }}
{{ ('%s' * 100000) % (('x'*100000,)*100000) }}
{{ '%(a)1000000000d' % {'a': 1} }}
{{ '%1000000000d'|format(1) }}
{{ '{:1000000000}'.format(1) }}
{{ '{:{w}}'.format(1, w=1000000000) }}
{{ '{a}{a}'.format_map({'a': 'x'*10000000}) }}
{{ 'x'|center(10**10) }}
{{ 'x'|center(10000000000) }}
{{ 'x'.center(10**10) }}
{{ 'x'['ljust'](10000000000) }}
{{ ''|attr('rjust')(10000000000) }}
{{ ['x']|map('center', 10000000000)|list }}
{{ 'x'.zfill(10000000000) }}
{{ '\t'.expandtabs(10000000000) }}
{{ 'x'.encode().ljust(10000000000) }}
{{ (1).to_bytes(10000000000) }}
{{ 'a\nb'|indent(1000000000) }}
{{ ('a\n'*100000)|indent('x'*100000) }}
{{ 'a b'|wordwrap(1, wrapstring='y'*20000000) }}
{{ messages|tojson(indent=1000000000) }}
{{ messages|tojson(separators=('x'*10000000, 'y')) }}
{{ ('x'*100000).replace('x', 'y'*100000) }}
{{ ('x'*100000)|replace('x', 'y'*100000) }}
{{ ('x'*100000).join(['y']*100000) }}
{{ (['y'*100000]*100000)|join }}
{{ [1]|batch(1000000000, 'x')|list }}
{{ [1]|slice(1000000000)|list }}
{{ ('x'*9000000)|list|length }}
{{ ('a,'*3000000).split(',')|length }}
{{ ([[1]]*100000)|sum(start=[])|length }}
{{ 1|round(1000000000, 'ceil') }}
{{ lipsum(100000000) }}
""".strip().splitlines()
BROKEN = {
    "no template": "{{ foo( }}",
    "an open comment": "{# ",
    "unknown filter": "{{ 1|nothing }}",
    "undefined": "{{ nothing.at.all }}",
    "undefined call": "{{ nothing() }}",
    "raised": "{{ raise_exception('no system messages') }}",
    "raised a list": "{{ raise_exception(messages) }}",
    "wrong type": "{{ 1 + 'x' }}",
    "division": "{{ 1 / 0 }}",
    "include": "{% include 'x' %}",
    "extends": "{% extends 'x' %}",
    "import": "{% import 'x' as y %}",
    "inner attribute": "{{ ''.__class__.__mro__ }}",
    "inner attribute of a format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "mutation": "{{ messages.append(1) }}",
    "method": "{{ 'x'.encode() }}",
    "namespace": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "nested": "{{ " + "(" * 100_000 + " }}",
    "chained": "{{ a" + ".b" * 60_000 + " }}",
    "long number": "{{ 1" + "0" * 100_000 + " }}",
    "long": "x" * (MOST_SOURCE + 1),
    "loops": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
}
ORDINARY = [
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ '\n' if not loop.last else '' }}{% endfor %}",
    "{% set ns = namespace(n=0, t='') %}{% for m in messages[1:] %}{% set ns.n = ns.n + loop.index %}"
    "{% set ns.t = ns.t ~ m.role[0] + '%s-%03d' % (m.role, ns.n) %}{% endfor %}{{ ns.n }}{{ ns.t }}",
    "{% macro show(m, up=false) %}{{ m.content|upper if up else m.content }}{% endmacro %}"
    "{% for m in messages if m.role != 'system' %}{{ show(m, loop.first) }}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join(' | ') }}{{ messages|length }}"
    "{{ messages|rejectattr('role', 'in', ['user'])|list|last }}{{ messages|map('items')|map('list')|list|count }}",
    "{{ 'a,b , c'.split(',')|map('trim')|list }}{{ 'x'.join(['a', 'b']) }}{{ 'abc'.replace('b', 'xx')|center(20) }}",
    "{{ '{0:>5}|{a}|{0!r}'.format('x', a=1.5) }}{{ 'a'|format }}{{ '%s %s'|format('x', 2) }}{{ 2 ** 10 * 3 % 7 }}",
    "{{ 'a\nb'|indent(4, true) }}{{ 'the quick brown fox'|wordwrap(7) }}{{ [3, 1, 2]|sort|batch(2, 0)|list }}",
    "{% for k, v in messages[0].items() %}{{ loop.index0 }}{{ k }}={{ v }}{% if loop.changed(k) %}!{% endif %}"
    "{% endfor %}",
    "{% for c in [1, [2, [3]]] recursive %}{% if c is iterable %}({{ loop(c) }}){% else %}{{ c }}{% endif %}"
    "{% endfor %}",
    "{% macro outer() %}{{ caller(1) }}{{ caller(2) }}{% endmacro %}{% call(x) outer() %}<{{ x }}>{% endcall %}",
    "{{ range(3)|sum }}{{ [1.25, 2]|sum|round(1) }}{{ [1, 2]|max }}{{ dict(a=1).get('b', 'none') }}"
    "{{ nothing|default(7) }}",
    "{{ messages[::-1][0].content }}{{ messages[-1] == messages[3] }}{{ 'b' in messages[3].content }}{{ 5 is odd }}",
    "{% filter upper %}text {{ 1 }}{% endfilter %}{{ 'x' is string and 'X' is upper }}{{ none is none }}",
    "{% for m in messages %}{% set ns = namespace(parts=[]) %}{% for part in m.content.split(' ') %}"
    "{% set ns.parts = ns.parts + [part.upper()] %}{% endfor %}{{ ns.parts|join('-') }}{{ range(2)|list }}{% endfor %}",
    "{% for m in messages %}{% set long = 'x' * 1000000 %}" + "{{ m.role.upper() }}" * 20 + "{% endfor %}",
    "{% set text %}{{ bos_token }}{% endset %}{{ text * 3 }}{{ [text] * 2 }}{{ ('a' 'b') ~ 1 ~ none ~ 1.5 }}",
]


@pytest.mark.parametrize("source", GREEDY)
def test_a_template_that_asks_for_too_much(source: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        ChatTemplate(source).render(VARIABLES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB
    assert caught.value.fact == "The model's chat template does not accept these messages."
    assert caught.value.note
    assert caught.value.hint


def test_a_text_that_is_no_template() -> None:
    """Whatever the messages are, so they are not what is to be looked at."""
    with pytest.raises(InputError, match="is no template that can be read") as refused:
        ChatTemplate("{% for message in")
    assert "messages' roles" not in refused.value.hint


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_fails(name: str) -> None:
    with pytest.raises(InputError, match=r"\AThe model's chat template [^\n]+\nNote: [^\n]+\nHint: [^\n]+\Z"):
        ChatTemplate(BROKEN[name]).render(VARIABLES)


@pytest.mark.parametrize("source", ORDINARY)
def test_an_ordinary_template(source: str) -> None:
    """Against Jinja's own environment, with the options of transformers."""
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    wanted = plain.from_string(source).render(VARIABLES)
    assert ChatTemplate(source).render(VARIABLES) == wanted
    assert wanted


def test_json_as_transformers_has_it() -> None:
    made = ChatTemplate("{{ messages|tojson }}{{ messages|tojson(indent=4) }}").render(VARIABLES)
    assert made == json.dumps(CHAT, ensure_ascii=False) + json.dumps(CHAT, ensure_ascii=False, indent=4)


def test_a_long_chat() -> None:
    """The longer it is, the more it may spend: a megabyte of text, and thousands of messages."""
    source = "{% for m in messages %}{% set t = m.content|trim ~ m.role %}{{ t if t != m.role }}{% endfor %}"
    for messages in (1, 5000):
        chat = [{"role": "user", "content": "x" * (1_000_000 // messages)}] * messages
        assert ChatTemplate(source).render({"messages": chat}) == (chat[0]["content"] + "user") * messages
