"""JSON schemas, regular expressions and grammars: what comes out is valid, and what cannot be followed is refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from lora_drop_runtime import Batch, SamplingOptions, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.constraint import Constraint
from lora_drop_runtime.errors import InputError, LoraDropError
from lora_drop_runtime.grammars import trial
from lora_drop_runtime.grammars.grammar import MOST_CHARACTERS, Grammars, checked_schema
from lora_drop_runtime.text import TextCodec
from lora_drop_tools.cli import main
from tokenizers import Tokenizer

from tests.support.bundles import family, make_bundle, oracle_plan
from tests.support.covering import covering_array
from tests.support.decoding import assert_refused, kept_session
from tests.support.oracle import is_refresh, prefill
from tests.support.tokenizers import END, byte_tokenizer, character_tokenizer

NEW = 160  # tokens, more than the longest text of SCHEMA has
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "n": {"type": "integer", "minimum": -5, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", 'a"b']}, "maxItems": 2},
        "true": {"type": ["boolean", "null"]},
    },
    "required": ["n", "tags"],
    "additionalProperties": False,
}


def texts(bundle: Bundle, constraint: Constraint, k: int, policy: str, count: int = 3, **options: Any) -> list[str]:
    codec = TextCodec.open(bundle.root / "tokenizer")
    prompts = [codec.encode(prompt) for prompt in ("A name: ", "{", 'x = {"n')][:count]
    rows = kept_session(bundle.root, policy).generate(prompts, NEW, k=k, constraint=constraint, **options)
    return [codec.decode(row) for row in rows]


COVERING = covering_array(
    {"bundle": ("characters", "merges"), "k": (0, 1, 3), "policy": ("skip", "backfill", "lossless")}, seed=0
)


@pytest.mark.parametrize(
    ("bundle", "k", "policy"), [(one["bundle"], one["k"], one["policy"]) for one in COVERING], indirect=["bundle"]
)
def test_json_is_valid_under_its_schema(bundle: Bundle, k: int, policy: str) -> None:
    constraint = Grammars.of(bundle).json_schema(SCHEMA)
    found = set[str]()
    for seed in range(5):
        sampling = SamplingOptions((0.0, 0.7, 1.0, 2.0, 50.0)[seed], seed=seed)
        for text in texts(bundle, constraint, k, policy, sampling=sampling):
            jsonschema.validate(json.loads(text), SCHEMA)
            found.add(text)
    assert len(found) > 5


@pytest.mark.parametrize("draft", ["lora", "ngram", "both"])
def test_lossless_writes_the_json_of_the_full_schedule(bundle: Bundle, draft: str) -> None:
    constraint = Grammars.of(bundle).json_schema(SCHEMA)
    assert texts(bundle, constraint, 3, "lossless", draft=draft) == texts(bundle, constraint, 0, "skip")


PATTERNS = {  # each with texts of which one completes whatever begins a match
    "(ab|cd|e){3,9}f": {"", *(half + "e" * n + "f" for half in ("", "b", "d") for n in range(4))},
    "[0-9]{2}-[0-9]{2}": {"", "0", "00", "-00", "0-00"},
    '(true|name": |x)+': {word[i:] for word in ("true", 'name": ') for i in range(len(word) + 1)},
}


@pytest.mark.parametrize(("pattern", "k"), [*zip(PATTERNS, (0, 2, 2), strict=True)])
def test_greedy_takes_the_largest_logit_after_which_the_pattern_can_match(bundle: Bundle, pattern: str, k: int) -> None:
    """The reference tries every token, with Python's own `re` and the logits of PyTorch."""
    codec = TextCodec.open(bundle.root / "tokenizer")
    (end,) = bundle.manifest.special_tokens.eos
    words = {i: codec.decode([i]) for i in range(end)}

    def can_match(text: str) -> bool:
        return any(re.fullmatch(pattern, text + rest) for rest in PATTERNS[pattern])

    prompt = codec.encode("A name: ")
    row, logits = prefill(family("llama").model, oracle_plan(bundle), prompt.tolist())
    text, tokens = "", list[int]()
    with row.installed():
        while len(tokens) < 12:
            allowed = [i for i, word in words.items() if can_match(text + word)]
            if re.fullmatch(pattern, text):
                if not allowed:
                    break
                allowed.append(end)
            token = allowed[int(logits[allowed].argmax())]
            if token == end:
                break
            tokens.append(token)
            text += words[token]
            logits = row.step(token, full=is_refresh(len(tokens), k))
    with Session.open(bundle.root, k=k, policy="skip", threads=1) as session:
        ours = session.generate([prompt], 12, constraint=Grammars.of(bundle).regex(pattern))[0]
    assert ours.tolist() == tokens


@pytest.mark.parametrize("make", ["json_schema", "property", "regex", "lark"])
def test_the_text_of_a_special_token_is_written_out(bundle: Bundle, make: str) -> None:
    """Where it is demanded, by ordinary tokens; the token itself would end the text."""
    grammars = Grammars.of(bundle)
    constraint, wanted = {
        "json_schema": lambda: (grammars.json_schema({"const": f"a{END}{END}b"}), f'"a{END}{END}b"'),
        "property": lambda: (
            grammars.json_schema(
                {"properties": {END: {"const": 1}}, "required": [END], "additionalProperties": False, "type": "object"}
            ),
            f'{{"{END}": 1}}',
        ),
        "regex": lambda: (grammars.regex("<" + END[1:]), END),
        "lark": lambda: (grammars.lark(f'start: "{END[:2]}" "{END[2:]}"'), END),
    }[make]()
    with Session.open(bundle.root, k=2, policy="skip", threads=1) as session:
        ids = session.generate([[1, 2]], 40, constraint=constraint)[0]
    assert TextCodec.open(bundle.root / "tokenizer").decode(ids) == wanted


def test_any_object_and_a_grammar(bundle: Bundle) -> None:
    grammars = Grammars.of(bundle)
    lark = grammars.lark('start: word ("-" word){2}\nword: /[a-c]/ | "true"')
    for seed in range(6):
        sampling = SamplingOptions(1.0, seed=seed)
        for text in texts(bundle, lark, 3, "skip", sampling=sampling):
            assert re.fullmatch("([a-c]|true)(-([a-c]|true)){2}", text)
        for text in texts(bundle, grammars.json_object(), 3, "skip", sampling=sampling):
            assert text.startswith("{")
            if len(text) < NEW / 2:
                assert isinstance(json.loads(text), dict)


def test_a_batch_of_different_schemas(bundle: Bundle) -> None:
    grammars, codec = Grammars.of(bundle), TextCodec.open(bundle.root / "tokenizer")
    schemas = [{"type": "integer"}, SCHEMA, {"enum": ["ab", "true"]}, {"const": {"name": [None]}}]
    with Batch.open(bundle.root, slots=3, k=3, policy="lossless", threads=1) as batch:
        rows = [
            batch.add(codec.encode("A"), NEW, k=n, constraint=grammars.json_schema(schema))
            for n, schema in enumerate(schemas)
        ]
        tokens: dict[int, list[int]] = {row: [] for row in rows}
        ends: dict[int, str] = {}
        while batch.rows:
            for event in batch.tick():
                tokens[event.row] += [] if event.token is None else [event.token]
                ends[event.row] = event.finished or ""
    for row, schema in zip(rows, schemas, strict=True):
        if ends[row] == "stop":
            jsonschema.validate(json.loads(codec.decode(tokens[row])), schema)
    assert [ends[row] for row in rows[1:]] == ["stop"] * 3


def test_one_constraint_serves_many_requests_and_a_text_may_end_without_an_end_token(bundle: Bundle) -> None:
    constraint = Grammars.of(bundle).regex("abc")
    assert texts(bundle, constraint, 0, "skip") == texts(bundle, constraint, 0, "skip") == ["abc"] * 3
    for stops in ([], [3]):
        assert texts(bundle, constraint, 0, "skip", stop_token_ids=stops) == ["abc"] * 3


# ── what is refused ────────────────────────────────────────────────────────────────────────────────────────────


def nested(count: int) -> dict[str, Any]:
    chain = {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(count)}
    return {"$defs": {**chain, f"a{count}": {"type": "string"}}, "$ref": "#/$defs/a0"}


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    bundle = make_bundle("llama", tmp_path_factory.mktemp("refused") / "b", drop_ratio=0.5)
    byte_tokenizer(bundle.root)
    return Grammars.of(Bundle.open(bundle.root))


REFUSED: dict[str, tuple[Any, str, str]] = {
    "no JSON": ("{", "is not JSON", "line 1 column 2"),
    "no schema": ("[1]", "has the wrong type", "list"),
    "no number": ({"const": float("nan")}, "is not JSON", "JSON compliant"),
    "half a character": ('{"const": "\ud800"}', "cannot be read", "UTF-8"),
    "too large": ({"enum": ["x" * MOST_CHARACTERS]}, "cannot be read", str(MOST_CHARACTERS)),
    "no value": (False, "cannot be followed", "not"),
    "unknown keyword": ({"not": {"type": "null"}}, "cannot be followed", "not"),
    "elsewhere": ({"$ref": "http://example.com/a.json"}, "cannot be followed", "example.com"),
    "never ends": ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "cannot be followed", "no text"),
    "overflows the stack": (nested(3000), "cannot be followed", "nested too deep"),
    "takes much memory": ({"type": "integer", "multipleOf": 62615533}, "cannot be followed", "memory"),
}


def test_a_schema_that_is_too_large_is_not_looked_at_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 MiB of small parts take seconds of Python, beside which the rows of a server stand still again and again."""

    def never(_: Any) -> None:
        raise AssertionError("it was looked at")

    monkeypatch.setattr("lora_drop_runtime.grammars.grammar.followed", never)
    with pytest.raises(InputError, match=f"{MOST_CHARACTERS} are the most"):
        checked_schema({"anyOf": [{}] * MOST_CHARACTERS})


def test_what_the_first_compilation_refuses_is_not_compiled_here(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the schemas below, which end or keep busy a process that compiles them all the same."""
    monkeypatch.setattr("lora_drop_runtime.grammars.grammar.compile_apart", lambda _: "nothing can be said")
    monkeypatch.setattr("llguidance.LLMatcher", lambda *_, **__: pytest.fail("it is compiled here"))
    assert_refused(lambda: grammars.json_schema({"const": "refused"}), "cannot be followed", "nothing can be said")


@pytest.mark.parametrize(("schema", "fact", "note"), REFUSED.values(), ids=REFUSED.keys())
def test_schemas_that_cannot_be_followed_are_refused(grammars: Grammars, schema: Any, fact: str, note: str) -> None:
    assert_refused(lambda: grammars.json_schema(schema), fact, note)


def test_a_schema_that_takes_for_ever_is_refused(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor's time, where memory would allow it; here by a third of that."""
    limits = {str(trial.MEMORY): str(1 << 30), f"({trial.SECONDS}, {trial.SECONDS + 1})": "(1, 2)"}
    for limit, other in limits.items():
        monkeypatch.setattr(trial, "_PROGRAM", trial._PROGRAM.replace(limit, other))
    monkeypatch.setattr(trial, "SECONDS", 1)
    schema = {"type": "integer", "multipleOf": 62615537}
    assert_refused(lambda: grammars.json_schema(schema), "cannot be followed", f"{trial.SECONDS} seconds")


def test_signals_that_end_a_server_end_no_compilation(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come to all processes of systemd's unit."""
    come = "import os\nfor one in (1, 2, 15):\n    os.kill(os.getpid(), one)\nfrom llguidance"
    monkeypatch.setattr(trial, "_PROGRAM", trial._PROGRAM.replace("from llguidance", come, 1))
    grammars.json_schema({"const": "signals"})


def test_a_compilation_that_others_end_is_no_fault_of_the_schema(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system does where memory is short, or by a limit on processes or open files."""

    def refused(schema: Any) -> str:
        with pytest.raises(LoraDropError, match="cannot be compiled now") as caught:
            grammars.json_schema(schema)
        assert not isinstance(caught.value, InputError)
        return caught.value.note

    monkeypatch.setattr(trial, "_PROGRAM", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert "was killed" in refused({"const": "killed"})
    monkeypatch.setattr(trial.sys, "executable", "/nowhere/python")
    assert "cannot be started: [Errno 2]" in refused({"const": "not started"})


def test_limits_that_the_system_does_not_take_refuse_nothing(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As macOS takes none of memory; Windows has no such module."""
    come = "import resource\n    resource.setrlimit = lambda *_: int('is more than the maximum')"
    for name, other in (("macOS", come), ("Windows", "raise ImportError")):
        monkeypatch.setattr(trial, "_PROGRAM", trial._PROGRAM.replace("import resource", other))
        grammars.json_schema({"const": name})


def test_patterns_and_grammars_that_cannot_be_followed_are_refused(grammars: Grammars) -> None:
    for pattern in ("(a", "", "a{0}", "[^\\s\\S]", "é", "(" * 100_000 + "a" + ")" * 100_000):
        assert_refused(lambda pattern=pattern: grammars.regex(pattern), "cannot be followed")
    chain = "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1} "b" | "c"' for i in range(5000)) + '\nr5000: "d"'
    for grammar in ("", 'word: "a"', "start: <end>", "start: undefined", chain):
        assert_refused(lambda grammar=grammar: grammars.lark(grammar), "cannot be followed")
    assert_refused(lambda: grammars.regex(3), "has the wrong type")  # type: ignore[arg-type]


def test_a_grammar_that_becomes_too_complex_is_refused_then(grammars: Grammars) -> None:
    """llguidance counts what it has to remember."""
    constraint = grammars.regex("((a|b|c|d){1,1000}){1000}")

    def endless() -> None:
        for _ in range(1000):
            token = int(constraint.allowed().argmax())
            constraint.accept(token)

    assert_refused(endless, "cannot be followed", "too many expressions")


def test_bundles_that_cannot_have_constraints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle("llama", tmp_path / "b", drop_ratio=0.5)
    character_tokenizer(bundle.root)
    assert_refused(lambda: Grammars.of(Bundle.open(bundle.root)), "no end token")
    byte_tokenizer(bundle.root)
    opened = Bundle.open(bundle.root)
    codec = TextCodec.open(opened.root / "tokenizer")
    assert_refused(lambda: Grammars(codec, 50, [3]), "tokenizer cannot be used")
    character_tokenizer(bundle.root)
    fused = TextCodec.open(opened.root / "tokenizer")
    assert_refused(lambda: Grammars(fused, 131, [3]), "tokenizer cannot be used", "decoder")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert_refused(lambda: Grammars(codec, 131, [3]), "llguidance cannot be imported", "llguidance")


def test_decoders_beside_that_of_bytes_change_nothing(bundle: Bundle) -> None:
    """transformers 5.6 makes such a list of a GGUF file."""
    codec = TextCodec.open(bundle.root / "tokenizer")
    layout = json.loads(codec.tokenizer_json())
    beside = [
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    ]
    layout["decoder"] = {"type": "Sequence", "decoders": [*beside, layout["decoder"]]}
    listed = TextCodec(Tokenizer.from_str(json.dumps(layout)), {}, None)
    manifest = bundle.manifest
    constraint = Grammars(listed, manifest.model.vocab_size, manifest.special_tokens.eos).json_schema(SCHEMA)
    other = Grammars.of(bundle).json_schema(SCHEMA)
    for token in codec.encode('{"n": 1, "tags": ["red"]}'):
        assert np.array_equal(constraint.allowed(), other.allowed())
        constraint.accept(int(token))
        other.accept(int(token))


# ── the command ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_writes_json_and_what_a_pattern_matches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle("llama", tmp_path / "b", drop_ratio=0.5, max_seq_len=256)
    byte_tokenizer(bundle.root, merged=True)
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    generate = ["generate", str(bundle.root), "--prompt", "A name: ", "--max-new-tokens", str(NEW), "--threads", "1"]
    for schema in (str(file), json.dumps(SCHEMA)):
        assert main([*generate, "--json-schema", schema]) == 0
        jsonschema.validate(json.loads(capsys.readouterr().out), SCHEMA)
    assert main([*generate, "--prompt", "B", "--regex", "[ab]{3}", "--policy", "lossless"]) == 0
    assert re.fullmatch("── A name: \n[ab]{3}\n── B\n[ab]{3}\n", capsys.readouterr().out)
    for wrong, fact in (
        (["--json-schema", str(tmp_path / "none")], "schema cannot be read"),
        (["--json-schema", "{"], "is not JSON"),
        (["--regex", "("], "cannot be followed"),
        (["--json-schema", "{}", "--regex", "a"], "--regex would change nothing"),
    ):
        assert main([*generate, *wrong]) == 2
        printed = capsys.readouterr()
        assert fact in printed.err
        assert not printed.out


def test_a_mask_has_the_models_size(bundle: Bundle) -> None:
    """The model has more ids than its tokenizer; none of those may come."""
    mask = Grammars.of(bundle).regex("[^q]+").allowed()
    (end,) = bundle.manifest.special_tokens.eos
    assert mask.shape == (131,)
    assert mask.dtype == np.bool_
    assert not mask[end:].any()
