"""`python -m bench bundle`: what a machine without a network needs besides a checkout and torch."""

import argparse
import hashlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from pgolf.errors import ConfigError, PgolfError
from pgolf.files import atomic_folder, atomic_write, sha256_of

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "build" / "bundle"  # which git ignores
SOURCES = "sources.sha256"  # of which its extension is made
# What of pgolf's libraries machines with torch tend not to have; none of them needs another.
LIBRARIES = ("zstandard>=0.22", "brotli>=1.2", "python-minifier>=2.11")
# Older than what any machine with a GPU has; manylinux names that pip does not derive.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
BUILD_TOOLS = ("setuptools>=77", "wheel", "ninja")

DESCRIPTION = f"""\
Put into build/bundle what `python -m bench gpu` cannot fetch on a machine without a network: in
site/ {", ".join(name.partition(">")[0] for name in LIBRARIES)}, for the Python that is there, and
in pgolf/ the extension, built for it and for one generation of GPUs. An interpreter of that version
has to be here, with its headers, and nvcc; this machine needs a network and no GPU.
"""
EPILOG = """\
Copy the checkout with build/bundle to the other machine; `python3 -m bench gpu` finds it there,
and uses its extension if csrc/ and setup.py have not changed since.
Exit code: 0 done, 2 something could not be fetched or built; an older bundle then stays as it was.

examples:
  python -m bench bundle --python python3.12
  python -m bench bundle --python python3.12 --arch 10.0a
  python -m bench bundle --no-extension      the other machine compiles it, which takes a minute
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench bundle", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--python", default=sys.executable, metavar="PROGRAM",
                        help="an interpreter as the other machine has it (this one)")  # fmt: skip
    parser.add_argument("--arch", default="9.0a", metavar="N.N",
                        help="as TORCH_CUDA_ARCH_LIST has it (9.0a: H100, H200)")  # fmt: skip
    parser.add_argument("--no-extension", action="store_true")
    args = parser.parse_args(argv)
    try:
        with atomic_folder(BUNDLE) as folder:
            version = _libraries(args.python, folder / "site")
            if not args.no_extension:
                atomic_write(folder / SOURCES, sources())  # before they may change
                _extension(args.python, args.arch, folder / "pgolf")
    except PgolfError as e:
        print(f"python -m bench bundle: {e}", file=sys.stderr)
        return e.exit_code
    size = sum(file.stat().st_size for file in BUNDLE.rglob("*") if file.is_file())
    print(f"{BUNDLE}: {size / 1e6:.0f} MB, for Python {version}")
    return 0


def _libraries(python: str, site: Path) -> str:
    """Install the libraries for an interpreter; returns its version."""
    version = _checked(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        f"--python {python}", "name an interpreter that is here",
    ).strip()  # fmt: skip
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    _checked(
        [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps",
         "--only-binary=:all:", "--implementation", "cp", "--python-version", version, *platforms,
         "--target", str(site), *LIBRARIES],
        f"the libraries for Python {version}", "see what pip says above",
    )  # fmt: skip
    return version


def _extension(python: str, arch: str, folder: Path) -> None:
    """Build pgolf._C with that interpreter, in an environment of its own, which has no torch."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        _checked([python, "-m", "venv", str(place / "venv")],
                 f"an environment of {python}", "install its module venv")  # fmt: skip
        own = str(place / "venv" / "bin" / "python")
        _checked([own, "-m", "pip", "install", "-q", "--disable-pip-version-check", *BUILD_TOOLS],
                 "the tools that build", "see what pip says above")  # fmt: skip
        _checked(
            ["env", "PGOLF_BUILD=cuda", f"TORCH_CUDA_ARCH_LIST={arch}", own, "setup.py", "-q",
             "build_ext", "--build-lib", str(place / "lib"), "--build-temp", str(place / "temp")],
            "the extension", "see what setup.py says above, or leave it out with --no-extension",
        )  # fmt: skip
        shutil.copytree(place / "lib" / "pgolf", folder)


def _checked(command: list[str], what: str, remedy: str) -> str:
    """What a command prints.

    Raises:
        ConfigError: it fails.
    """
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    except OSError as e:
        raise ConfigError(f"{what}: {e}: {remedy}") from e
    if done.returncode:
        raise ConfigError(f"{what}: `{' '.join(command[:4])} ...` ended with "
                          f"{done.returncode}: {remedy}")  # fmt: skip
    return done.stdout


def sources(root: Path = ROOT) -> str:
    """Hex sha256 of what a checkout's extension is made of: names and contents."""
    files = [root / "setup.py", *(file for file in (root / "csrc").rglob("*") if file.is_file())]
    lines = sorted(f"{file.relative_to(root)} {sha256_of(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def adopt(bundle: Path, root: Path = ROOT) -> bool | None:
    """Put a bundle's extension into a checkout, if it is for this Python and of its sources.

    Contents decide and no times, which a copied checkout has anew.

    Returns:
        Whether the checkout's extension is of its sources; None if it is not the bundle's.
    """
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    brought, here, stated = bundle / "pgolf" / name, root / "pgolf" / name, bundle / SOURCES
    if not brought.is_file():
        return None
    fits = stated.is_file() and stated.read_text(encoding="utf-8") == sources(root)
    same = here.is_file() and sha256_of(here) == sha256_of(brought)
    if not fits:
        print(f"{brought} is of other sources: run `python -m bench bundle` again", flush=True)
    elif not same:
        atomic_write(here, brought.read_bytes())
        print(f"{here} is from {bundle}", flush=True)
    return fits if fits or same else None
