"""Finding pgolf._C, or saying why it is not there; and the doctor, which reports it."""

import ctypes
import shutil
import subprocess
import sys
import sysconfig
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch

import pgolf
from pgolf import extension
from pgolf.cli import doctor
from pgolf.errors import ConfigError
from pgolf.ops.choose import choose

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An empty folder in the place of pgolf's, where a test may put a module."""
    monkeypatch.setattr(pgolf, "__path__", [str(tmp_path)])
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    monkeypatch.delitem(sys.modules, "pgolf._C", raising=False)
    # An editable install has a finder of its own, which would find the real module.
    finders = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
    monkeypatch.setattr(sys, "meta_path", finders)
    extension._attempt.cache_clear()
    yield tmp_path
    extension._attempt.cache_clear()


def test_not_built(package):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extension.load() is None
    assert extension.why_missing().startswith(f"pgolf._C was not built in {package}: rebuild with")
    assert dict(doctor.rows())["extension"].startswith("none: pgolf._C was not built")


def test_built_but_broken_is_announced(package):
    (package / f"_C{SUFFIX}").write_bytes(b"no shared object")
    with pytest.warns(UserWarning, match="slower reference forms"):
        assert extension.load() is None
    assert "pgolf._C is there and does not load: " in dict(doctor.rows())["extension"]


def test_built_for_another_python(package):
    (package / "_C.cpython-27-pdp11.so").touch()
    with pytest.warns(UserWarning, match="another Python"):
        assert extension.load() is None
    assert "built for another Python (_C.cpython-27-pdp11.so)" in extension.why_missing()


def test_present():
    if extension.load() is None:
        pytest.skip(extension.why_missing())
    assert extension.why_missing() == ""
    reason = extension.load().build_info()["reason"]
    assert f"because {reason}" in dict(doctor.rows())["extension"]


def test_doctor_reports_every_subject(capsys):
    assert doctor.main([]) == 0
    subjects = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert subjects == [subject for subject, _ in doctor.rows()]
    for subject in ("python", "torch", "triton", "nvcc", "GPU", "CPU flags", "attention"):
        assert subject in subjects
    with pytest.raises(ConfigError, match="now: pgolf doctor does not take this"):
        doctor.main(["now"])


@pytest.mark.parametrize("release", ["2.8.0+cu128", "2.10.0", "3.9.1"])
def test_doctor_warns_of_a_torch_that_was_not_tested(release, monkeypatch):
    monkeypatch.setattr(torch, "__version__", release)
    line = dict(doctor.rows())["torch"]
    assert line.startswith(f"{release}, WARNING: not tested") and "2.9.1, 2.11.0" in line


@pytest.mark.parametrize("release", [*doctor.TESTED, "2.9.0+cu128"])
def test_doctor_takes_every_release_of_a_series_that_was_tested(release, monkeypatch):
    monkeypatch.setattr(torch, "__version__", release)
    assert dict(doctor.rows())["torch"] == release


@pytest.mark.parametrize(("gpu", "on"), [(True, True), (True, False), (False, True)])
def test_doctor_names_a_setting_of_torch_that_does_harm(gpu, on, monkeypatch):
    config = SimpleNamespace(triton=SimpleNamespace(mix_order_reduction=on))
    monkeypatch.setitem(sys.modules, "torch._inductor.config", config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    line = doctor._torch_settings()
    assert ("mix_order_reduction is on" in line) == ("WARNING" in line) == (gpu and on)


# ---- a GPU that the build has no code for


@pytest.mark.parametrize(
    ("arch", "runs_on", "not_on"),
    [
        ("sm_80", "8.0 8.6 8.9", "7.5 9.0"),
        ("sm_86", "8.6 8.9", "8.0 9.0"),
        ("sm_90a", "9.0", "8.9 10.0 12.0"),
        ("sm_100f", "10.0 10.3", "9.0 11.0 12.0"),
        ("compute_90", "9.0 10.0 12.1", "8.9"),
        ("compute_90a", "9.0", "10.0"),
        ("compute_100f", "10.0 10.3", "12.0"),
    ],
)
def test_which_gpus_run_which_code(arch: str, runs_on: str, not_on: str) -> None:
    for gpus, expected in ((runs_on, True), (not_on, False)):
        for gpu in gpus.split():
            capability = tuple(map(int, gpu.split(".")))
            assert extension.serves(arch, capability) is expected, (arch, gpu)


def test_the_version_of_the_driver_is_asked_of_it(tmp_path, monkeypatch):
    """Of a stand-in, as there may be none; what cannot be asked is no complaint."""
    (tmp_path / "libcuda.c").write_text(
        "int cuDriverGetVersion(int *version) { *version = 12080; return 0; }\n"
    )
    library = tmp_path / "libcuda.so.1"
    compiler = shutil.which("cc") or pytest.skip("no C compiler on PATH")
    command = [compiler, "-shared", "-fPIC", str(tmp_path / "libcuda.c"), "-o", str(library)]
    subprocess.run(command, check=True)
    real = ctypes.CDLL
    for file, version in ((library, 12080), (tmp_path / "nothing", 0)):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, file=file: real(str(file)))
        assert extension.driver_cuda() == version


@pytest.fixture
def gpu(monkeypatch):
    """A GPU and an extension of made-up versions."""

    def make(archs: str, capability: tuple[int, int], driver: int = 13000) -> None:
        info = dict(cuda=True, cudart="static", nvcc="release 13.0, V13.0.88", archs=archs.split())
        kernels = {f"{n}_cuda": None for n in ("residual_norm", "residual_norm_backward")}
        module = ModuleType("pgolf._C")
        info |= {"compiler": "g++", "reason": "it was asked"}
        vars(module).update(kernels, build_info=lambda: info)
        monkeypatch.delenv(extension.CUDA_VARIABLE, raising=False)
        monkeypatch.setattr(extension, "load", lambda: module)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *i: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *i: capability)
        monkeypatch.setattr(extension, "driver_cuda", lambda: driver)
        choose.cache_clear()

    yield make
    choose.cache_clear()


@pytest.mark.parametrize(
    ("archs", "capability", "driver", "why"),
    [
        ("sm_80", (9, 0), 13000, "CUDA code for sm_80, and this GPU is sm_90: TORCH_CUDA_ARCH_LIST="
         "9.0 PGOLF_BUILD=cuda pip install -v ."),
        ("sm_80 sm_90a", (12, 0), 13000, "this GPU is sm_120: TORCH_CUDA_ARCH_LIST=12.0"),
        ("sm_80 compute_80", (7, 5), 13000, "needs sm_80, this GPU is sm_75"),
        ("sm_90a", (9, 0), 12080, "this build is of CUDA 13, and the driver supports CUDA 12"),
    ],
)  # fmt: skip
def test_auto_takes_no_kernels_without_code_for_the_gpu(gpu, archs, capability, driver, why):
    gpu(archs, capability, driver)
    impl, reason = choose("residual_norm", "auto", "cuda", torch.float32)
    assert impl == "reference" and why in reason
    with pytest.raises(RuntimeError, match="residual_norm: impl=cuda: "):
        choose("residual_norm", "cuda", "cuda", torch.float32)


def test_auto_takes_kernels_with_code_for_the_gpu_and_doctor_shows_both(gpu, monkeypatch):
    monkeypatch.setattr(doctor, "_operators", lambda: [])
    gpu("sm_80 sm_90a compute_90", (12, 0))
    assert choose("residual_norm", "auto", "cuda", torch.float32).impl == "cuda"
    rows = dict(doctor.rows())
    assert rows["GPU"].startswith("1 x Some GPU (sm_120)")
    assert rows["extension"].startswith("CPU and CUDA (sm_80 sm_90a compute_90)")
    assert rows["CUDA kernels"] == "have code for this GPU"
    gpu("sm_80", (12, 0))
    assert "CUDA code for sm_80, and this GPU is sm_120" in dict(doctor.rows())["CUDA kernels"]
