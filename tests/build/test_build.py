"""The build of pgolf._C from a copy of the checkout: what it builds, says, records and refuses.

Real compilers where the result is used; otherwise a stand-in that writes empty objects.
"""

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Minutes of compiling on two cores.
compiles_everything = pytest.mark.slow
CHOOSERS = ("PGOLF_BUILD", "PGOLF_CUDART", "CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST")

# Answers --version; when it compiles, leaves an object and a depfile without dependencies.
FAKE_COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo "fake release 1.0" && exit
while [ $# -gt 0 ]; do
    [ "$1" = -o ] && object=$2
    [ "$1" = -MF ] && depfile=$2
    shift
done
: > "$object"
[ -z "${depfile:-}" ] || echo "$object:" > "$depfile"
"""


def copy_checkout(folder: Path) -> Path:
    """What the build needs, with a space in the path and nothing that was built."""
    root = folder / "a checkout"
    root.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md"):
        shutil.copy(ROOT / name, root)
    for name in ("csrc", "pgolf", "triton_kernels"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=ignore)
    return root


def run(command: list, root: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a command in `root` without the choices that this process inherited."""
    base = {k: v for k, v in os.environ.items() if k not in CHOOSERS}
    return subprocess.run(
        [str(part) for part in command], cwd=root, env=base | env, capture_output=True, text=True
    )


def build(root: Path, **env: str) -> str:
    """build_ext into the copy; its output."""
    result = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], root, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def refusal(root: Path, **env: str) -> str:
    """What a build that has to fail says."""
    result = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], root, **env)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr


def compiled(output: str) -> set[str]:
    """The objects that ninja made, by name."""
    words = (line.split() for line in output.splitlines() if line.startswith("["))
    return {Path(line[-1]).name for line in words}


def python(code: str, path: Path, cwd: Path) -> str:
    """The output of `code` in a new interpreter which finds packages in `path`."""
    result = run([sys.executable, "-W", "error", "-c", code], cwd, PYTHONPATH=str(path))
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def checkout(tmp_path):
    return copy_checkout(tmp_path)


@pytest.fixture
def fake(tmp_path):
    """(a PATH that holds the stand-in as c++ and nvcc besides sh, the folder of the stand-ins)."""
    folder = tmp_path / "fake $bin"  # what ninja and the shell each want escaped
    for name in ("c++", "nvcc"):
        program(folder / name, FAKE_COMPILER)
    (folder / "sh").symlink_to("/bin/sh")
    return str(folder), folder


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
    assert "pgolf/triton_kernels/configs.json" in names
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


# ---- what is chosen


def test_none_builds_nothing_and_removes_what_was_there(checkout, tmp_path):
    old = checkout / "pgolf" / "_C.old.so"
    old.touch()
    output = build(checkout, PGOLF_BUILD="none")
    assert output == "pgolf: built no pgolf._C, pure Python only: PGOLF_BUILD=none\n"
    assert not old.exists() and not (checkout / "build").exists()
    wheel = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", tmp_path]
    result = run(wheel, checkout, PGOLF_BUILD="none")
    assert result.returncode == 0 and output in result.stdout
    assert [p.name.split("-", 2)[2] for p in tmp_path.glob("*.whl")] == ["py3-none-any.whl"]


def test_auto_without_a_compiler_goes_on(checkout, fake):
    path, folder = fake
    (folder / "c++").unlink()
    missing = "pgolf: built no pgolf._C, pure Python only: PGOLF_BUILD=auto and "
    assert build(checkout, PATH=path).startswith(missing + "no C++ compiler on PATH")
    assert build(checkout, CXX="/nonexistent").startswith(
        missing + "the C++ compiler CXX=/nonexistent is not there"
    )
    for mode in ("cpu", "cuda"):
        assert "PGOLF_BUILD=none builds without" in refusal(checkout, PGOLF_BUILD=mode, PATH=path)


def test_unknown_values_are_refused(checkout):
    message = refusal(checkout, PGOLF_BUILD="gpu")
    assert message == "PGOLF_BUILD=gpu is unknown: choose one of auto cpu cuda none\n"


def test_nvcc_decides_not_a_gpu(checkout, fake):
    path, folder = fake
    output = build(checkout, PATH=path, CUDA_VISIBLE_DEVICES="")
    assert "for CPU and CUDA (sm_80 sm_90a compute_90): PGOLF_BUILD=auto and " in output
    ninja = next(checkout.glob("build/*/build.ninja")).read_text()
    for flag in (
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_90,code=compute_90",
        "-cudart=static",
    ):
        assert flag in ninja
    output = build(checkout, PATH=path, TORCH_CUDA_ARCH_LIST="8.9", PGOLF_CUDART="shared")
    assert "CUDA (sm_89)" in output and "leaky_relu2.cu.o" in compiled(output)
    assert "-cudart=shared" in next(checkout.glob("build/*/build.ninja")).read_text()
    assert "PGOLF_CUDART=dynamic" in refusal(checkout, PATH=path, PGOLF_CUDART="dynamic")
    (folder / "nvcc").unlink()
    assert "for CPU only: PGOLF_BUILD=auto and no nvcc" in build(checkout, PATH=path)
    assert "set CUDA_HOME, or build the CPU" in refusal(checkout, PATH=path, PGOLF_BUILD="cuda")
    program(folder / "toolkit" / "bin" / "nvcc", FAKE_COMPILER)
    assert "toolkit/bin/nvcc is there" in build(checkout, PATH=path, CUDA_HOME=f"{path}/toolkit")


def test_nvcc_that_cannot_compile(checkout, fake):
    path, folder = fake
    program(folder / "nvcc", "#!/bin/sh\necho 'unsupported GNU version!' >&2\nexit 1\n")
    output = build(checkout, PATH=path)
    assert "for CPU only: auto and " in output
    assert "cannot compile an empty file: unsupported GNU version!" in output
    message = refusal(checkout, PATH=path, PGOLF_BUILD="cuda")
    assert "unsupported GNU version!; set CUDA_HOME to a toolkit that fits" in message


def test_a_mistake_in_the_source_is_an_error(checkout, fake):
    path, folder = fake
    program(folder / "c++", "#!/bin/sh\necho 'error: expected ;' >&2\nexit 1\n")
    message = refusal(checkout, PATH=path)
    assert "the compiler failed, see above; PGOLF_BUILD=cpu builds without" in message
    assert "PGOLF_BUILD=none builds without" in refusal(checkout, PATH=path, PGOLF_BUILD="cpu")


def load_setup():
    spec = importlib.util.spec_from_file_location("pgolf_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("", "sm_80 sm_90a compute_90"),
        ("8.0;9.0a+PTX", "sm_80 sm_90a compute_90a"),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120"),
        ("9.0, 9.0", "sm_90"),
        ("10.0f", "sm_100f"),
    ],
)
def test_architectures(text, archs):
    assert " ".join(load_setup().parse_archs(text)) == archs


@pytest.mark.parametrize("text", ["Hopper", "9", "8.0;sm_90", "9.0b", ";"])
def test_wrong_architectures_are_named(text):
    with pytest.raises(SystemExit, match="is no architecture: write 8.0;9.0a"):
        load_setup().parse_archs(text)


# ---- the bare name


def test_triton_kernels_is_refused_under_its_bare_name():
    result = run([sys.executable, "-c", "import triton_kernels"], ROOT)
    assert result.returncode == 1
    assert "ImportError: this is pgolf's folder of Triton kernels" in result.stderr


def test_triton_kernels_from_the_checkout_without_installing(checkout, tmp_path):
    code = "import pgolf.triton_kernels as t; print(t.__file__)"
    assert python(code, checkout, tmp_path).startswith(str(checkout))
