"""What setup.py chooses, says and refuses, with stand-ins for the compilers."""

import re
import sys
import zipfile

import pytest

import pgolf
from pgolf import extension

from .checkout import FAKE_COMPILER, build, compiled, load_setup, program, refusal, run


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


def test_a_wheel_says_what_it_is_and_may_be_used_for(checkout, tmp_path):
    wheel = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", tmp_path]
    assert run(wheel, checkout, PGOLF_BUILD="none").returncode == 0
    (file,) = tmp_path.glob("pgolf-*.whl")
    with zipfile.ZipFile(file) as content:
        (name,) = (n for n in content.namelist() if n.endswith("/METADATA"))
        metadata = content.read(name).decode()
        assert [n for n in content.namelist() if n.endswith("licenses/LICENSE")]
    for line in (
        f"Version: {pgolf.__version__}",
        "License-Expression: MIT",
        "Author: the pgolf authors",
        "Project-URL: Parameter Golf, https://github.com/openai/parameter-golf",
    ):
        assert line in metadata.splitlines()


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


# An nvcc that takes g++-13 and no other compiler, and knows sm_80 and older.
PICKY_NVCC = """#!/bin/sh
case "$*" in
    --version) echo "fake release 1.0"; exit ;;
    *code=sm_90a*) echo "Unsupported gpu architecture" >&2; exit 1 ;;
    *-ccbin=g++-13* | *-ccbin=c++*) ;;
    *) echo "unsupported GNU version!" >&2; exit 1 ;;
esac
while [ $# -gt 0 ]; do
    [ "$1" = -o ] && object=$2
    [ "$1" = -MF ] && depfile=$2
    shift
done
: > "$object"
[ -z "${depfile:-}" ] || echo "$object:" > "$depfile"
"""


def test_nvcc_gets_the_compiler_too(checkout, fake):
    """Its flags as well, without what nvcc does not take before it."""
    path, folder = fake
    for name in ("g++-12", "ccache"):
        program(folder / name, FAKE_COMPILER)
    output = build(checkout, PATH=path, CXX="ccache g++-12 -m64 -fsanitize=a,b")
    assert "CPU and CUDA" in output
    ninja = next(checkout.glob("build/*/build.ninja")).read_text()
    nvcc, link = (
        next(rule for rule in ninja.split("rule ") if rule.startswith(f"{name}\n"))
        for name in ("nvcc", "link")
    )
    for rule in (nvcc, link):
        assert "-ccbin=g++-12 -Xcompiler=-m64 '-Xcompiler=-fsanitize=a\\,b'" in rule
    assert "ccache g++-12 -m64" in ninja
    for env in ({}, {"CXX": "g++-12", "NVCC_CCBIN": "g++-11"}):
        build(checkout, PATH=path, **env)
        assert "-ccbin" not in next(checkout.glob("build/*/build.ninja")).read_text(), env


def test_what_nvcc_refuses_is_said_with_what_would_work(checkout, fake):
    path, folder = fake
    for name in ("g++-12", "g++-13"):
        program(folder / name, FAKE_COMPILER)
    program(folder / "nvcc", PICKY_NVCC)
    env = {"PATH": path, "CXX": "g++-12", "TORCH_CUDA_ARCH_LIST": "8.0"}
    works = "unsupported GNU version!; this works: CXX=c++ PGOLF_BUILD=cuda pip install -v ."
    message = refusal(checkout, **env, PGOLF_BUILD="cuda")
    assert "nvcc -ccbin=g++-12 cannot compile an empty file: " + works in message
    output = build(checkout, **env)
    assert "for CPU only: auto and " in output and works in output
    (folder / "nvcc").write_text(PICKY_NVCC.replace(" | *-ccbin=c++*", ""))
    message = refusal(checkout, **env, PGOLF_BUILD="cuda")
    assert "this works: CXX=g++-13 PGOLF_BUILD=cuda" in message
    env = {"PATH": path, "CXX": "g++-13"}
    message = refusal(checkout, **env, PGOLF_BUILD="cuda")
    assert "Unsupported gpu architecture; this works: TORCH_CUDA_ARCH_LIST='8.0'" in message
    assert "for CPU and CUDA (sm_80)" in build(checkout, **env, TORCH_CUDA_ARCH_LIST="8.0")


def test_architectures_that_the_sources_do_not_support(checkout, fake):
    """Left out by auto, with a word; an error for who asked for CUDA."""
    path, _ = fake
    output = build(checkout, PATH=path, TORCH_CUDA_ARCH_LIST="7.5;8.0+PTX")
    said = "the kernels need sm_80, TORCH_CUDA_ARCH_LIST has sm_75 too"
    assert "for CPU and CUDA (sm_80 compute_80): PGOLF_BUILD=auto and " in output
    assert said in output
    assert "code=sm_75" not in next(checkout.glob("build/*/build.ninja")).read_text()
    output = build(checkout, PATH=path, TORCH_CUDA_ARCH_LIST="6.1;7.5")
    assert "for CPU only: PGOLF_BUILD=auto and the kernels need sm_80" in output
    env = {"PATH": path, "PGOLF_BUILD": "cuda"}
    message = refusal(checkout, **env, TORCH_CUDA_ARCH_LIST="7.5;8.0+PTX;9.0a")
    assert message == f"PGOLF_BUILD=cuda: {said}: write 8.0+PTX;9.0a\n"
    assert refusal(checkout, **env, TORCH_CUDA_ARCH_LIST="7.5").endswith("too: write 8.0\n")


def test_the_same_architectures_are_the_least_when_it_runs():
    major, minor = extension.LEAST_CAPABILITY
    assert load_setup().LEAST_ARCH == 10 * major + minor


def test_a_build_without_ninja_is_one_line(checkout, fake):
    """As `pip install --no-build-isolation` runs it, with none on PATH either."""
    path, folder = fake
    hidden = folder / "hidden"
    program(hidden / "sitecustomize.py", "import sys; sys.modules['ninja'] = None\n")
    message = refusal(checkout, PATH=path, PYTHONPATH=str(hidden))
    assert len(message.splitlines()) == 1
    assert "--no-build-isolation: pip install ninja; PGOLF_BUILD=none" in message


def test_a_long_build_says_how_long(checkout, fake):
    path, folder = fake
    for mode, what in (("cpu", "CPU only"), ("cuda", "CPU and CUDA")):
        first, *_ = build(checkout, PATH=path, PGOLF_BUILD=mode).splitlines()
        assert re.match(rf"pgolf: building pgolf._C for {what}.*; \d+ files, about \d+ ", first)
    assert "about" not in build(checkout, PATH=path, PGOLF_BUILD="cuda"), "nothing to compile"


def test_a_mistake_in_the_source_is_an_error(checkout, fake):
    path, folder = fake
    program(folder / "c++", "#!/bin/sh\necho 'error: expected ;' >&2\nexit 1\n")
    message = refusal(checkout, PATH=path)
    assert "the compiler failed, see above; PGOLF_BUILD=cpu builds without" in message
    assert "PGOLF_BUILD=none builds without" in refusal(checkout, PATH=path, PGOLF_BUILD="cpu")


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
