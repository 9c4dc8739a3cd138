"""`--block-size auto`: the form of quantized weights that is the fastest here and costs little.

Enters: options, and what writes a bundle of them. Leaves: the bundle of the form that was chosen, and a table of all.

How fast a form is does not depend on its integers. So all forms are timed first, in bundles that are rounded to the
nearest and not kept. Then as few as can be are rounded as was asked for: a form that is no finer in any respect than
one that lost too much is taken to lose too much, and a slower one than one that did not is not wanted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError, NoDeviceError

from lora_drop_export.check.perplexity import engine_on_text
from lora_drop_export.check.reference import Reference
from lora_drop_export.check.runners import execution
from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.console import Console
from lora_drop_export.quantize.choice import BLOCK_SIZES
from lora_drop_export.targets.target import TARGETS
from lora_drop_export.targets.trt.target import TrtTarget

from .files import write_manifest
from .options import HEAD_DTYPES, ExportOptions, takers_of

MOST_LOSS = 0.03  # of perplexity, over that of float
_ROUNDS = 3  # in which every form is timed once
_PROMPT, _STEPS = 64, 32  # tokens of a prompt, and decode steps that are timed behind it

Write = Callable[[Path, ExportOptions, bool], Bundle]  # root, options, whether it is a stand-in


@dataclasses.dataclass(frozen=True)
class Form:
    """What the search chooses; as `ExportOptions` has it."""

    block_size: int
    symmetric: bool
    head_dtype: str | None

    def of(self, options: ExportOptions) -> ExportOptions:
        """The options of an export in this form."""
        calibration = options.calibration if options.calibrated else None  # else it is for the perplexity alone
        return dataclasses.replace(options, calibration=calibration, **dataclasses.asdict(self))

    def no_finer_than(self, other: Form) -> bool:
        """Whether it is the other one, or no finer than it in any respect."""
        fine = [(-form.block_size, not form.symmetric, form.head_dtype or "") for form in (self, other)]
        return all(own <= others for own, others in zip(*fine, strict=True))


@contextlib.contextmanager
def _timeable() -> Iterator[None]:
    try:
        yield
    except NoDeviceError as error:
        raise InputError(
            "The forms of the weights cannot be timed.", note=error.note, hint="Give --block-size as a number."
        ) from None


def check_device(options: ExportOptions) -> None:
    """Refuse to begin where the first target's engines could not be timed in the end. Raises InputError."""
    if isinstance(TARGETS[options.targets[0]], TrtTarget):
        from lora_drop_runtime.engines.trt import cuda_device

        with _timeable():
            cuda_device.device_compute_capability()


def forms_of(options: ExportOptions) -> list[Form]:
    """The forms that the options leave open."""
    given = options.weights_format
    assert given is not None
    points = (options.symmetric,) if given.symmetric else (False, True)
    heads: list[str | None] = [options.head_dtype]
    if given.bits == 4 and options.head_dtype is None:
        heads = [dtype for dtype in HEAD_DTYPES if not takers_of(dtype, options.targets)[1]]
    return [Form(size, symmetric, head) for size in BLOCK_SIZES for symmetric in points for head in heads]


def best_form(rates: Mapping[Form, float], found: Mapping[Form, float], most: float) -> Form:
    """The fastest of the forms whose perplexity is found and at most `most`, else the one of the least."""
    return min(found, key=lambda form: (0.0, -rates[form]) if found[form] <= most else (1.0, found[form]))


def tried_forms(rates: Mapping[Form, float], perplexity: Callable[[Form], float], most: float) -> dict[Form, float]:
    """The perplexities of the forms that have to be looked at to know the fastest of at most `most`, in their order.

    Next comes the form that leaves the fewest to look at, whatever its perplexity is.
    """
    open_forms, found = set(rates), dict[Form, float]()

    def without(form: Form, much: bool) -> set[Form]:
        """Which forms are left to look at once this one lost too much, or did not."""
        return {one for one in open_forms if not (one.no_finer_than(form) if much else rates[one] <= rates[form])}

    while open_forms:
        form = min(open_forms, key=lambda one: (max(len(without(one, much)) for much in (False, True)), -rates[one]))
        found[form] = perplexity(form)
        open_forms = without(form, found[form] > most)
    return found


def tokens_per_second(
    bundle: Bundle, target: str, provider: str | None, threads: int | None, ids: npt.NDArray[np.int64]
) -> float:
    """Of decode steps of one row under the bundle's own schedule, over tokens of a text, int64 [T]."""
    limits = bundle.manifest.limits
    prompt = min(_PROMPT, limits.max_prompt_len, len(ids) // 2, max(1, limits.max_seq_len // 2))
    forced = ids[prompt : min(prompt + _STEPS, limits.max_seq_len - 1), None]  # [steps, 1]; behind them is one more
    with execution(target), Session.open(bundle.root, target=target, provider=provider, threads=threads) as session:
        for _ in range(2):  # the first warms up
            session.prefill(ids[None, :prompt], max_new_tokens=len(forced) + 1)
            begin = time.perf_counter()
            for token in forced:
                session.step(token)
            seconds = time.perf_counter() - begin
    return len(forced) / seconds


def _runs_on(bundle: Bundle) -> tuple[str, str | None]:
    """The first target, and the provider that runs it."""
    target, _ = bundle.target(None)
    return target, TARGETS[target].provider(bundle.manifest.model.dtype)


def _weights(bundle: Bundle) -> dict[str, str]:
    """What tells stand-ins apart: name of a file → SHA-256."""
    return {name: one.sha256 for name, one in bundle.manifest.files.items() if name.startswith("weights/")}


def _timed(
    bundles: Mapping[Form, Bundle], options: ExportOptions, ids: npt.NDArray[np.int64], console: Console
) -> dict[Form, float]:
    """Tokens a second of each form: the medians of rounds in which they take turns."""
    rates: dict[Form, list[float]] = {form: [] for form in bundles}
    what, total = "timing the forms", _ROUNDS * len(bundles)
    with console.progress(what) as progress:
        for _ in range(_ROUNDS):
            for form, bundle in bundles.items():
                rates[form].append(tokens_per_second(bundle, *_runs_on(bundle), options.threads, ids))
                progress(what, sum(map(len, rates.values())), total)
    return {form: statistics.median(found) for form, found in rates.items()}


def _print_table(rows: Sequence[Mapping[str, Any]], perplexity: float, chosen: int, console: Console) -> None:
    from rich.table import Table

    table = Table()
    for name in ("block", "zero points", "head", "tokens/s", "MiB", "perplexity", "to float", ""):
        table.add_column(name, justify="left" if name in ("zero points", "head", "") else "right")
    for place, row in enumerate(rows):
        own = row["perplexity"]
        table.add_row(
            str(row["block_size"]),
            "no" if row["symmetric"] else "yes",
            row["head_dtype"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['weight_bytes'] / 2**20:.0f}",
            "not measured" if own is None else f"{own:.2f}",
            "" if own is None else f"{100 * (own / perplexity - 1):+.2f} %",
            "chosen" if place == chosen else "",
        )
    console.rich.print(table)


def fastest_form(
    root: Path,
    checkpoint: Checkpoint,
    windows: npt.NDArray[np.int64],
    options: ExportOptions,
    write: Write,
    console: Console,
) -> Bundle:
    """Write the bundle of the fastest form that costs at most `MOST_LOSS` of perplexity, else of the one that costs
    least, and say in its manifest what was measured.

    Perplexity is that of windows of a text, before and after; speed is that of decode steps on the first target.

    Args:
        root: of the bundle, whose tokenizer is there already.
        windows: int64 [N, S], of which nothing is rounded on (`held_back_windows`).

    Raises:
        InputError: there is no device for the target.
    """
    forms, scratch = forms_of(options), root / "forms"

    def written(name: str, form: Form, stand_in: bool) -> Bundle:
        directory = scratch / name
        directory.mkdir(parents=True)
        shutil.copytree(root / "tokenizer", directory / "tokenizer")
        return write(directory, form.of(options), stand_in)

    stand_ins: dict[Form, Bundle] = {}
    for place, form in enumerate(forms):
        console.say(f"form {place + 1} of {len(forms)}, to be timed")
        with console.without_lines():
            bundle = written(f"timed-{place}", form, True)
        twin = next((one for one, other in stand_ins.items() if _weights(other) == _weights(bundle)), None)
        if twin is None:
            stand_ins[form] = bundle
        else:  # of the same weights: this model's do not go into larger blocks
            console.say(f"form {place + 1} is that of blocks of {twin.block_size}")
            shutil.rmtree(bundle.root)
    windows = windows[:, : stand_ins[forms[0]].manifest.limits.max_seq_len]
    with _timeable():
        rates = _timed(stand_ins, options, windows[0], console)
    facts = {form: bundle.manifest.model for form, bundle in stand_ins.items()}
    what = "perplexity of the checkpoint"
    with console.progress(what) as progress:
        reference = Reference(checkpoint, stand_ins[forms[0]].manifest.plan, {})
        before, _ = reference.on_text(windows, lambda done, total: progress(what, done, total))
    for bundle in stand_ins.values():
        shutil.rmtree(bundle.root)
    kept: dict[Form, tuple[float, Bundle]] = {}

    def perplexity(form: Form) -> float:
        console.say(f"rounding the form of {rates[form]:.1f} tokens/s")
        bundle = written(f"rounded-{forms.index(form)}", form, False)
        with console.progress("perplexity of the bundle") as progress:
            after, _ = engine_on_text(bundle, *_runs_on(bundle), options.threads, windows, progress)
        kept[form] = after, bundle
        best = best_form(rates, {one: loss for one, (loss, _) in kept.items()}, most)
        for other in set(kept) - {best}:
            shutil.rmtree(kept.pop(other)[1].root)
        return after

    most = before * (1 + MOST_LOSS)
    found = tried_forms(rates, perplexity, most)
    ((chosen, (_, bundle)),) = kept.items()
    rows, fastest_first = [], sorted(rates, key=lambda form: rates[form], reverse=True)
    for form in fastest_first:
        kind = form.of(options).weights_format
        assert kind is not None
        rows.append(
            {
                "block_size": form.block_size,
                "symmetric": kind.symmetric,
                "head_dtype": form.head_dtype or f"int{kind.bits}",
                "tokens_per_second": rates[form],
                "weight_bytes": facts[form].weight_bytes,
                "perplexity": found.get(form),
            }
        )
    place = fastest_first.index(chosen)
    _print_table(rows, before, place, console)
    if found[chosen] > most:
        console.say(f"no form costs less than {100 * MOST_LOSS:.0f} % of perplexity: this one costs least")
    for path in bundle.root.iterdir():
        if path.name != "tokenizer":
            path.rename(root / path.name)
    shutil.rmtree(scratch)
    said = {"tokens": windows.size, "float": before, "bound": MOST_LOSS, "chosen": place, "measured": rows}
    quantization = bundle.manifest.quantization | {"forms": said}
    return write_manifest(root, dataclasses.replace(bundle.manifest, quantization=quantization))
