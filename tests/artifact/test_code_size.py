"""Size of code: exactly the given files, the same anywhere."""

import random
import shutil

from pgolf.artifact import code_size
from pgolf.artifact.code_size import code_bytes


def test_counts_each_file_once_in_any_order(tmp_path):
    for name, text in (("a.py", "x = 1\n" * 50), ("sub/b.py", "y = 2\n" * 70)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    files = [tmp_path / "a.py", tmp_path / "sub" / "b.py"]
    size = code_bytes(files)
    assert size == code_bytes([*reversed(files), tmp_path / "sub" / ".." / "a.py"])
    assert 0 < code_bytes(files[:1]) < size < 620, "compressed, and more files take more"
    assert code_bytes([]) == 0


def test_does_not_depend_on_where_the_files_are(tmp_path):
    (tmp_path / "p" / "q").mkdir(parents=True)
    (tmp_path / "p" / "a.py").write_text("x = 1\n")
    (tmp_path / "p" / "q" / "b.py").write_text("y = 1\n")
    copy = tmp_path / "another folder with a long name"
    shutil.copytree(tmp_path / "p", copy)
    names = ("a.py", "q/b.py")
    assert code_bytes(tmp_path / "p" / n for n in names) == code_bytes(copy / n for n in names)


def test_files_are_joined_in_the_order_of_their_names(tmp_path, monkeypatch):
    joined = []
    monkeypatch.setattr(code_size.lzma, "compress", lambda data, **_: joined.append(data) or b"")
    for i in range(9):
        (tmp_path / f"{i}.py").write_text(str(i) * i)
    code_bytes(tmp_path / f"{i}.py" for i in (3, 1, 4, 0, 5, 8, 2, 6, 7))
    assert joined == [b"".join(b"%d.py\n%d\n%s" % (i, i, b"%d" % i * i) for i in range(9))]


def test_content_and_names_both_count(tmp_path):
    """Moving bytes from a name or a file to the next can't go unnoticed."""
    def size(a: str, b: str) -> int:
        (tmp_path / "a").write_text(a)
        (tmp_path / "b").write_text(b)
        return code_bytes([tmp_path / "a", tmp_path / "b"])

    noise = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=2000))
    assert size(noise, "") > size(noise[:1000], "") + 300
