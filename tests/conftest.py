"""What all tests share."""

import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from _pytest.assertion.rewrite import AssertionRewritingHook

from bench.synthetic import Words
from pgolf.data.prepare import prepare

from .proofs import Proofs
from .simt.emulator import Missing, emulated_module

EMULATED = pytest.StashKey[str]()

# Without a GPU, Triton kernels run in Triton's interpreter, which has to be known at the first
# import of triton: now, since a test may take the variable away for a while.
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    with suppress(ImportError):
        from .triton.overhead import trim

        trim()

# One process for each core fills them: threads would only wait for each other. Tests of threads ask
# for theirs.
if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)


def emulate_cuda(build: bool) -> str:
    """Let CUDA kernels run without a GPU; what is emulated now, or what is missing for it.

    They run in the emulator, which pgolf.extension loads. Seed 2 is a random order of threads: a
    missing barrier shows.
    """
    if GPU:
        return "nothing, there is a GPU"
    os.environ.setdefault("PGOLF_EMULATOR_SEED", "2")
    if os.environ.get("PGOLF_CUDA_MODULE"):
        return "Triton, and CUDA as PGOLF_CUDA_MODULE says"
    try:
        os.environ["PGOLF_CUDA_MODULE"] = str(emulated_module(build))
    except Missing as missing:
        return f"Triton; not CUDA, whose tests are left out: {missing}"
    return "Triton and CUDA"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--prove", choices=("changed", "all"),
        help="leave out proofs that tests/proved.json has, or none; write there what is proved",
    )  # fmt: skip


def rewrite_nothing() -> None:
    """No assertion of a test that is only listed fails; rewriting all takes seconds.

    It is done again each time where PYTHONDONTWRITEBYTECODE is set.
    """
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, AssertionRewritingHook)]


def any_time_for_examples() -> None:
    """No test depends on wall time, and the machines that run them are small and shared."""
    from hypothesis import settings  # now, since the hook would rewrite it as well

    settings.register_profile("pgolf", deadline=None)
    settings.load_profile("pgolf")


def pytest_configure(config: pytest.Config) -> None:
    """A list of the tests builds nothing; otherwise this is done before workers are started."""
    if config.option.collectonly:
        rewrite_nothing()
        gc.freeze()  # of what is imported by now, nothing is garbage
        gc.disable()
    any_time_for_examples()
    config.stash[EMULATED] = emulate_cuda(build=not config.option.collectonly)
    if config.option.prove and not config.option.collectonly:
        writes = not hasattr(config, "workerinput")
        config.pluginmanager.register(Proofs(config.option.prove, writes=writes))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Modules and tests stay until the end: no collection of garbage need go through them."""
    if not session.config.option.collectonly:
        gc.collect()
        gc.freeze()


def pytest_report_header(config: pytest.Config) -> str:
    return f"emulated: {config.stash[EMULATED]}"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of sample shards and tokenizers that may lie beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no sample data at {folder}")
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A prepared folder of made-up words, for a vocabulary of 400."""
    folder = tmp_path_factory.mktemp("data") / "words"
    prepare(Words(), folder, "words", vocab_size=400)
    return folder
