"""Encoding, chat templates and decoding against transformers, and text streams against whole-text decoding.

Two small tokenizers are trained here: byte-level BPE (GPT-2, Llama 3, Qwen), whose tokens can end inside a
character, and Metaspace with byte fallback (Llama 2, Mistral), which strips a text's first space.
"""

from __future__ import annotations

import json
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime.errors import BundleError, InputError
from lora_drop_runtime.text import TextCodec, TextStream
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Hello world, the quick brown fox jumps over the lazy dog. " * 3,
    "Ça m'a coûté très cher, naïve façade; über größer, señor, smörgåsbord.",
    "你好世界、今天天气很好。日本語のテキスト、カタカナ。한국어",
    "Smile 😀😀 and 🎉, family 👨‍👩‍👧‍👦, flag 🇩🇪, skin 👍🏽.",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "   leading, double  and trailing spaces  ",
    "\n\n  indented\n\ttab\r\n",
    "unseen: 🦄🧬 ж ქართული ∀x∈Ω",
    "combining: e\u0301 a\u0308\u0323 नमस्ते",
    "a control token <|end|> in a text, and </s> too",
]
CHAT = [
    {"role": "user", "content": "Hi 😀 <b>\"quoted\" & 'é'</b>"},
    {"role": "assistant", "content": "  Salut!\n"},
    {"role": "user", "content": "你好"},
]
SYSTEM_CHAT = [{"role": "system", "content": "Be brief."}, *CHAT]

CHATML = """{% for message in messages %}
    {% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n'}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
STRICT = """{{ bos_token }}{% for message in messages %}
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant') }}
{% endif %}
{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]
{%- else %} {{ message.content + eos_token }}{% endif %}
{% endfor %}"""
TEMPLATES = {
    "chatml": CHATML,
    "strict": STRICT,
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ tools | tojson }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}"
    "{{ m.content }}{% break %}{% endfor %}",
    "generation": "{% set who = 'nobody' %}{% for m in messages %}{% generation %}{% set who = m.role %}"
    "{{ who }}: {{ m.content }}\n{% endgeneration %}\n{{ who }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = loop.index %}{% endfor %}"
    "{{ ns.n }}{{ documents is none }}",
    "unset variables": "{{ pad_token }}|{{ nothing }}|{{ unk_token }}|{{ messages[0].absent is defined }}",
    "date": "{{ strftime_now('%Y') }}",
}


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|start|>", "<|end|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<unk>", "<|start|>", "<|end|>", "</s>", *byte_tokens],
        limit_alphabet=60,
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"▁{word}" for text in CORPUS for word in text.split()), trainer)
    # Byte tokens are ordinary ones: only the vocabulary knows them.
    layout = json.loads(tokenizer.to_str())
    layout["added_tokens"] = [token for token in layout["added_tokens"] if token["id"] < 4]
    tokenizer = Tokenizer.from_str(json.dumps(layout))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level_tokenizer, metaspace_tokenizer])
def reference(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=request.param(), bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>"
    )


@pytest.fixture
def codec(reference: PreTrainedTokenizerFast, tmp_path: Path) -> TextCodec:
    reference.save_pretrained(tmp_path)
    return TextCodec.open(str(tmp_path))


def byte_level_codec() -> TextCodec:
    return TextCodec(byte_level_tokenizer(), {}, None)


def streamed(codec: TextCodec, ids: list[int]) -> list[str]:
    stream = codec.stream()
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_are_transformers(codec: TextCodec, reference: PreTrainedTokenizerFast, text: str) -> None:
    ids = codec.encode(text)
    assert ids.dtype == np.int64
    assert ids.tolist() == reference.encode(text)
    assert codec.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert codec.decode(ids.tolist(), skip_special_tokens=False) == reference.decode(ids)


@pytest.mark.parametrize(
    "ids", [[np.array([1, 2])], [[1], [2, 3]], [1.5], [True], [-1], [2**32], [2**70], 5, None, "abc", {1: 2}], ids=str
)
def test_what_is_no_text_is_not_decoded(codec: TextCodec, ids: object) -> None:
    """Such as all rows of `generate`, where one is meant."""
    with pytest.raises(InputError, match=r"(?s)list of tokens has the wrong type.*one text.*decode\(rows\[0\]\)"):
        codec.decode(ids)  # type: ignore[arg-type]


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer.encode(TEXTS[0]).ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=512)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert TextCodec.open(tmp_path).encode(TEXTS[0]).tolist() == ids


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("in_config", [False, True], ids=["file", "config"])
def test_chat_is_transformers(
    reference: PreTrainedTokenizerFast, tmp_path: Path, template: str, in_config: bool
) -> None:
    reference.chat_template = template
    reference.save_pretrained(tmp_path, save_jinja_files=not in_config)
    assert (tmp_path / "chat_template.jinja").exists() != in_config
    codec = TextCodec.open(tmp_path)
    for messages in (CHAT, SYSTEM_CHAT):
        if template is STRICT and messages is SYSTEM_CHAT:
            continue
        for prompt in (False, True):
            expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert codec.render_chat(messages, add_generation_prompt=prompt) == expected
        ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert codec.encode_chat(messages).dtype == np.int64
        assert codec.encode_chat(messages).tolist() == ids


def test_chat_with_tools_is_transformers(reference: PreTrainedTokenizerFast) -> None:
    template = (
        "{% for tool in tools or [] %}{{ tool | tojson }}{{ tool.function.name }}\n{% endfor %}"
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
        "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}"
        "{% endfor %}{% endfor %}"
    )
    parameters = {"type": "object", "properties": {"city": {"type": "string", "description": "é <b>"}}}
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("weather", "now")]
    call = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": {"city": "Rom"}}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    codec = TextCodec(reference.backend_tokenizer, {}, template)
    for given in (tools, tools[:1], None):
        expected = reference.apply_chat_template(messages, tools=given, chat_template=template, tokenize=False)
        assert codec.render_chat(messages, tools=given) == expected
    assert codec.render_chat(messages, tools=[]) == codec.render_chat(messages)
    template = template.replace("tools or []", "tools")  # as Hermes' and FunctionGemma's, which fail without tools
    codec = TextCodec(reference.backend_tokenizer, {}, template)
    expected = reference.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False)
    assert codec.render_chat(messages, tools=tools) == expected
    ids = codec.encode_chat(messages, tools=tools).tolist()
    assert codec.decode(ids) == codec.render_chat(messages, tools=tools)
    with pytest.raises(InputError, match="says nothing of tools"):
        TextCodec(reference.backend_tokenizer, {}, "{{ messages }}").render_chat(messages, tools=tools)
    for wrong in ("weather", [3], {"name": "weather"}):
        with pytest.raises(InputError, match="list of tools has the wrong type"):
            codec.render_chat(messages, tools=wrong)


THINKING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}"
    "</think>{% endif %}{{ m.thinking }}|{{ m.reasoning }}{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{{ bos_token }}"
)


IN_PARTS = (  # as SmolVLM's, and those of LLaVA, which print one
    "{% for m in messages %}{{ m.role }}: {% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}<end>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    "{% for m in messages %}{{ bos_token + m.role }}: "
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text + ' ' }}{% endfor %}{% endfor %}",
)


@pytest.mark.parametrize("template", IN_PARTS)
def test_a_template_that_wants_parts_is_given_them(reference: PreTrainedTokenizerFast, template: str) -> None:
    """A text as such would be left out without a word."""
    codec = TextCodec(reference.backend_tokenizer, {"bos_token": "<|start|>"}, template)
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in SYSTEM_CHAT]
    expected = reference.apply_chat_template(parts, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert CHAT[0]["content"] in expected
    assert codec.render_chat(SYSTEM_CHAT) == codec.render_chat(parts) == expected
    going_on = codec.render_chat(SYSTEM_CHAT[:3], add_generation_prompt=False, continue_final_message=True)
    assert going_on.endswith(f"assistant: {CHAT[1]['content']}")


@pytest.mark.parametrize("given", [None, {}, {"enable_thinking": False}, {"enable_thinking": True, "bos_token": "B"}])
def test_variables_of_a_template_are_transformers(
    reference: PreTrainedTokenizerFast, given: dict[str, Any] | None
) -> None:
    codec = TextCodec(reference.backend_tokenizer, {"bos_token": "<|start|>"}, THINKING)
    expected = reference.apply_chat_template(CHAT, chat_template=THINKING, tokenize=False, **(given or {}))
    assert codec.render_chat(CHAT, False, variables=given) == expected
    assert codec.decode(codec.encode_chat(CHAT, variables=given), False) == codec.render_chat(CHAT, variables=given)


def test_variables_that_a_rendering_has_itself_are_refused() -> None:
    codec = TextCodec(byte_level_tokenizer(), {}, THINKING)
    for wrong, words in (
        ({"messages": []}, "has a value already"),
        ({"add_generation_prompt": True}, "has a value already"),
        ([1], "wrong type"),
        ({3: 4}, "wrong type"),
    ):
        with pytest.raises(InputError, match=words):
            codec.render_chat(CHAT, variables=wrong)


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_the_names_that_transformers_gives_it(reference: PreTrainedTokenizerFast, name: str) -> None:
    messages = [*CHAT, {"role": "assistant", "content": "c", name: "R"}, {"role": "user", "content": "d", name: None}]
    expected = reference.apply_chat_template(messages, chat_template=THINKING, tokenize=False)
    assert TextCodec(reference.backend_tokenizer, {"bos_token": "<|start|>"}, THINKING).render_chat(
        messages, False
    ) == (expected)
    assert "<think>R</think>R|" in expected


@pytest.mark.parametrize("content", ["The answer is", "The answer is ", " x\n"])
@pytest.mark.parametrize("trims", [False, True])
def test_a_message_that_goes_on_is_transformers(reference: PreTrainedTokenizerFast, content: str, trims: bool) -> None:
    """As lm-eval asks for it where a task begins the answer."""
    shown = "m.content | trim" if trims else "m.content"
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ " + shown + " }}<|im_end|>\n{% endfor %}"
    messages = [*CHAT, {"role": "assistant", "content": content}]
    expected = reference.apply_chat_template(
        messages, chat_template=template, tokenize=False, continue_final_message=True
    )
    codec = TextCodec(reference.backend_tokenizer, {}, template)
    assert codec.render_chat(messages, False, continue_final_message=True) == expected
    assert expected.endswith(content.strip() if trims else content)
    for wrong, words in (
        ([{"role": "assistant", "content": None}], "cannot be continued"),
        ([], "The chat is empty"),
        ("abc", "The chat has the wrong type"),
        ([*CHAT, 5], "The chat has the wrong type"),
        ({"a": 1}, "The chat has the wrong type"),
        (None, "The chat has the wrong type"),
    ):
        with pytest.raises(InputError, match=words):
            codec.render_chat(wrong, False, continue_final_message=True)
    with pytest.raises(InputError, match="cannot be continued"):
        TextCodec(reference.backend_tokenizer, {}, "{{ messages[0].content }}").render_chat(
            messages, False, continue_final_message=True
        )


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("names", [("default", "tool_use"), ("tool_use",)])
def test_a_template_of_its_own_for_tools_is_transformers(
    reference: PreTrainedTokenizerFast, names: tuple[str, ...], in_config: bool, tmp_path: Path
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    reference.chat_template = {name: name + "{{ messages | length }}" for name in names}
    reference.save_pretrained(tmp_path, save_jinja_files=not in_config)
    codec = TextCodec.open(tmp_path)
    assert codec.render_chat(CHAT, tools=tools) == reference.apply_chat_template(CHAT, tools=tools, tokenize=False)
    if "default" in names:
        assert codec.render_chat(CHAT) == reference.apply_chat_template(CHAT, tokenize=False)
    else:
        with pytest.raises(InputError, match="no chat template"):
            codec.render_chat(CHAT)
    reference.chat_template = None


@pytest.mark.parametrize("template", ["", "{% for tool in tools or [] %}{{ tool }}{% endfor %}"])
def test_a_template_that_writes_nothing_is_refused(template: str) -> None:
    codec = TextCodec(byte_level_tokenizer(), {}, template)
    assert codec.render_chat(CHAT) == ""  # as transformers does
    with pytest.raises(InputError, match="chat template writes nothing") as caught:
        codec.encode_chat(CHAT)
    assert caught.value.note == "Its text is '', which has no tokens."


def test_bytes_of_tokens_join_to_the_text(codec: TextCodec) -> None:
    """Spaces in front of tokens too, which a token alone may lose; but for one that the whole text loses as well."""
    for text in TEXTS:
        ids = codec.encode(text).tolist()
        held = b"".join(codec.token_bytes(one) for one in ids).decode()
        whole = codec.decode(ids, skip_special_tokens=False)
        assert held.removeprefix("<|start|>").lstrip(" ") == whole.removeprefix("<|start|>").lstrip(" ")


def test_message_fields_that_are_none_count_as_absent(reference: PreTrainedTokenizerFast) -> None:
    template = "{{ 'thought' in messages[0] }}{{ messages[0].name }}"
    messages = [{"role": "user", "content": "Hi", "name": None, "thought": None}]
    expected = reference.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert TextCodec(reference.backend_tokenizer, {}, template).render_chat(messages) == expected == "False"


def test_named_templates_and_tokens_with_attributes(tmp_path: Path) -> None:
    """The older layout of tokenizer_config.json."""
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "bos_token": {"content": "<|start|>", "lstrip": False, "special": True},
        "eos_token": None,
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "{{ bos_token }}{{ eos_token }}{{ add_bos_token }}"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert TextCodec.open(tmp_path).render_chat(CHAT) == "<|start|>"


def test_date_is_now() -> None:
    template = "{{ strftime_now('%d %b %Y') }}"
    before = datetime.now()
    rendered = TextCodec(byte_level_tokenizer(), {}, template).render_chat(CHAT)
    assert rendered in {before.strftime("%d %b %Y"), datetime.now().strftime("%d %b %Y")}


@pytest.mark.parametrize(
    ("template", "messages", "note"),
    [
        (None, CHAT, "chat_template.jinja"),
        (STRICT, SYSTEM_CHAT, "Roles must alternate user/assistant"),
        (STRICT, [*CHAT[:1], {"role": "assistant"}], "content"),
        (STRICT, [*CHAT[:1], {"role": "assistant", "content": 7}], "int"),
        (CHATML, [], "at least one message"),
        ("{% for %}", CHAT, "Expected"),
        ("{{ ''.__class__.__mro__ }}", CHAT, "unsafe"),
        ("{{ messages.append(1) }}", CHAT, "unsafe"),
    ],
)
def test_chats_that_cannot_be_rendered(template: str | None, messages: list[dict], note: str) -> None:
    codec = TextCodec(byte_level_tokenizer(), {}, template)
    with pytest.raises(InputError, match=f"(?s){note}.*") as caught:
        codec.encode_chat(messages)
    assert caught.value.hint


def test_bundles_without_a_readable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"(?s)tokenizer\.json.*Hint: Export again"):
        TextCodec.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        TextCodec.open(tmp_path)
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(BundleError, match=r"tokenizer_config\.json"):
        TextCodec.open(tmp_path)


def test_a_tokenizer_that_panics(tmp_path: Path) -> None:
    """The library's error is then no Exception, which would end a command with a traceback."""
    endless = {"pattern": {"Regex": "(a+)+$"}}  # the library gives up on texts that end otherwise
    text = 50 * "a" + "!"
    layout = json.loads(Tokenizer(models.WordLevel({text: 0}, unk_token=text)).to_str())

    def opened(**changes: object) -> TextCodec:
        (tmp_path / "tokenizer.json").write_text(json.dumps(layout | changes), encoding="utf-8")
        return TextCodec.open(tmp_path)

    with pytest.raises(BundleError, match="The tokenizer cannot be read"):
        opened(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    with pytest.raises(InputError, match="The tokenizer cannot take the text"):
        opened(pre_tokenizer={"type": "Split", **endless, "behavior": "Isolated", "invert": False}).encode(text)
    with pytest.raises(BundleError, match="The tokenizer cannot write tokens as text"):
        opened(decoder={"type": "Replace", **endless, "content": ""}).decode([0])


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_join_to_the_decoded_text(codec: TextCodec, text: str) -> None:
    ids = codec.encode(text).tolist()
    pieces = streamed(codec, ids)
    assert "".join(pieces) == codec.decode(ids)
    assert "\ufffd" not in "".join(pieces)
    # Nothing is late: all that can be known after each token has been returned by then.
    for n in range(len(ids)):
        assert len("".join(pieces[:n])) >= len(codec.decode(ids[:n]).rstrip("\ufffd"))


def test_any_ids_stream(codec: TextCodec, reference: PreTrainedTokenizerFast) -> None:
    """A model may generate anything: special tokens, half characters, bytes that are not UTF-8."""
    # With byte fallback, decode() spoils a whole character beside a stray byte; the stream has returned it by
    # then. So the only bytes here are continuation bytes, which are always stray.
    spoiling = {f"<0x{byte:02X}>" for byte in range(256) if not 0x80 <= byte < 0xC0}
    allowed = [token_id for token, token_id in reference.get_vocab().items() if token not in spoiling]
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.choice(allowed, 40).tolist()
        assert "".join(streamed(codec, ids)) == codec.decode(ids).rstrip("\ufffd")


def test_a_stray_byte_beside_a_whole_character() -> None:
    """`DecodeStream` raises here. decode() gives four U+FFFD, but the character has been returned by then."""
    tokenizer = metaspace_tokenizer()
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in [*"你".encode(), 0xFF]]
    ids += [tokenizer.token_to_id(token) for token in "ok"]
    codec = TextCodec(tokenizer, {}, None)
    assert streamed(codec, ids) == ["", "", "你", "", "\ufffd\ufffd\ufffdo", "k", ""]


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_stray_bytes_are_not_decoded_again_and_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of a server may force thousands of them, and each of its tokens would wait for all before."""
    level = kind == "byte level"
    tokenizer = byte_level_tokenizer() if level else metaspace_tokenizer()
    codec = TextCodec(tokenizer, {}, None)
    names = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    euro = [*names("€")[0][0]] if level else [f"<0x{byte:02X}>" for byte in "€".encode()]
    stray = tokenizer.token_to_id(euro[1])
    decoded: list[int] = []
    decode = codec.decode
    monkeypatch.setattr(codec, "decode", lambda ids, **kept: decoded.append(len(ids)) or decode(ids, **kept))
    stream, count = codec.stream(), 4000
    assert {stream.push(stray) for _ in range(count)} == {""}
    assert sum(decoded) < 20 * count
    assert stream.push(tokenizer.token_to_id("o")) == count * "\ufffd" + "o"  # text is not late
    whole = [tokenizer.token_to_id(token) for token in euro]
    pieces = [stream.push(token) for token in [*[stray] * 100, *whole]]
    expected = decode([stray] * 100 + whole)
    assert "".join([*pieces, stream.finish()]) == expected.rstrip("\ufffd")
    assert expected.endswith("€") == level
    assert stream.finish() == ""


def test_an_emoji_over_several_tokens_comes_in_one_piece() -> None:
    codec = byte_level_codec()
    ids = codec.encode("🦄").tolist()
    assert len(ids) == 3
    assert streamed(codec, ids) == ["", "", "🦄", ""]


def test_finish_drops_an_incomplete_character_and_keeps_the_text_before_it() -> None:
    codec = byte_level_codec()
    ids = codec.encode("ok 🦄").tolist()[:-1]
    assert "".join(streamed(codec, ids)) == "ok "
    stream = codec.stream(stop=["k !"])
    assert "".join(map(stream.push, ids)) == "o"
    assert stream.finish() == "k "


def test_special_tokens_are_skipped_and_spaces_around_them_kept(
    codec: TextCodec, reference: PreTrainedTokenizerFast
) -> None:
    end = reference.eos_token_id
    ids = codec.encode("Hello").tolist()
    more = codec.encode("Hello world").tolist()[len(ids) :]
    assert "".join(streamed(codec, [end, *ids, end, end, *more, end])) == "Hello world"


def test_special_tokens_in_a_row_are_not_decoded_again_and_again(
    codec: TextCodec, reference: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model writes them behind an end token that it is to ignore."""
    plain, read = codec.decode, list[int]()
    monkeypatch.setattr(codec, "decode", lambda ids, **how: read.append(len(ids)) or plain(ids, **how))
    ids = codec.encode("Hello").tolist()
    assert "".join(streamed(codec, [*ids, *[reference.eos_token_id] * 500, *ids])).startswith("Hello")
    assert sum(read) < 100


def stop_at(text: str, stop: list[str]) -> tuple[str, bool]:
    """The definition: read character by character until one stop string is complete."""
    for n in range(len(text) + 1):
        ended = [len(s) for s in stop if text[:n].endswith(s)]
        if ended:
            return text[: n - max(ended)], True
    return text, False


@pytest.mark.parametrize(
    "stop",
    [
        ["wor"],
        ["lo w"],
        ["the lazy cat"],
        ["zzz", "dog."],
        ["quick brown", "ick"],
        ["fox jumps", "x jumps over"],
        ["oo", "o"],
        ["Hello"],
        ["dog. Hello world, the quick brown fox jumps over the lazy dog. Hello wo!"],
    ],
)
def test_stop_strings_over_token_boundaries(codec: TextCodec, stop: list[str]) -> None:
    expected, stops = stop_at(TEXTS[0], stop)
    stream = codec.stream(stop)
    pieces = [stream.push(token_id) for token_id in codec.encode(TEXTS[0]).tolist()]
    assert stream.stopped == stops
    assert "".join([*pieces, stream.finish()]) == expected


class PartsCodec:
    """Token n is the n-th part."""

    def __init__(self, parts: list[str]) -> None:
        self.parts = parts

    def skips(self, token_id: int, kept: tuple[str, ...]) -> bool:
        return False

    def decode(self, ids: list[int], kept: tuple[str, ...]) -> str:
        assert not kept
        return "".join(self.parts[n] for n in ids)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abcabdabcabcabdx--ab", ["cabdx", "x-", "zz"], "abcabdabcab"),
        ("one two three four", ["four", "three", "two"], "one "),
        ("xabcdef", ["abcd", "bc"], "xa"),  # the one completed first, though it begins later
        ("xabcdef", ["c", "abc"], "x"),  # completed together: the longer one
        ("no stop, only ab", ["abc"], "no stop, only ab"),
    ],
)
def test_a_stop_string_does_not_depend_on_the_tokens(text: str, stop: list[str], expected: str) -> None:
    """The same text in pieces cut at random places."""
    assert stop_at(text, stop)[0] == expected
    rng = np.random.default_rng(1)
    for _ in range(100):
        cuts = [0, *sorted(rng.integers(0, len(text), rng.integers(0, 6)).tolist()), len(text)]
        parts = [text[start:end] for start, end in pairwise(cuts)]
        stream = TextStream(PartsCodec(parts), stop)
        pieces = [stream.push(n) for n in range(len(parts))]
        assert "".join([*pieces, stream.finish()]) == expected


def test_only_a_possible_beginning_is_held_back() -> None:
    stream = TextStream(PartsCodec(["a\n", "\nUser", " b\n", "\nUser", ":", " c"]), ["\n\nUser:"])
    assert [stream.push(n) for n in range(6)] == ["a", "", "\n\nUser b", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""


def test_finish_gives_the_beginning_of_a_stop_string_once() -> None:
    stream = TextStream(PartsCodec(["a\n", "\nUser"]), ["\n\nUser:"])
    assert [stream.push(0), stream.push(1), stream.finish(), stream.finish()] == ["a", "", "\n\nUser", ""]
    assert not stream.stopped


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        byte_level_codec().stream(stop=["x", ""])
