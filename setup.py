"""Builds pgolf._C, the C++ and CUDA half of the package, with ninja; the rest is in pyproject.toml.

The environment chooses:
  PGOLF_BUILD           auto (default): CPU kernels, and CUDA kernels if there is an nvcc;
                        cpu; cuda (an error if it cannot be done); none (pure Python)
  CXX                   the C++ compiler, nvcc's too; otherwise c++ or g++ on PATH, and nvcc's own
  CUDA_HOME             nvcc is $CUDA_HOME/bin/nvcc; otherwise the one on PATH
  NVCC_CCBIN            nvcc's C++ compiler, if it is not to be CXX
  TORCH_CUDA_ARCH_LIST  such as "8.0;9.0a+PTX"; otherwise sm_80, sm_90a and PTX for newer GPUs
  PGOLF_CUDART          static (default: the module also loads where there is no driver) or shared

Nothing here depends on torch, nor on whether a GPU is visible. Objects stay in build/, so that only
what changed is compiled again. `python setup.py build_ext --inplace` builds into the checkout.
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = Path("csrc")  # relative to ROOT, like every path in the ninja file
# One folder an interpreter, shared by wheels, editable installs and build_ext.
OBJECTS = Path("build") / f"ninja-{sysconfig.get_config_var('SOABI')}"
MODULE = "pgolf._C"

# PTX of compute_90, not of compute_90a, because the latter runs on no GPU but the H100's kind.
DEFAULT_ARCHS = ["sm_80", "sm_90a", "compute_90"]
LEAST_ARCH = 80  # bf16 arithmetic; pgolf/extension.py has it too
# What may stand before the compiler in CXX, which nvcc does not take.
LAUNCHERS = {"ccache", "sccache", "distcc", "icecc"}
# Tried where nvcc refuses the one that it was given.
HOST_COMPILERS = ["g++", "c++", *(f"g++-{n}" for n in range(16, 8, -1)), "clang++"]
# No product and sum become one operation, so that all instruction sets round alike. The other two
# only let go of errno and of floating-point traps, which nothing here reads.
MATH_FLAGS = "-ffp-contract=off -fno-math-errno -fno-trapping-math".split()
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra".split() + MATH_FLAGS
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall".split()
# The static libraries' symbols stay inside: torch brings a CUDA runtime of its own.
LINK_FLAGS = ["-shared", "-lpthread", "-Xlinker", "--exclude-libs=ALL"]

# csrc/cpu is compiled once for each instruction set, best first; csrc/host/isa.cpp chooses one when
# the module runs. Nothing here depends on which of them the machine that builds has.
CPU_SOURCES = SOURCES / "cpu"
X86_ISAS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
    "avx2": "-mavx2",
    "plain": "",
}
ISAS = X86_ISAS if platform.machine() == "x86_64" else {"plain": ""}
# What a file takes of a core of 2.5 GHz, on average: for what is said before a long build.
SECONDS = {"cxx": 0.7, **dict.fromkeys(ISAS, 0.8), "nvcc": 7.8, "link": 1.0}


@dataclass(frozen=True)
class Plan:
    """What will be built, and why."""

    reason: str
    mode: str = "none"
    cxx: tuple[str, ...] = ()  # a command, such as ('ccache', 'g++'); empty: no extension
    nvcc: str = ""  # empty: no CUDA kernels
    archs: tuple[str, ...] = ()
    cudart: str = ""
    host: tuple[str, ...] = ()  # nvcc's flags for its C++ compiler

    def __str__(self) -> str:
        if not self.cxx:
            return f"no {MODULE}, pure Python only: {self.reason}"
        what = f"CPU and CUDA ({' '.join(self.archs)})" if self.nvcc else "CPU only"
        return f"{MODULE} for {what}: {self.reason}"


def choice(env: Mapping[str, str], name: str, allowed: str) -> str:
    """The value of an environment variable which has to be one of `allowed`; first is default."""
    value = env.get(name) or allowed.split()[0]
    if value not in allowed.split():
        raise SystemExit(f"{name}={value} is unknown: choose one of {allowed}")
    return value


def parse_archs(text: str) -> tuple[str, ...]:
    """'8.0;9.0a+PTX' -> ('sm_80', 'sm_90a', 'compute_90a'); the default for an empty text."""
    archs = []
    for item in re.split(r"[;,\s]+", text.strip()) if text.strip() else ():
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not match:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST={text}: {item!r} is no architecture: write 8.0;9.0a+PTX"
            )
        major, minor, variant, ptx = match.groups()
        archs += [f"sm_{major}{minor}{variant}"] + [f"compute_{major}{minor}{variant}"] * bool(ptx)
    return tuple(dict.fromkeys(archs or DEFAULT_ARCHS))


def arch_list(archs: tuple[str, ...]) -> str:
    """What gives `archs`: '8.0;9.0+PTX' for ('sm_80', 'sm_90', 'compute_90')."""
    codes = [(a, re.fullmatch(r"sm_(\d+)(\d[af]?)", a)) for a in archs if a.startswith("sm_")]
    ptx = {a for a, _ in codes if a.replace("sm_", "compute_") in archs}
    return ";".join(f"{match[1]}.{match[2]}" + "+PTX" * (a in ptx) for a, match in codes)


def find_cxx(env: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    """The C++ compiler, or what is missing for one: (command, '') or ((), complaint)."""
    if wanted := env.get("CXX"):
        cxx = tuple(shlex.split(wanted))
        if not shutil.which(cxx[0], path=env.get("PATH")):
            return (), f"the C++ compiler CXX={wanted} is not there"
    else:
        cxx = tuple(c for c in ("c++", "g++") if shutil.which(c, path=env.get("PATH")))[:1]
        if not cxx:
            return (), "no C++ compiler on PATH (apt-get install g++, or set CXX)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return (), "no Python.h (apt-get install python3-dev)"
    return cxx, ""


def find_nvcc(env: Mapping[str, str]) -> str:
    """The path of nvcc, or ''."""
    if home := env.get("CUDA_HOME"):
        if nvcc := shutil.which(str(Path(home) / "bin" / "nvcc")):
            return nvcc
    return shutil.which("nvcc", path=env.get("PATH")) or ""


def host_flags(env: Mapping[str, str], cxx: tuple[str, ...]) -> tuple[str, ...]:
    """nvcc's flags for the C++ compiler that CXX names, with its own flags; () if it names none."""
    if not env.get("CXX") or env.get("NVCC_CCBIN"):
        return ()
    launched = len(cxx) > 1 and Path(cxx[0]).name in LAUNCHERS
    compiler, *flags = cxx[launched:]
    # A comma would part a flag in two.
    return (f"-ccbin={compiler}", *("-Xcompiler=" + flag.replace(",", "\\,") for flag in flags))


def plan_cuda(env: Mapping[str, str], plan: Plan, nvcc: str) -> Plan:
    """A plan for the CPU with CUDA kernels added, as far as the sources support what is asked."""
    archs = parse_archs(env.get("TORCH_CUDA_ARCH_LIST", ""))
    old = tuple(arch for arch in archs if int(re.search(r"\d+", arch)[0]) < LEAST_ARCH)
    kept = tuple(arch for arch in archs if arch not in old)
    reason, said = f"{plan.reason} and {nvcc} is there", ""
    if old:
        said = f"the kernels need sm_{LEAST_ARCH}, TORCH_CUDA_ARCH_LIST has {' '.join(old)} too"
    if old and plan.mode == "cuda":
        raise SystemExit(f"{plan.reason}: {said}: write {arch_list(kept) or '8.0'}")
    if not kept:
        return replace(plan, reason=f"{plan.reason} and {said}")
    cudart = choice(env, "PGOLF_CUDART", "static shared")
    reason += f"; {said}" if said else ""
    return replace(
        plan, reason=reason, nvcc=nvcc, archs=kept, cudart=cudart, host=host_flags(env, plan.cxx)
    )


def make_plan(env: Mapping[str, str]) -> Plan:
    """Decide what to build from the environment; SystemExit with the remedy if that cannot be."""
    mode = choice(env, "PGOLF_BUILD", "auto cpu cuda none")
    reason = f"PGOLF_BUILD={mode}"
    if mode == "none":
        return Plan(reason)
    cxx, complaint = find_cxx(env)
    if complaint and mode == "auto":
        return Plan(f"{reason} and {complaint}")
    if complaint:
        raise SystemExit(f"{reason}: {complaint}; PGOLF_BUILD=none builds without")
    if mode == "cpu":
        return Plan(reason, mode, cxx)
    if nvcc := find_nvcc(env):
        return plan_cuda(env, Plan(reason, mode, cxx), nvcc)
    if mode == "auto":
        return Plan(f"{reason} and no nvcc in $CUDA_HOME/bin or on PATH", mode, cxx)
    raise SystemExit(
        f"{reason}: no nvcc in $CUDA_HOME/bin or on PATH; install the CUDA toolkit and set "
        "CUDA_HOME, or build the CPU kernels only with PGOLF_BUILD=cpu"
    )


def gencode(archs: tuple[str, ...]) -> list[str]:
    """nvcc's flags for ('sm_80', 'compute_90'): machine code for the first, PTX for the second."""
    return [f"-gencode=arch={a.replace('sm_', 'compute_')},code={a}" for a in archs]


def version_of(command: tuple[str, ...], pattern: str) -> str:
    """The first line of `command --version` that matches `pattern`, or the command itself."""
    lines = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    matching = (line for line in lines.splitlines() if re.search(pattern, line))
    return next(matching, shlex.join(command))


def write_if_changed(path: Path, text: str) -> None:
    """Keep the old time stamp where nothing changed, so that ninja has nothing to do."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def write_build_info(plan: Plan) -> None:
    """The headers behind `pgolf._C.build_info()`."""
    values = {
        "COMPILER": version_of(plan.cxx, "."),
        "NVCC": version_of((plan.nvcc,), "release") if plan.nvcc else "",
        "CUDART": plan.cudart,
        "ARCHS": " ".join(plan.archs),
    }
    # A JSON string without \u escapes is a C string.
    reason = json.dumps(plan.reason, ensure_ascii=False)
    # By itself, because it differs between ways to get the same objects.
    write_if_changed(OBJECTS / "build_reason.h", f"#define PGOLF_REASON {reason}\n")
    lines = [f"#define PGOLF_{k} {json.dumps(v, ensure_ascii=False)}" for k, v in values.items()]
    lines.append(f"#define PGOLF_CUDA {int(bool(plan.nvcc))}")
    lines.append(f"#define PGOLF_EACH_ISA(F) {' '.join(f'F({isa})' for isa in ISAS)}")
    write_if_changed(OBJECTS / "build_info.h", "\n".join(lines) + "\n")


def ninja_text(plan: Plan) -> str:
    """The ninja file: a rule a compiler and instruction set, a line an object, and the link."""

    def command(*parts: str) -> str:
        return shlex.join(parts).replace("$", "$$")

    includes = [f"-I{SOURCES}", f"-I{OBJECTS}"]
    cxx_includes = ["-isystem", sysconfig.get_path("include")]
    cxx_command = command(*plan.cxx, *CXX_FLAGS, *includes, *cxx_includes)
    nvcc_command = command(plan.nvcc, *plan.host, *NVCC_FLAGS, *gencode(plan.archs), *includes)
    # nvcc knows where its runtime lies; nothing here calls device code of another file.
    runtime = [f"-cudart={plan.cudart}", "-nodlink"]
    linker = [plan.nvcc, *plan.host, *runtime] if plan.nvcc else plan.cxx
    compile_one = "-MMD -MF $out.d -c $in -o $out"
    rules = {
        "cxx": f"{cxx_command} {compile_one}",
        **{isa: f"{cxx_command} {f} -DPGOLF_ISA={isa} {compile_one}" for isa, f in ISAS.items()},
        "nvcc": f"{nvcc_command} {compile_one}",
        "link": f"{command(*linker)} $in {command(*LINK_FLAGS)} -o $out",
    }
    lines = [f"builddir = {OBJECTS}"]
    for name, line in rules.items():
        lines += [f"rule {name}", f"  command = {line}", f"  description = {name} $out"]
        lines += ["  depfile = $out.d", "  deps = gcc"] * (name != "link")
    objects = []
    for source in sorted(SOURCES.rglob("*")):
        name = source.relative_to(SOURCES)
        if source.suffix == ".cpp" and source.parent == CPU_SOURCES:
            outputs = {f"{OBJECTS}/{name}.{isa}.o": isa for isa in ISAS}
        elif source.suffix == ".cpp":
            outputs = {f"{OBJECTS}/{name}.o": "cxx"}
        elif source.suffix == ".cu" and plan.nvcc:
            outputs = {f"{OBJECTS}/{name}.o": "nvcc"}
        else:
            continue
        lines += [f"build {output}: {rule} {source}" for output, rule in outputs.items()]
        objects += outputs
    lines.append(f"build {OBJECTS}/_C.so: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def find_ninja() -> str:
    """The path of ninja; SystemExit with the remedy if it is not there."""
    program = shutil.which("ninja")
    if importlib.util.find_spec("ninja"):
        import ninja

        program = shutil.which("ninja", path=ninja.BIN_DIR) or program
    if program is None:
        raise SystemExit(
            "pgolf: the build needs ninja, which pip brings unless it is told "
            f"--no-build-isolation: pip install ninja; PGOLF_BUILD=none builds without {MODULE}"
        )
    return program


def estimate(plan: Plan, ninja: list[str]) -> str:
    """What will be compiled and about how long it takes; '' if that is nothing or quick."""
    lines = subprocess.run([*ninja, "-n"], capture_output=True, text=True).stdout.splitlines()
    rules = [line.split()[1] for line in lines if line.startswith("[")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    seconds = sum(SECONDS[rule] for rule in rules) / (cores or 1)
    if seconds < 5:
        return ""
    files = len(rules) - rules.count("link")
    time = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    return f"pgolf: building {plan}; {files} files, about {time} on {cores} cores"


def run_ninja(plan: Plan) -> Path:
    """Compile what changed; the path of the module. CalledProcessError if a compiler failed."""
    program = find_ninja()

    write_build_info(plan)
    write_if_changed(OBJECTS / "build.ninja", ninja_text(plan))
    command = [program, "-f", str(OBJECTS / "build.ninja")]
    if said := estimate(plan, command):
        print(said, flush=True)
    subprocess.run(command, check=True)
    return OBJECTS / "_C.so"


def nvcc_complaint(plan: Plan) -> str:
    """Why nvcc cannot compile even an empty file for the plan's architectures, or ''."""
    empty = OBJECTS / "empty.cu"
    empty.write_text("")
    command = [plan.nvcc, *plan.host, *NVCC_FLAGS, *gencode(plan.archs)]
    command += ["-c", str(empty), "-o", f"{empty}.o"]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = (result.stderr + result.stdout).strip().splitlines() or ["no message"]
    return lines[0] if result.returncode else ""


def working_settings(plan: Plan) -> str:
    """What to set for nvcc to compile an empty file, where the plan's does not; '' if unknown."""
    for name in filter(shutil.which, HOST_COMPILERS):
        if not nvcc_complaint(replace(plan, host=(f"-ccbin={name}",))):
            return f"CXX={name}"
    known = tuple(a for a in plan.archs if not nvcc_complaint(replace(plan, archs=(a,))))
    return f"TORCH_CUDA_ARCH_LIST='{arch_list(known)}'" if arch_list(known) else ""


class BuildEverything(build):
    """Build from an empty folder, so that a wheel never holds what an older tree left there."""

    # build_ext runs even where it has nothing to build: it says why.
    sub_commands = [(n, None if n == "build_ext" else when) for n, when in build.sub_commands]

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class NinjaBuild(build_ext):
    """setuptools' build_ext with ninja in place of its compilers."""

    def run(self):
        if not self.extensions:
            if self.inplace:  # an old module would contradict what is said here
                for old in ROOT.glob("pgolf/_C.*.so"):
                    old.unlink()
            print(f"pgolf: built {make_plan(os.environ)}", flush=True)
        super().run()

    def build_extension(self, ext):
        plan = make_plan(os.environ)
        try:
            module = run_ninja(plan)
        except subprocess.CalledProcessError:
            complaint = nvcc_complaint(plan) if plan.nvcc else ""
            if not complaint:
                raise SystemExit(
                    f"PGOLF_BUILD={plan.mode}: the compiler failed, see above; "
                    f"PGOLF_BUILD={'cpu' if plan.nvcc else 'none'} builds without"
                ) from None
            with_host = " ".join([plan.nvcc, *plan.host])
            settings = working_settings(plan)
            complaint = f"{with_host} cannot compile an empty file: {complaint}; " + (
                f"this works: {settings} PGOLF_BUILD=cuda pip install -v ."
                if settings
                else "set CUDA_HOME to a toolkit that fits the C++ compiler, or "
                "TORCH_CUDA_ARCH_LIST to architectures that it knows"
            )
            if plan.mode == "cuda":
                raise SystemExit(f"PGOLF_BUILD=cuda: {complaint}") from None
            plan = replace(
                plan, nvcc="", archs=(), cudart="", host=(), reason=f"auto and {complaint}"
            )
            module = run_ninja(plan)
        print(f"pgolf: built {plan}", flush=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(module, target)


if __name__ == "__main__":
    os.chdir(ROOT)
    # (In the checkout, pgolf/triton_kernels is a link, for running without installing.)
    packages = {*find_packages(include=["pgolf", "pgolf.*"]), "pgolf.triton_kernels"}
    setup(
        packages=sorted(packages),
        package_dir={"pgolf.triton_kernels": "triton_kernels"},
        package_data={
            "pgolf": ["py.typed"],  # type checkers read the annotations
            "pgolf.ops": ["timed.json"],  # where somebody has timed a GPU
            "pgolf.triton_kernels": ["configs.json"],
            "pgolf.submission": ["inside/*.py"],  # read as text, not imported
        },
        ext_modules=[Extension(MODULE, sources=[])] if make_plan(os.environ).cxx else [],
        cmdclass={"build": BuildEverything, "build_ext": NinjaBuild},
    )
