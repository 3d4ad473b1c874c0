"""The build of pgolf._C from a copy of the checkout, by the real compilers: what it makes."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .checkout import ROOT, build, compiled, copy_checkout, load_setup, python, run

# What these builds read. Other versions of Python and setuptools meet `make setup`, which builds in
# any case, and test_install.py.
SOURCES = (
    "setup.py", "pyproject.toml", "MANIFEST.in", "csrc", "triton_kernels", "pgolf/__init__.py",
    "pgolf/py.typed",
)  # fmt: skip


def compiles_everything(test):
    """Minutes on two cores."""
    return pytest.mark.slow(pytest.mark.proves(*SOURCES)(test))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy with the CPU kernels built by the real compiler."""
    root = copy_checkout(tmp_path_factory.mktemp("built"))
    output = build(root, PGOLF_BUILD="cpu")
    assert "pgolf: built pgolf._C for CPU only: PGOLF_BUILD=cpu" in output
    assert "warning" not in output
    return root


# ---- what is built


@compiles_everything
def test_build_info(built, tmp_path):
    code = "from pgolf import _C; print(_C.__file__, _C.build_info(), sep='|')"
    file, info = python(code, built, tmp_path).split("|")
    info = eval(info)
    assert Path(file).parent == built / "pgolf"
    assert (info["cuda"], info["nvcc"], info["cudart"], info["archs"]) == (False, "", "", [])
    assert info["reason"] == "PGOLF_BUILD=cpu"
    assert any(char.isdigit() for char in info["compiler"])


@compiles_everything
def test_only_what_changed_is_compiled(built):
    assert compiled(build(built, PGOLF_BUILD="cpu")) == set()
    (built / "csrc" / "extra.h").write_text("#pragma once\n")
    for folder, objects in (
        ("host", {"extra.cpp.o"}),
        ("cpu", {f"extra.cpp.{isa}.o" for isa in load_setup().ISAS}),
    ):
        (built / "csrc" / folder / "extra.cpp").write_text('#include "extra.h"\n')
        assert compiled(build(built, PGOLF_BUILD="cpu")) == objects | {"_C.so"}
        text = f"#pragma once\nextern int changed_for_{folder};\n"
        (built / "csrc" / "extra.h").write_text(text)
        assert compiled(build(built, PGOLF_BUILD="cpu")) == objects | {"_C.so"}
        (built / "csrc" / folder / "extra.cpp").unlink()
    assert compiled(build(built, PGOLF_BUILD="cpu")) == {"_C.so"}


@compiles_everything
def test_wheel_works_from_another_folder(built, tmp_path):
    (built / "pgolf" / "stale.py").write_text("")
    wheel = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", tmp_path]
    assert run(wheel, built, PGOLF_BUILD="cpu").returncode == 0
    (built / "pgolf" / "stale.py").unlink()
    result = run(wheel, built, PGOLF_BUILD="cpu")
    assert compiled(result.stdout) == set()
    (file,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(file).namelist()
    assert "pgolf/stale.py" not in names
    assert not [n for n in names if n.startswith(("tests/", "triton_kernels/", "csrc/"))]
    assert {"pgolf/triton_kernels/configs.json", "pgolf/py.typed"} <= set(names)
    zipfile.ZipFile(file).extractall(tmp_path / "installed")
    code = (
        "import pgolf._C, pgolf.triton_kernels as t;"
        "print(pgolf._C.build_info()['reason'], t.__name__, t.__file__, sep='|')"
    )
    reason, name, at = python(code, tmp_path / "installed", tmp_path).split("|")
    assert (reason, name) == ("PGOLF_BUILD=cpu", "pgolf.triton_kernels")
    assert at == str(tmp_path / "installed" / "pgolf" / "triton_kernels" / "__init__.py")


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")
@compiles_everything
def test_cuda_module_loads_without_a_driver(built, tmp_path):
    output = build(built, PGOLF_BUILD="cuda", TORCH_CUDA_ARCH_LIST="9.0a")
    assert "for CPU and CUDA (sm_90a): PGOLF_BUILD=cuda" in output
    code = (
        "from pgolf import _C; print(_C.build_info())\n"
        "_C.leaky_relu2_cuda(0, 0, 0, 0, 0, 0, 0, 0.5, 0)\n"
        "try: _C.leaky_relu2_cuda(256, 256, 256, 0, 0, 1, 8, 0.5, 0)\n"
        "except RuntimeError as e: print(e)"
    )
    info, *error = python(code, built, tmp_path).splitlines()
    info = eval(info)
    assert (info["cuda"], info["cudart"], info["archs"]) == (True, "static", ["sm_90a"])
    assert "release" in info["nvcc"]
    if not Path("/proc/driver/nvidia/version").exists():
        assert error[0].startswith("CUDA error: ")
    libraries = subprocess.run(["ldd", *built.glob("pgolf/_C.*.so")], capture_output=True).stdout
    assert b"cudart" not in libraries and b"libcuda" not in libraries
    # The header that nvcc included counts: nothing else is compiled.
    kernel = built / "csrc" / "cuda" / "leaky_relu2.cu"
    kernel.write_text('#include "only_cuda.h"\n' + kernel.read_text())
    header = built / "csrc" / "only_cuda.h"
    for text in ("#pragma once\n", "#pragma once\nextern int changed;\n"):
        header.write_text(text)
        output = build(built, PGOLF_BUILD="cuda", TORCH_CUDA_ARCH_LIST="9.0a")
        assert compiled(output) == {"leaky_relu2.cu.o", "_C.so"}


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm on PATH")
@compiles_everything
def test_no_code_is_shared_between_instruction_sets(built):
    """Of a function that several objects define, the linker keeps any one: it may be the one that
    this CPU cannot run. So all that is visible carries the name of the instruction set."""
    (folder,) = built.glob("build/*/cpu")
    sources = [path.name for path in (built / "csrc" / "cpu").glob("*.cpp")]
    assert "xsa.cpp" in sources
    for path in (folder / f"{name}.{isa}.o" for name in sources for isa in load_setup().ISAS):
        command = ["nm", "--extern-only", "--defined-only", "--format=just-symbols", path]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        isa = path.suffixes[-2][1:]
        assert names and all(f"pgolf3cpu{len(isa)}{isa}" in name for name in names), (path, names)


@compiles_everything
def test_instruction_set_is_chosen_when_it_runs(built, tmp_path):
    code = "from pgolf import _C; print(_C.cpu_isa())"
    best = python(code, built, tmp_path)
    assert best in load_setup().ISAS
    env = {"PYTHONPATH": str(built), "PGOLF_CPU_ISA": "plain"}
    assert run([sys.executable, "-c", code], tmp_path, **env).stdout == "plain\n"


def test_other_processors_get_plain_code(checkout, fake):
    path, _ = fake
    setup = checkout / "setup.py"
    setup.write_text(setup.read_text().replace("platform.machine()", "'riscv64'"))
    output = build(checkout, PATH=path, PGOLF_BUILD="cpu")
    assert "xsa.cpp.plain.o" in compiled(output)
    ninja = next(checkout.glob("build/*/build.ninja")).read_text()
    assert "avx" not in ninja and " -m" not in ninja
    header = next(checkout.glob("build/*/build_info.h")).read_text()
    assert "#define PGOLF_EACH_ISA(F) F(plain)\n" in header


# ---- the bare name


def test_triton_kernels_is_refused_under_its_bare_name():
    result = run([sys.executable, "-c", "import triton_kernels"], ROOT)
    assert result.returncode == 1
    assert "ImportError: this is pgolf's folder of Triton kernels" in result.stderr


def test_triton_kernels_from_the_checkout_without_installing(checkout, tmp_path):
    code = "import pgolf.triton_kernels as t; print(t.__file__)"
    assert python(code, checkout, tmp_path).startswith(str(checkout))
