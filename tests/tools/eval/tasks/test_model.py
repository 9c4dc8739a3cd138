"""A bundle as a model of lm-eval: scores against PyTorch, texts, chat, arguments, and lm-eval's own command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lora_drop_runtime.decoding import drafter
from lora_drop_runtime.decoding.batch import Batch
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.text import TextCodec
from lora_drop_tools.cli import main
from lora_drop_tools.eval.store import Store
from lora_drop_tools.eval.texts import Writer

from tests.support.bundles import family, record_again

pytest.importorskip("lm_eval", reason="lm-eval, of the extra `eval`, is not installed")

from .support import define

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


# ── the model ──────────────────────────────────────────────────────────────────────────────────────────────────


def request(item: int, *arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments, task_name="t", doc={}, doc_id=item)


@pytest.fixture
def open_model(bundle: Path) -> Iterator[Callable[..., Any]]:
    from lora_drop_tools.eval.tasks.model import SessionLM

    codec = TextCodec.open(bundle / "tokenizer")
    with Session.open(bundle, threads=1) as session, Writer(bundle, codec, session.policy, threads=1) as writer:
        yield lambda k, **options: SessionLM(
            session, codec, writer, k, options.get("seed", 0), options.get("store") or Store(None, {})
        )


def by_torch(bundle: Path, context: str, continuation: str) -> tuple[float, bool]:
    codec = TextCodec.open(bundle / "tokenizer")
    ids = torch.tensor(codec.encode(context + continuation))
    with torch.no_grad():
        logits = family("llama").model(ids[None]).logits[0].double()
    log_probs = torch.log_softmax(logits[len(context) - 1 : -1], -1)
    targets = ids[len(context) :]
    greedy = bool((log_probs.argmax(-1) == targets).all())
    return float(log_probs.gather(1, targets[:, None]).sum()), greedy


def test_log_likelihoods_under_the_full_schedule_are_pytorchs(bundle: Path, open_model: Callable[..., Any]) -> None:
    pairs = [("The sea is", " wide"), ("The boat", " sank in the harbour"), ("a", "b"), ("Nets ", "and ropes")]
    found = open_model(0).loglikelihood([request(i, *pair) for i, pair in enumerate(pairs)])
    for (log_prob, greedy), (context, continuation) in zip(found, pairs, strict=True):
        # White space at the context's end belongs to the continuation
        moved = context.rstrip()
        expected = by_torch(bundle, moved, context[len(moved) :] + continuation)
        assert (log_prob, greedy) == (pytest.approx(expected[0], abs=1e-3), expected[1])


def test_rolling_log_likelihood_counts_each_token_once(bundle: Path, open_model: Callable[..., Any]) -> None:
    text = "Gulls follow the boats into the harbour."
    (found,) = open_model(0).loglikelihood_rolling([request(0, text)])
    # The text after the pad token, id 0, which stands for a missing BOS; in this vocabulary it is a space
    assert found == pytest.approx(by_torch(bundle, " ", text)[0], abs=1e-3)
    long = text * 8
    (in_windows,) = open_model(0).loglikelihood_rolling([request(0, long)])
    assert in_windows < found


def test_whole_texts_are_asked_together(open_model: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    asked = [request(i, text) for i, text in enumerate(["The sea.", "Gulls follow the boats " * 20, "", "Nets"])]
    together = open_model(1).loglikelihood_rolling(asked)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert together == pytest.approx([open_model(1).loglikelihood_rolling([one])[0] for one in asked], abs=1e-3)
    assert open_model(1).loglikelihood_rolling([asked[1]] * 2) == pytest.approx([together[1]] * 2)  # as of repeats


@pytest.fixture
def beside_lm_evals_own(bundle: Path, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """A model and lm-eval's own of the same PyTorch model, under a tokenizer whose texts do not begin with its BOS."""
    from lm_eval.models.huggingface import HFLM
    from lora_drop_tools.eval.tasks.model import SessionLM
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    characters = [*map(chr, range(32, 127)), "\n", "a ", "<eos>", "<bos>"]
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(characters)}, [("a", " ")]))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(tmp_path)
    codec = TextCodec.open(tmp_path)
    with Session.open(bundle, threads=1) as session, Writer(bundle, codec, session.policy, threads=1) as writer:
        own = HFLM(pretrained=family("llama").model, tokenizer=fast, backend="causal", max_length=255)
        yield SessionLM(session, codec, writer, 0, 0, Store(None, {})), own


def test_texts_without_a_context_begin_with_bos_as_in_lm_evals_own_model(beside_lm_evals_own: tuple[Any, Any]) -> None:
    ours, own = beside_lm_evals_own
    asked = [request(0, "", "Gulls follow"), request(1, "", " the boats.")]
    expected = own.loglikelihood(asked, disable_tqdm=True)
    assert [one[0] for one in ours.loglikelihood(asked)] == pytest.approx([one[0] for one in expected], abs=1e-3)
    texts = [request(2, "Gulls follow the boats into the harbour."), request(3, "ab" * 400)]
    expected = own.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, abs=1e-2)


def test_a_token_across_the_border_is_cut_as_by_lm_evals_own_model(beside_lm_evals_own: tuple[Any, Any]) -> None:
    """`a ` is one token, which the context alone does not end with."""
    ours, own = beside_lm_evals_own
    asked = [request(0, "The sea", " is wide"), request(1, "The sea ", "is"), request(2, "The boat", " sank")]
    expected = own.loglikelihood(asked, disable_tqdm=True)
    assert [one[0] for one in ours.loglikelihood(asked)] == pytest.approx([one[0] for one in expected], abs=1e-3)


def test_what_is_scored_depends_on_the_item_and_the_seed_alone(open_model: Callable[..., Any]) -> None:
    """Each of the k + 1 places in the cycle comes about; batches and other items change nothing."""
    pair = ("The boat sank i", "n")  # one token
    alone = [open_model(3).loglikelihood([request(item, *pair)])[0][0] for item in range(24)]
    together = [one[0] for one in open_model(3).loglikelihood([request(item, *pair) for item in range(24)])]
    assert together == pytest.approx(alone, abs=1e-4)
    assert len({round(value, 3) for value in alone}) == 4
    full = open_model(0).loglikelihood([request(0, *pair)])[0][0]
    assert sum(abs(value - full) < 1e-3 for value in alone) in range(1, 12)  # those whose first token is the prefill's
    other = [one[0] for one in open_model(3, seed=1).loglikelihood([request(item, *pair) for item in range(24)])]
    assert other != pytest.approx(alone, abs=1e-4)


def test_progress_names_all_tasks_that_are_asked_at_once(
    open_model: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [request(item, "The boat", " sank") for item in range(3)]
    asked[1].task_name = asked[2].task_name = "other"
    model = open_model(0)
    model.loglikelihood(asked)
    model.loglikelihood([request(4, "Nets ", "and ropes")])
    said = [line.partition(" in ")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["t and 1 more, k = 0: 3", "t, k = 0: 1"]


def test_long_contexts_lose_their_beginning(bundle: Path, open_model: Callable[..., Any]) -> None:
    context = "The tide is out and the nets are dry. " * 8  # 304 tokens, of which the last is moved
    model = open_model(0)
    ((found, _),) = model.loglikelihood([request(0, context, "Rope")])
    assert model.cut == 1
    kept = context.rstrip()[-(256 - len(" Rope")) :]
    assert found == pytest.approx(by_torch(bundle, kept, " Rope")[0], abs=1e-3)
    model.loglikelihood([request(1, "short", " one")])
    assert model.cut == 1
    with pytest.raises(InputError, match="continuation is longer"):
        model.loglikelihood([request(2, "a", "b" * 256)])


def test_generation(bundle: Path, open_model: Callable[..., Any]) -> None:
    codec = TextCodec.open(bundle / "tokenizer")
    model = open_model(3)
    options = {"until": ["\n\n"], "max_gen_toks": 9, "do_sample": False}
    found = model.generate_until([request(0, "The boat", options), request(1, "A", options)])
    with Session.open(bundle, threads=1) as session:
        rows = session.generate([codec.encode("The boat"), codec.encode("A")], 9, k=3)
    assert found == [codec.decode(row).split("\n\n")[0] for row in rows]
    model.generate_until([request(2, "x" * 250, options | {"max_gen_toks": 1024})])  # 128 of 256 are the answer's
    assert model.cut == 1


def test_texts_are_written_with_the_lenience_and_kept_apart(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_drop_tools.eval.tasks.model import SessionLM

    monkeypatch.setattr(drafter, "CONFIDENCE", 0.0)  # a random model has less
    codec, engine = TextCodec.open(bundle / "tokenizer"), {"threads": 1}
    asked = [request(0, "The boat the boat", {"until": [], "max_gen_toks": 20})]
    found = {}
    with Session.open(bundle, policy="lossless", threads=1) as session:
        for lenience in (None, 1e-6):
            with Writer(bundle, codec, "lossless", lenience=lenience, **engine) as writer:
                store = Store(tmp_path, {})
                (found[lenience],) = SessionLM(session, codec, writer, 3, 0, store).generate_until(asked)
            (row,) = session.generate(codec.encode("The boat the boat"), 20, k=3, lenience=lenience)
            assert found[lenience] == codec.decode(row)
    assert found[None] != found[1e-6]


def test_scores_are_kept_whatever_the_lenience_and_texts_by_it(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_drop_tools.eval.tasks.model import SessionLM

    codec, ticks = TextCodec.open(bundle / "tokenizer"), list[int]()
    question, text = request(0, "The boat", " sank"), request(0, "The boat", {"until": [], "max_gen_toks": 2})
    tick = Batch.tick
    monkeypatch.setattr(Batch, "tick", lambda batch: ticks.append(len(ticks)) or tick(batch))
    with Session.open(bundle, policy="lossless", threads=1) as session:
        for lenience, is_new in ((0.3, True), (0.3, False), (1.0, True), (None, False)):
            with Writer(bundle, codec, "lossless", lenience=lenience, threads=1) as writer:
                model, before = SessionLM(session, codec, writer, 3, 0, Store(tmp_path, {})), len(ticks)
                model.generate_until([text])
                assert (len(ticks) > before) == is_new, lenience
                model.loglikelihood([question])
                monkeypatch.setattr(Session, "prefill", lambda *_, **__: pytest.fail("it was measured again"))


def test_answers_are_kept(open_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = {"until": ["\n"], "max_gen_toks": 4}
    questions = [request(item, "The boat", " sank") for item in range(3)]
    texts = [request(3, "The boat", options)]
    first = open_model(1, store=Store(tmp_path, {}))
    answers = first.loglikelihood(questions), first.generate_until(texts)
    monkeypatch.setattr(Session, "prefill", lambda *_, **__: pytest.fail("it was measured again"))
    monkeypatch.setattr(Batch, "tick", lambda *_: pytest.fail("it was written again"))
    again = open_model(1, store=Store(tmp_path, {}))
    assert (again.loglikelihood(questions), again.generate_until(texts)) == answers
    with pytest.raises(pytest.fail.Exception):  # another k, another question
        open_model(2, store=Store(tmp_path, {})).loglikelihood(questions)
    with pytest.raises(pytest.fail.Exception):
        again.loglikelihood([request(0, "The boat", " sailed")])


def sampled(item: int, **options: Any) -> SimpleNamespace:
    return request(
        item, "The boat", {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, **options}
    )


def test_drawn_texts_belong_to_item_and_repeat(open_model: Callable[..., Any], tmp_path: Path) -> None:
    """lm-eval asks for repeats by giving the same request several times."""
    first, second = sampled(0), sampled(1)
    found = open_model(1).generate_until([first, first, first, second])
    assert len(set(found)) == 4
    # Whatever is asked beside it, and whatever was asked before
    assert open_model(1).generate_until([second]) == found[3:]
    assert open_model(1).generate_until([first, first]) == found[:2]
    assert open_model(1, seed=1).generate_until([first]) != found[:1]
    assert open_model(1).generate_until([sampled(0, seed=5)]) != found[:1]
    store = Store(tmp_path, {})
    open_model(1, store=store).generate_until([first, first])
    assert open_model(1, store=Store(tmp_path, {})).generate_until([first, first, first]) == found[:3]


def test_without_do_sample_the_temperature_says_nothing(open_model: Callable[..., Any]) -> None:
    greedy = open_model(1).generate_until([request(0, "The boat", {"until": [], "max_gen_toks": 12})])
    assert open_model(1).generate_until([sampled(0, do_sample=False)]) == greedy
    assert open_model(1).generate_until([sampled(0, temperature=0.0)]) == greedy
    assert open_model(1).generate_until([sampled(0, top_p=1e-6)]) == greedy
    assert open_model(1).generate_until([sampled(0, top_k=1)]) == greedy
    assert open_model(1).generate_until([sampled(0, min_p=1.0)]) == greedy
    assert open_model(1).generate_until([sampled(0, do_sample=False, min_p=1.0, presence_penalty=0)]) == greedy
    assert open_model(1).generate_until([sampled(0, temperature=0.0, frequency_penalty=2.0)]) != greedy
    with pytest.raises(InputError, match="in a way that is not offered"):
        open_model(1).generate_until([sampled(0, num_beams=4)])


def test_chat_template(bundle: Path, tmp_path: Path, open_model: Callable[..., Any]) -> None:
    from lora_drop_tools.eval.tasks.model import SessionLM

    codec = TextCodec.open(bundle / "tokenizer")
    codec.chat_template = TEMPLATE
    with Session.open(bundle, threads=1) as session:
        model = SessionLM(session, codec, Writer(bundle, codec, session.policy), 0, 0, Store(None, {}))
        chat = [{"role": "user", "content": "Hi"}]
        assert model.apply_chat_template(chat) == "<user>Hi\n<assistant>"
        # Without one the last message goes on, as in lm-eval's own model
        assert model.apply_chat_template(chat, add_generation_prompt=False) == "<user>Hi"
        assert (model.chat_template(True), model.chat_template(False)) == (TEMPLATE, "")
        assert "/" not in model.tokenizer_name
        with pytest.raises(InputError, match="has one chat template"):
            model.chat_template("tool_use")
    with pytest.raises(InputError, match="no chat template"):
        open_model(0).apply_chat_template(chat)


def test_special_tokens_that_a_template_writes_are_not_doubled(bundle: Path, open_model: Callable[..., Any]) -> None:
    """A tokenizer that leads each text with its token 5 (`%`), and a prompt that begins with it already."""
    model = open_model(0)
    plain = model._codec

    class Leading:
        def encode(self, text: str) -> Any:
            import numpy as np

            return np.concatenate([[5], plain.encode(text)])

    model._codec = Leading()
    assert model._encode("%A").tolist() == model._encode("A").tolist() == [5, 33]
    assert model._encode_pair("%A", " B") == ([5, 33], [0, 34])


# ── lm-eval's model and command ────────────────────────────────────────────────────────────────────────────────


def test_lm_eval_makes_the_model_of_its_arguments(bundle: Path) -> None:
    from lm_eval.api.registry import get_model
    from lora_drop_tools.eval.tasks import model as registered

    made = get_model("lora-drop").create_from_arg_string(
        f"bundle={bundle},k=2,policy=backfill,threads=1,seed=4", {"batch_size": 1, "device": "cpu"}
    )
    assert isinstance(made, registered.LoraDropLM)
    assert (made._k, made._seed, made._session.policy) == (2, 4, "backfill")
    assert get_model("dummy").__name__ == "DummyLM"  # lm-eval's own are there as ever
    made.close()
    own = registered.LoraDropLM(str(bundle), threads=1)
    assert own._k == own._session.bundle.manifest.plan.k
    own.close()


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ({"bundle": "b", "window": 3}, "an argument that is not known"),
        ({"k": 3}, "has no bundle"),
        ({"bundle": "b", "k": "x"}, "argument k is no whole number"),
        ({"bundle": "b", "seed": 0.5}, "argument seed is no whole number"),
    ],
)
def test_arguments_of_the_model_that_are_refused(arguments: dict[str, Any], fact: str) -> None:
    from lora_drop_tools.eval.tasks.model import LoraDropLM

    with pytest.raises(InputError, match=fact):
        LoraDropLM(**arguments)


def test_lm_evals_own_command(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its table, from a bundle, with definitions of one's own; all arguments are its own."""
    rows = [{"text": f"The boat number {i} sank, so he bought a boat"} for i in range(3)]
    define(tmp_path, "lambada_openai", "lambada/lambada_openai.yaml", rows)
    given = ["--model", "lora-drop", "--model_args", f"bundle={bundle},k=1,threads=1", "--tasks", "lambada_openai"]
    given += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "results"), "--log_samples"]
    given += ["--limit", "2"]
    assert main(["lm-eval", *given]) == 0
    printed = capsys.readouterr()
    assert "|lambada_openai|" in printed.out
    (written,) = (tmp_path / "results").rglob("results_*.json")
    figures = json.loads(written.read_text())
    assert figures["n-samples"]["lambada_openai"]["effective"] == 2
    assert figures["config"]["model"] == "lora-drop"
    # What lm-eval reports is the mean of what the session says of the two items
    codec = TextCodec.open(bundle / "tokenizer")
    from lora_drop_tools.eval.tasks.model import SessionLM

    with Session.open(bundle, threads=1) as session:
        model = SessionLM(session, codec, Writer(bundle, codec, session.policy), 1, 0, Store(None, {}))
        asked = [
            ("The boat number 0 sank, so he bought a", " boat"),
            ("The boat number 1 sank, so he bought a", " boat"),
        ]
        own = model.loglikelihood(
            [SimpleNamespace(args=pair, task_name="lambada_openai", doc={}, doc_id=i) for i, pair in enumerate(asked)]
        )
    found = figures["results"]["lambada_openai"]["perplexity,none"]
    assert found == pytest.approx(float(torch.tensor([-one[0] for one in own]).mean().exp()), rel=1e-3)


def test_lm_evals_command_applies_the_chat_template(bundle: Path, tmp_path: Path) -> None:
    own = tmp_path / "bundle"
    shutil.copytree(bundle, own)
    (own / "tokenizer/chat_template.jinja").write_text(TEMPLATE)
    record_again(own)
    rows = [{"question": "1+1?", "answer": "#### 2"}] * 6
    define(tmp_path, "gsm8k", "gsm8k/gsm8k.yaml", rows[:1], rows)
    given = ["--model", "lora-drop", "--model_args", f"bundle={own},k=1,threads=1", "--tasks", "gsm8k"]
    given += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "results"), "--log_samples"]
    given += ["--apply_chat_template", "--num_fewshot", "1", "--gen_kwargs", "max_gen_toks=4"]
    assert main(["lm-eval", *given]) == 0
    (written,) = (tmp_path / "results").rglob("samples_gsm8k_*.jsonl")
    prompts = {json.loads(line)["arguments"]["gen_args_0"]["arg_0"] for line in written.read_text().splitlines()}
    # Examples are turns of their own, as lm-eval has it by itself
    assert prompts == {"<user>Question: 1+1?\nAnswer:\n<assistant>#### 2\n<user>Question: 1+1?\nAnswer:\n<assistant>"}


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["--model", "lora-drop", "--tasks", "nothing_such"], "Note: ValueError: Tasks not found: nothing_such."),
        (
            ["--model", "lora-drop", "--model_args", "bundle=nowhere,kk=1", "--tasks", "lambada_openai"],
            "error: The model has an argument that is not known.",
        ),
    ],
)
def test_lm_evals_command_refuses(given: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lm-eval", *given]) == 2
    assert error in capsys.readouterr().err


def test_the_command_line_is_lm_evals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["lm-eval", "run", "--no-such-option"])
    assert ended.value.code == 2
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["lm-eval", "--help"]) == 2
    assert "error: Tasks need lm-eval." in capsys.readouterr().err


WITHOUT_LM_EVAL = """
import sys
sys.modules["lm_eval"] = None  # importing it fails, and finding it
from lora_drop_tools.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("given", [("lm-eval", "ls", "tasks"), ("eval", "BUNDLE", "--tasks", "arc_easy")])
def test_without_lm_eval(given: tuple[str, ...], bundle: Path) -> None:
    """In a process of its own, where nothing has been imported before."""
    words = [str(bundle) if word == "BUNDLE" else word for word in given]
    run = subprocess.run((sys.executable, "-c", WITHOUT_LM_EVAL, *words), capture_output=True, text=True, timeout=600)
    assert run.returncode == 2
    assert "error: Tasks need lm-eval." in run.stderr
    assert "Traceback" not in run.stderr
