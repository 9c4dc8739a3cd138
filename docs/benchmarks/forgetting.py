"""K/V of a row of target `openvino`, of a session that keeps all and of one that forgets what no layer sees any more.

    python docs/benchmarks/forgetting.py BUNDLE --contexts 256,2048,3900

Prints what the row's blocks take, behind so many tokens and 32 more.
"""

from __future__ import annotations

import argparse

import numpy as np
from lora_drop_runtime import Session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--contexts", default="256,2048,3900", help="tokens of the row")
    options = parser.parse_args()
    for forget in (False, True):
        with Session.open(options.bundle, target="openvino", forget=forget) as session:
            for tokens in map(int, options.contexts.split(",")):
                session.prefill(np.ones((1, tokens), np.int64), max_new_tokens=33)
                for _ in range(32):
                    session.step(np.array([1]))
                mebibytes = session.kv_bytes()["allocated"] / 2**20
                print(f"forget={forget}, {tokens} tokens and 32 more: {mebibytes:.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
