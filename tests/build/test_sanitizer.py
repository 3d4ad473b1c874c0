"""The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer.

CPU kernels in a copy of the checkout, CUDA kernels in the emulator of tests/simt.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..simt.emulator import HERE, Build, pgolf_build
from .checkout import ROOT, build, copy_checkout, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="no g++ on PATH"),
]

# What `sanitized` is built from, and the glue around it; headers follow.
CPU_SOURCES = (
    "setup.py", "csrc/bindings.cpp", "csrc/bindings", "csrc/cpu", "csrc/host", "pgolf/ops"
)  # fmt: skip
CUDA_SOURCES = ("tests/simt", "csrc/bindings.cpp", "csrc/bindings", "csrc/cuda", "pgolf/ops")

SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
SANITIZED = f"g++ {SANITIZERS}"
TESTS = ROOT / "tests" / "ops"


@pytest.fixture(scope="module")
def preloaded():
    """The environment of a process that loads what is built with both."""
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip(f"g++ does not have both of {libraries}")
    # The sanitizer has to be there before Python, which is built without it, and libstdc++ before
    # the first exception. Python keeps memory until it ends, which is no leak.
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory, preloaded):
    """(a copy of the checkout whose pgolf._C is built with both, the environment to run it in)."""
    root = copy_checkout(tmp_path_factory.mktemp("sanitized"))
    build(root, PGOLF_BUILD="cpu", CXX=SANITIZED)
    # pgolf is the copy's; what the tests take from bench/ is the checkout's.
    return root, {**preloaded, "PYTHONPATH": f"{root}{os.pathsep}{ROOT}"}


def pytest_in(root: Path, env: dict, *arguments) -> subprocess.CompletedProcess:
    """pytest in the copy, whose pgolf comes first on the path."""
    where = [sys.executable, "-c", "import pgolf._C; print(pgolf._C.__file__)"]
    assert run(where, root, **env).stdout.startswith(str(root))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return run(command, root, **env)


CPU_TESTS = [
    f"tests/ops/test_{name}.py"
    for name in ("cpu_kernels", "cpu_kernel_arguments", "cpu_kernel_threads")
]


@pytest.mark.proves(*CPU_SOURCES, *CPU_TESTS)
def test_kernels_are_clean(sanitized):
    passes(pytest_in(*sanitized, *(ROOT / file for file in CPU_TESTS)))


@pytest.mark.proves(*CPU_SOURCES, "tests/ops/test_fuzz.py")
def test_operators_are_clean_on_500_layouts_each(sanitized):
    root, env = sanitized
    passes(pytest_in(root, {**env, "PGOLF_FUZZ_EXAMPLES": "500"}, TESTS / "test_fuzz.py"))


def passes(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert " passed" in result.stdout and " failed" not in result.stdout


@pytest.mark.proves(*CPU_SOURCES)
@pytest.mark.parametrize(
    ("access", "file", "right", "wrong"),
    [
        # One element too many is read, and one vector too many is written.
        ("READ of size", "weight_cast.cpp", "I largest = 0;", "I largest = 0; count += 1;"),
        (
            "WRITE of size",
            "stream.h",
            "lanes.store(x, to_ + at);",
            "FullLanes<F>{}.store(x, to_ + at);",
        ),
    ],
    ids=["read", "write"],
)
def test_an_access_out_of_bounds_is_found(sanitized, access, file, right, wrong):
    """On exact buffers, so that neither guard zones nor results give it away."""
    root, env = sanitized
    source = root / "csrc" / "cpu" / file
    text = source.read_text()
    assert text.count(right) == 1
    code = (
        "import ctypes\n"
        "from pgolf import _C\n"
        "room = lambda n: ctypes.cast(libc.malloc(4 * n), ctypes.c_void_p).value\n"
        "libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p\n"
        "w, f, out, step, bits = room(16), room(2), room(16), room(2), room(1)\n"
        "for a, n in ((w, 16), (f, 2)): ctypes.memset(a, 0, 4 * n)\n"
        "ctypes.c_float.from_address(bits).value = 6\n"
        "matrix = (2, 8, w, 8, 0, f, bits, out, step)\n"
        "_C.weight_cast([matrix], bits, 0, 0, 0.0, 1, False, 1)\n"
        "_C.xsa(w, w, room(8), 0, 1, 1, 1, 1, 8, (8, 8, 8), (8, 8, 8), 1)\n"
    )
    clean = run([sys.executable, "-c", code], root, **env)
    assert clean.returncode == 0, clean.stderr[-4000:]
    source.write_text(text.replace(right, wrong))
    try:
        build(root, PGOLF_BUILD="cpu", CXX=SANITIZED)
        found = run([sys.executable, "-c", code], root, **env)
    finally:
        source.write_text(text)
        build(root, PGOLF_BUILD="cpu", CXX=SANITIZED)
    assert found.returncode != 0
    assert "ERROR: AddressSanitizer" in found.stderr, found.stderr[-4000:]
    assert access in found.stderr


# ---- CUDA kernels in the emulator


@pytest.mark.proves(*CUDA_SOURCES, "tests/ops/test_operators.py")
def test_emulated_kernels_are_clean(tmp_path, preloaded):
    """The registry's tests of them, in all orders of threads that a seed may choose."""
    module = pgolf_build(tmp_path, SANITIZERS.split(), checks=()).run()
    env = {**preloaded, "PYTHONPATH": str(ROOT), "PGOLF_CUDA_MODULE": str(module)}
    tests = "accuracy or contract"
    for seed in ("0", "1", "2"):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-k", f"({tests}) and cuda", TESTS / "test_operators.py"]
        passes(run(command, ROOT, **env, PGOLF_EMULATOR_SEED=seed))


@pytest.mark.proves("tests/simt")
@pytest.mark.parametrize("threads", [24, 25])
def test_an_emulated_access_out_of_bounds_is_found(tmp_path, preloaded, threads):
    """Of the kernel `places` in tests/simt/rules.cu, a number a thread: 25 do not fit into 24."""
    library = Build([HERE / "rules.cu"], [], tmp_path, SANITIZERS.split(), checks=()).run()
    code = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p\n"
        "three, said = ctypes.c_uint * 3, ctypes.create_string_buffer(500)\n"
        "size, memory = ctypes.c_size_t, ctypes.c_void_p(libc.malloc(24 * 4))\n"
        f"ctypes.CDLL({str(library)!r}).start(b'places', three(1, 1, 1), three({threads}, 1, 1),\n"
        "    size(0), memory, said, size(499))\n"
        "assert said.value == b''\n"
    )
    result = run([sys.executable, "-c", code], ROOT, **preloaded)
    assert (result.returncode == 0) == (threads == 24), result.stderr[-4000:]
    if threads == 25:
        assert "ERROR: AddressSanitizer: heap-buffer-overflow" in result.stderr
        assert "WRITE of size 4" in result.stderr and "places" in result.stderr
