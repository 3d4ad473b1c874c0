"""Counts requests, each in a fork of this process, which has imported what all of them need.

A request comes as a line of JSON, its counts go to the file that it names, and the fork's exit
status is printed; what a fork prints goes to stderr. Run with `bench.counting.build.environment`.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch  # noqa: F401
import torch._dynamo  # noqa: F401
import triton  # noqa: F401

os.environ.pop("LD_PRELOAD", None)  # as in bench.counting.worker, before compilers are started
import torch._inductor.graph  # noqa: E402, F401

from bench.counting.turn import count_turn  # noqa: E402
from bench.counting.worker import Request, count  # noqa: E402


def answer(asked: dict, file: str) -> None:
    request = Request(**asked)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log.jsonl"
        result = count_turn(request, log, Path(scratch)) if request.turn else count(request, log)
    Path(file).write_text(json.dumps(result), encoding="utf-8")


for line in sys.stdin:
    process = os.fork()
    if not process:
        os.dup2(2, 1)
        code = 0
        try:
            answer(**json.loads(line))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitpid(process, 0)[1], flush=True)
