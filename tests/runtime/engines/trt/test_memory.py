"""Which memory the TensorRT engine holds, and which of it both step graphs share."""

from __future__ import annotations

import numpy as np
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.trt.engine import DeviceBuffer

from tests.support.device_steps import LORA, RAGGED, REFRESH, padded
from tests.support.fake_trt import TARGET, open_device_session


def test_one_scratch_block_for_all_contexts(bundle: Bundle) -> None:
    session, engine, cuda = open_device_session(bundle)
    with session:
        session.generate(RAGGED, 9)
        assert cuda.mallocs.count(5000) == 1  # the larger need of the two engines
        assert 3000 not in cuda.mallocs
        assert {context.memory for context in cuda.users} == {(engine._plans.scratch, 5000)}
        assert {context.engine.kind for context in cuda.users} == {LORA, REFRESH}


def test_both_engines_share_caches_weights_and_ids(bundle: Bundle) -> None:
    """One buffer table: a name is one address, in every context and for past and present."""
    session, engine, cuda = open_device_session(bundle)
    with session:
        session.generate(RAGGED, 9)
        addresses: dict[str, set[int]] = {}
        for bound in [context.addresses for context in cuda.users]:
            for name, address in bound.items():
                if "state" not in name:
                    addresses.setdefault(name.replace("present_", "past_"), set()).add(address)
        assert all(len(found) == 1 for found in addresses.values())
        assert len(set.union(*addresses.values())) == len(addresses)  # and no two names share one
        table = bundle.weight_inputs(TARGET)
        assert set(table) <= set(addresses)
        block = cuda.blocks[min(address for name in table for address in addresses[name])]
        assert block.nbytes == engine.resident_bytes["weights"]
        assert sum(weight.size_bytes for weight in table.values()) <= block.nbytes


def test_resident_bytes(bundle: Bundle) -> None:
    session, engine, cuda = open_device_session(bundle)
    with session:
        assert engine.resident_bytes["buffers"] == 0
        session.generate(RAGGED, 9)
        resident = engine.resident_bytes
        assert resident["scratch"] == 5000
        assert resident["buffers"] > session.kv_bytes()["allocated"]
        on_device = sum(block.nbytes for block in cuda.blocks.values())
        assert resident["weights"] + resident["scratch"] + resident["buffers"] == on_device


def test_logits_may_be_read_after_close(bundle: Bundle) -> None:
    """Page-locked memory is numpy's own."""
    session, _, _ = open_device_session(bundle)
    logits = session.prefill(*padded(RAGGED))
    before = logits.copy()
    session.close()
    np.testing.assert_array_equal(logits, before)


def test_a_slice_of_a_buffer_is_a_view() -> None:
    buffer = DeviceBuffer("x", 4096, (4, 2, 8), "bfloat16")
    assert buffer.nbytes == 128
    assert buffer[1:3] == DeviceBuffer("x", 4096 + 32, (2, 2, 8), "bfloat16")
    assert buffer[:] == buffer
