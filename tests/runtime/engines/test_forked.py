"""A process that is forked while a session is open: it goes on with it, closes it and ends, and so does its parent."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.bundles import make_bundle

CODE = """
import os, signal, sys
from lora_drop_runtime import Session

session = Session.open(sys.argv[1], target=sys.argv[2], threads=2)
wanted = session.generate([5, 6], 8)[0].tolist()
child = os.fork()
if not child:
    signal.alarm(600)
    assert session.generate([5, 6], 8)[0].tolist() == wanted
    if sys.argv[3] == "close":
        session.close()
    print("ends", flush=True)
    sys.exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
assert session.generate([5, 6], 8)[0].tolist() == wanted
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on Windows")
@pytest.mark.parametrize("how", ["close", "exit"])
@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_a_fork_ends(target, how, tmp_path) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    bundle = make_bundle("llama", tmp_path / "bundle", targets=(target,))
    command = [sys.executable, "-c", CODE, str(bundle.root), target, how]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=900, check=True)
    assert done.stdout == "ends\n"


REFUSED = """
import os, signal, sys
from lora_drop_runtime import Session
from lora_drop_runtime.errors import InputError

Session.open(sys.argv[1], target="openvino", threads=1).close()
child = os.fork()
if not child:
    signal.alarm(600)
    try:
        Session.open(sys.argv[1], target="openvino", threads=1)
    except InputError as error:
        print(error, flush=True)
        os._exit(3)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
Session.open(sys.argv[1], target="openvino", threads=1).close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on Windows")
def test_a_fork_that_would_wait_for_ever_is_refused(tmp_path) -> None:
    pytest.importorskip("openvino")
    bundle = make_bundle("llama", tmp_path / "bundle", targets=("openvino",))
    command = [sys.executable, "-c", REFUSED, str(bundle.root)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=900, check=True)
    assert "in a process that was forked from one where it had" in done.stdout
    assert "spawn" in done.stdout
