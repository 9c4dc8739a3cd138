"""Checks and measures this project on the GPU of this machine: `python tools/gpu_check.py --out card.json`."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

from gpu_check.command import end_on_signals, main  # noqa: E402 - the folder beside this file

if __name__ == "__main__":
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # of all stages: ONNX Runtime reports its use otherwise
    end_on_signals()
    sys.exit(main())
