"""What `make prove` leaves out, and what it runs again."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from .build import test_sanitizer
from .mutation import test_kernels
from .proofs import ROOT, STAMP, Proofs
from .ptx import test_emitted

VERSIONS = {"torch": "2", "nvcc": "13"}


@pytest.fixture(scope="module")
def proved(tmp_path_factory) -> Path:
    """A checkout in which everything is proved."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("csrc", "triton_kernels", "tests", "bench", "pgolf/ops"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "setup.py", folder)
    (folder / STAMP).unlink(missing_ok=True)
    assert prove(folder) == everything(folder)
    return folder


@pytest.fixture
def root(proved, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(proved, tmp_path / "checkout")


def items(root: Path) -> Iterator[SimpleNamespace]:
    """The proofs of kernels, as pytest collects them."""
    for module in (test_kernels, test_emitted, test_sanitizer):
        for name, function in vars(module).items():
            if name.startswith("test_") and "proves" in {m.name for m in marks_of(function)}:
                yield from items_of(module, name, root)


def marks_of(function: object) -> list[pytest.Mark]:
    return getattr(function, "pytestmark", [])


def items_of(module: ModuleType, name: str, root: Path) -> Iterator[SimpleNamespace]:
    marks = {mark.name: mark for mark in marks_of(getattr(module, name))}
    parameters = marks["parametrize"].args[1] if "parametrize" in marks else [None]
    file = Path(module.__file__).relative_to(ROOT)
    for parameter in parameters:
        of_parameter = [decorator.mark for decorator in getattr(parameter, "marks", ())]
        own = [marks["proves"], *of_parameter]
        values = getattr(parameter, "values", parameter)
        item = SimpleNamespace(
            nodeid=f"{file}::{name}[{getattr(parameter, 'id', None) or values}]", path=root / file,
            iter_markers=lambda _, own=own: own, user_properties=[], added=[],
        )  # fmt: skip
        item.add_marker = item.added.append
        yield item


def everything(root: Path) -> set[str]:
    return {item.nodeid for item in items(root)}


def prove(root: Path, mode: str = "changed", versions=VERSIONS, failed: str = "") -> set[str]:
    """What ran in a session in which all passes but one test."""
    proofs, ran = Proofs(mode, root, lambda: versions), set()
    collected = list(items(root))
    proofs.pytest_collection_modifyitems(collected)
    for item in collected:
        if item.added:
            report(proofs, item, "setup", "skipped")
        else:
            ran.add(item.nodeid)
            report(proofs, item, "call", "failed" if item.nodeid == failed else "passed")
    return ran


def report(proofs: Proofs, item: SimpleNamespace, when: str, outcome: str) -> None:
    proofs.pytest_runtest_logreport(
        pytest.TestReport(
            item.nodeid, ("", 0, ""), {}, outcome, None, when, user_properties=item.user_properties
        )
    )


def touch(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n")


def test_nothing_changed(root):
    before = (root / STAMP).read_bytes()
    assert prove(root) == set() and (root / STAMP).read_bytes() == before
    (item, *_) = collected = list(items(root))
    Proofs("changed", root, lambda: VERSIONS).pytest_collection_modifyitems(collected)
    assert [m.kwargs["reason"] for m in item.added] == ["unchanged since tests/proved.json"]
    assert prove(root, "all") == everything(root)


@pytest.mark.parametrize(
    ("file", "proofs"),
    [
        (
            "csrc/cuda/xsa.cu",
            r"\[xsa\.cu\]|nvcc.*\('xsa',|quotients|\('nvcc', 'xsa |emulated_kernels_are_clean",
        ),
        ("triton_kernels/newton_schulz.py", r"\[newton_schulz\]|\('newton_schulz',\)"),
        ("csrc/cpu/xsa.cpp", "sanitizer.*::test_(kernels|operators|an_access)"),
    ],
)
def test_one_byte_of_one_kernel(root, file, proofs):
    touch(root / file)
    ran = prove(root)
    assert ran == {n for n in everything(root) if re.search(proofs, n)} and len(ran) > 1
    assert prove(root) == set()


def test_a_header_is_part_of_those_that_include_it(root):
    touch(root / "csrc" / "parts.h")
    in_parts = ("qk_rope", "residual_norm", "scaled_copies")
    changed = {n for n in prove(root) if "mutation" in n}
    name = "tests/mutation/test_kernels.py::test_changed_kernels_are_noticed[{}.cu]"
    assert changed == {name.format(kernel) for kernel in in_parts}


def test_a_changed_harness_runs_all_of_its_proofs(root):
    touch(root / "tests" / "mutation" / "runner.py")
    assert prove(root) == {n for n in everything(root) if "/mutation/" in n or "/ptx/" in n}
    touch(root / "tests" / "simt" / "machine.h")
    ran = prove(root)
    assert {n for n in ran if "/mutation/" in n} == {n for n in everything(root) if ".cu]" in n}
    touch(root / "tests" / "simt" / "emulator.py")
    assert prove(root) == everything(root)


def test_a_changed_rule_runs_what_is_judged_by_it(root):
    """CUDA kernels; those of Triton are judged by their own tests."""
    touch(root / "pgolf" / "ops" / "testing.py")
    judged = {n for n in everything(root) if "/mutation/" in n and n.endswith(".cu]")}
    assert judged and judged <= prove(root)


def test_a_changed_test_of_a_triton_kernel_proves_no_other_again(root):
    touch(root / "tests" / "triton" / "test_linear_residual.py")
    mutants = {n for n in prove(root) if "/mutation/" in n}
    assert [n.partition("[")[2] for n in mutants] == ["linear_residual]"]


@pytest.mark.parametrize("name", VERSIONS)
def test_another_torch_or_compiler_runs_all(root, name):
    other = VERSIONS | {name: "other"}
    assert prove(root, versions=other) == everything(root)
    assert prove(root, versions=other) == set()


def test_a_failure_takes_no_other_proof_away(root):
    touch(root / "csrc" / "cuda" / "xsa.cu")
    touch(root / "csrc" / "cuda" / "qk_rope.cu")
    failed = "tests/mutation/test_kernels.py::test_changed_kernels_are_noticed[xsa.cu]"
    assert len(prove(root, failed=failed)) > 1
    assert failed not in json.loads((root / STAMP).read_text())["proofs"]
    assert prove(root) == {failed}
    assert prove(root, "all", failed=failed) == everything(root)
    assert prove(root) == {failed}
    assert prove(root) == set()


def test_what_was_proved_before_a_run_is_ended_is_kept(root):
    (root / STAMP).unlink()
    proofs, (one, *others) = Proofs("all", root, lambda: VERSIONS), items(root)
    proofs.pytest_collection_modifyitems([one, *others])
    report(proofs, one, "setup", "passed")
    assert not (root / STAMP).exists()  # nothing is proved by that
    report(proofs, one, "call", "passed")
    assert prove(root) == {item.nodeid for item in others}


def test_what_could_not_run_is_not_proved(root):
    """For want of a compiler, for example; neither is what fails in its fixtures."""
    (root / STAMP).unlink()
    proofs, (one, *others) = Proofs("all", root, lambda: VERSIONS), items(root)
    proofs.pytest_collection_modifyitems([one, *others])
    for item in others:
        report(proofs, item, "call", "passed")
    report(proofs, one, "setup", "skipped")
    report(proofs, others[0], "teardown", "failed")
    assert prove(root) == {one.nodeid, others[0].nodeid}


def test_a_worker_writes_nothing(root):
    (root / STAMP).unlink()
    proofs, (one, *_) = Proofs("all", root, lambda: VERSIONS, writes=False), items(root)
    proofs.pytest_collection_modifyitems([one])
    report(proofs, one, "call", "passed")
    assert not (root / STAMP).exists()


def test_a_source_that_is_not_there_is_an_error(root):
    (root / "csrc" / "cuda" / "xsa.cu").unlink()
    with pytest.raises(pytest.UsageError, match=r"csrc/cuda/xsa\.cu, which is not there"):
        prove(root)
