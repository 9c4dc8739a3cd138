"""Weights in huge pages: what is moved, and what is left alone, by what the system says of the process's memory."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from lora_drop_runtime import Session
from lora_drop_runtime.engines import huge_pages
from lora_drop_runtime.engines.huge_pages import HugePages, _without

from tests.support.bundles import make_bundle, traced_model
from tests.support.models import llama

MIB = 1 << 20


def said(name: str, begin: int = 0, end: int = 1 << 64) -> int:
    """Bytes that the system gives for the mappings that meet a span."""
    total, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first = line.split(maxsplit=1)[0]
            if "-" in first and not first.endswith(":"):
                low, high = (int(part, 16) for part in first.split("-"))
                inside = low < end and high > begin
            elif inside and first == f"{name}:":
                total += int(line.split()[1]) << 10
    return total


def moves() -> bool:
    """Whether this system moves memory into huge pages when it is asked."""
    pages = HugePages(64 * MIB)
    memory = mmap.mmap(-1, 8 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(bytes([1]) * len(memory))
    thread = pages.take()
    if thread is None:
        return False
    thread.join()
    begin = np.frombuffer(memory, np.uint8).ctypes.data
    return said("AnonHugePages", begin, begin + len(memory)) > 0


needs_huge_pages = pytest.mark.skipif(not moves(), reason="no transparent huge pages, or Linux before 6.1")


def of_its_own(size: int) -> tuple[np.ndarray, int, int]:
    """Memory of no one else's, not written yet, its begin and end."""
    memory = np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    return memory, memory.ctypes.data, memory.ctypes.data + size


@needs_huge_pages
def test_what_came_later_is_moved_as_it_is(monkeypatch) -> None:
    early, first, last = of_its_own(16 * MIB)
    early[:] = 7
    pages = HugePages(64 * MIB)
    late, begin, end = of_its_own(64 * MIB)
    late[:] = np.arange(len(late), dtype=np.uint8)
    seen: list[tuple[int, int]] = []
    move = huge_pages._move
    monkeypatch.setattr(huge_pages, "_move", lambda spans, size: (seen.extend(spans), move(spans, size)))
    thread = pages.take()
    assert thread is not None
    thread.join()
    assert said("AnonHugePages", begin, end) >= 56 * MIB  # whole pages of 2 MiB
    assert sum(max(0, min(b, end) - max(a, begin)) for a, b in seen) >= 56 * MIB
    assert not any(a < last and b > first for a, b in seen)  # nothing of the early one
    np.testing.assert_array_equal(late, np.arange(len(late), dtype=np.uint8))
    assert pages.take() is None  # once


@needs_huge_pages
def test_what_is_not_used_stays_free() -> None:
    """Half of each huge page, and whole ones that were never written: none is filled up."""
    pages = HugePages(64 * MIB)
    memory, begin, end = of_its_own(64 * MIB)
    memory.reshape(-1, MIB)[:48:2] = 1
    used = said("Rss", begin, end)
    thread = pages.take()
    assert thread is not None
    thread.join()
    assert said("Rss", begin, end) <= used + 4 * MIB


@pytest.mark.parametrize("text", ["always madvise [never]\n", None])
def test_a_system_that_has_none_is_left_alone(text, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    if text is not None:
        (tmp_path / "enabled").write_text(text)
        (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    pages = HugePages(64 * MIB)
    memory, *_ = of_its_own(16 * MIB)
    memory[:] = 1
    assert pages.take() is None


@needs_huge_pages
def test_it_is_taken_after_so_many_steps() -> None:
    pages = HugePages(64 * MIB)
    memory, begin, end = of_its_own(16 * MIB)
    memory[:] = 1
    for _ in range(huge_pages._STEPS - 1):
        pages.has_run()
    assert pages._thread is None
    pages.has_run()
    pages.settle()
    assert said("AnonHugePages", begin, end) >= 8 * MIB


def test_little_is_not_worth_it() -> None:
    pages = HugePages(MIB)
    memory, *_ = of_its_own(16 * MIB)
    memory[:] = 1
    assert pages.take() is None


def test_spans_without_others() -> None:
    """Against sets of numbers."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        marks = [np.sort(rng.choice(60, 2 * int(rng.integers(1, 9)), replace=False)).reshape(-1, 2) for _ in range(2)]
        spans, others = ([(int(a), int(b)) for a, b in pairs] for pairs in marks)
        numbers = [{n for a, b in pairs for n in range(a, b)} for pairs in (spans, others)]
        found = list(_without(spans, others))
        assert all(a < b for a, b in found)
        assert sorted(n for a, b in found for n in range(a, b)) == sorted(numbers[0] - numbers[1])


@needs_huge_pages
@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_an_engine_has_its_weights_there(target, tmp_path, monkeypatch) -> None:
    """A head of 24 MiB, once it is asked for; the logits are those of an engine that leaves it where it was."""
    if target == "openvino":
        pytest.importorskip("openvino")
    source = traced_model(llama(vocab_size=24576, hidden_size=256, tie_word_embeddings=False, num_hidden_layers=2))
    bundle = make_bundle(source, tmp_path / "b", targets=(target,), drop_ratio=0.0)

    seen: list[tuple[int, int]] = []
    move = huge_pages._move
    monkeypatch.setattr(huge_pages, "_move", lambda spans, size: (seen.extend(spans), move(spans, size)))

    def logits() -> np.ndarray:
        others = set(huge_pages._all)  # of engines that are open still
        with Session.open(bundle.root, k=0, threads=1, target=target) as session:
            first = session.prefill(np.array([[3, 5, 7]]), np.array([3]), max_new_tokens=4)
            second = session.step([9])
            own = set(huge_pages._all) - others
            assert {(pages._left, pages._thread) for pages in own} == {(huge_pages._STEPS - 2, None)}
            for pages in own:
                pages.settle()
            if seen:
                assert max(said("AnonHugePages", *span) for span in seen) >= 16 * MIB
            return np.stack([first, second, session.step([4])])

    there = logits()
    assert sum(end - begin for begin, end in seen) >= 24 * MIB
    seen.clear()
    monkeypatch.setattr(huge_pages, "_page_bytes", lambda: 0)
    np.testing.assert_array_equal(there, logits())
    assert not seen
