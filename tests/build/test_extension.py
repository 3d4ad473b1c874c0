"""Finding pgolf._C, or saying why it is not there; and the doctor, which reports it."""

import sys
import sysconfig
import warnings

import pytest

import pgolf
from pgolf import doctor, extension

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
    with pytest.raises(SystemExit):
        doctor.main(["now"])
    assert "unrecognized arguments: now" in capsys.readouterr().err
