"""Hostile files: every attack is an ArtifactError that says what is wrong, in bounded memory.

Most attacks are sealed with a right checksum: an attacker can compute it too.
"""

import json
import os
import random
import struct

import numpy as np
import pytest
import torch

from pgolf.artifact.container import DIGEST_BYTES, HEAD, MAX_DECODED, MAX_HEADER, read_artifact
from pgolf.artifact.header import MAX_TENSORS
from pgolf.codecs import codec, rans_encode
from pgolf.errors import ArtifactError
from pgolf.quant.step_grid import step_values

ONE = ["a.weight", 6, [2, 3], 2, None, None]  # needs 6 bytes of codes and 2 steps
INDEXED = ["a.weight", 6, [2, 3], 2, -50, 0]  # 6 bytes of codes and 2 of indices
FACTORS = [[3, 5]]  # 3 bytes of indices
HALVES = np.array([1, 1], "<f2").view(np.uint8).reshape(2, 2).T.tobytes()  # two steps of 1
ONE_DATA = bytes(6) + HALVES


def halves(*values: float) -> bytes:
    """fp16 numbers as the body holds them: low bytes, then high bytes."""
    return np.array(values, "<f2").view(np.uint8).reshape(-1, 2).T.tobytes()


def streamed(*matrices: np.ndarray) -> bytes:
    """What rans makes of matrices of the group of ONE."""
    return rans_encode.compress(matrices, [2] * len(matrices))


CODES = np.array([[3, -20, 1], [0, 15, -1]], np.int8)
STREAM = streamed(CODES)


def refuse(data: bytes) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_artifact(data)
    return str(caught.value)


# name -> (file, part of the message)
ATTACKS = {
    "empty file": lambda f: (b"", "too few"),
    "one byte": lambda f: (b"P", "too few"),
    "head only": lambda f: (f.seal(b"", 0), "not a zstd frame"),
    "other file type": lambda f: (b"PK\3\4" + bytes(100), "PGOLF"),
    "pickle": lambda f: (b"\x80\x04cos\nsystem\n" + bytes(40), "PGOLF"),
    "next version": lambda f: (f.seal(b"", 0, version=3), "version 3"),
    "version 1": lambda f: (f.seal(b"", 0, version=1), "version 1"),
    "version 0": lambda f: (f.seal(b"", 0, version=0), "version 0"),
    "unknown codec": lambda f: (f.seal(b"", 0, codec_id=77), "codec 77"),
    "declares 4 GiB": lambda f: (f.seal(b"x", 2**32 - 1), "declares 4294967295"),
    "declares the limit and more": lambda f: (f.seal(bytes(99), MAX_DECODED + 1), "too many"),
    "declares more than its size allows": lambda f: (f.seal(bytes(99), 100 << 20), "too many"),
    "empty body": lambda f: (f.body(b""), "header of"),
    "body of three bytes": lambda f: (f.body(b"\0\0\0"), "header of"),
    "header longer than the body": lambda f: (f.body(b"\xff\0\0\0{}"), "header of 255"),
    "header of 4 GiB": lambda f: (f.body(b"\xff\xff\xff\xff{}"), "header of 4294967295"),
    "header over its limit": lambda f: (f.header(b" " * (MAX_HEADER + 1)), "header of"),
    "no header": lambda f: (f.header(b""), "not UTF-8 JSON"),
    "header is not JSON": lambda f: (f.header(b"{'meta': 1}"), "not UTF-8 JSON"),
    "header is not UTF-8": lambda f: (f.header(b'{"\xff": 1}'), "not UTF-8 JSON"),
    "header is UTF-16": lambda f: (f.header("{}".encode("utf-16")), "not UTF-8 JSON"),
    "header has a lone surrogate": lambda f: (
        f.table(["\ud800.weight", *ONE[1:]], data=ONE_DATA), "not a tensor name"),
    "header nests deeply": lambda f: (f.header(b"[" * 500_000), "not UTF-8 JSON"),
    "header with an endless number": lambda f: (f.header(b"9" * 100_000), "header"),
    "header with NaN": lambda f: (
        f.header(b'{"meta":{"x":NaN},"packing":"bytes","tensors":[],"columns":[]}'), "NaN"),
    "header with an infinite number": lambda f: (
        f.header(b'{"meta":{"x":[1e999]},"packing":"bytes","tensors":[],"columns":[]}'), "1e999"),
    "header with a number of minus infinity": lambda f: (
        f.header(b'{"meta":{"x":-9.9e400},"packing":"bytes","tensors":[],"columns":[]}'),
        "not UTF-8 JSON"),
    "header is a list": lambda f: (f.header([]), "not an object"),
    "header without tensors": lambda f: (
        f.header({"meta": {}, "packing": "bytes", "columns": []}), "object of"),
    "header with one key more": lambda f: (
        f.header({"meta": {}, "packing": "bytes", "tensors": [], "columns": [], "x": 1}),
        "object of"),
    "meta is not an object": lambda f: (
        f.header({"meta": 3, "packing": "bytes", "tensors": [], "columns": []}), "meta is not"),
    "unknown packing": lambda f: (f.table(packing="base64"), "packing 'base64'"),
    "packing of an older version": lambda f: (
        f.table(packing="bits"), "packing 'bits': this version reads bytes and columns"),
    "packing is a list": lambda f: (f.table(packing=[]), "packing"),
    "table is an object": lambda f: (
        f.header({"meta": {}, "packing": "bytes", "tensors": {}, "columns": []}),
        "table of tensors"),
    "too many tensors": lambda f: (
        f.table(*([f"t{i}", 16, [0]] for i in range(MAX_TENSORS + 1))), "at most 4096"),
    "line is no list": lambda f: (f.table("a.weight"), "is not a line of 3 or 6"),
    "line is too short": lambda f: (f.table(["a.weight", 6]), "is not a line of 3 or 6"),
    "duplicate name": lambda f: (f.table(ONE, ONE, data=ONE_DATA * 2), "a.weight comes twice"),
    "name of another type": lambda f: (f.table([7, 16, [1]], data=b"\0\0"), "not a tensor name"),
    "empty name": lambda f: (f.table(["", 16, [1]], data=b"\0\0"), "not a tensor name"),
    "name that is a path": lambda f: (f.table(["../../etc/x", 16, [1]], data=b"\0\0"), "../etc"),
    "absolute path": lambda f: (f.table(["/etc/passwd", 16, [1]], data=b"\0\0"), "/etc/passwd"),
    "name with two dots": lambda f: (f.table(["a..b", 16, [1]], data=b"\0\0"), "a..b"),
    "name with a newline": lambda f: (f.table(["a\n", 16, [1]], data=b"\0\0"), "not a tensor"),
    "name in another alphabet": lambda f: (f.table(["а.weight", 16, [1]]), "not a tensor name"),
    "name with other digits": lambda f: (f.table(["a.٣", 16, [1]]), "not a tensor name"),
    "long name": lambda f: (f.table(["a" * 129, 16, [1]], data=b"\0\0"), "not a tensor name"),
    "bits 3": lambda f: (f.table(["a", 3, *ONE[2:]], data=ONE_DATA), "3 bits"),
    "bits 32": lambda f: (f.table(["a", 32, *ONE[2:]], data=bytes(24)), "32 bits"),
    "bits true": lambda f: (f.table(["a", True, *ONE[2:]], data=ONE_DATA), "True bits"),
    "bits 6.0": lambda f: (f.table(["a", 6.0, *ONE[2:]], data=ONE_DATA), "6.0 bits"),
    "bits a list": lambda f: (f.table(["a", [6], *ONE[2:]], data=ONE_DATA), "[6] bits"),
    "negative dim": lambda f: (f.table(["a", 16, [-1]]), "bad shape [-1]"),
    "two negative dims": lambda f: (
        f.table(["a", 6, [-2, -3], *ONE[3:]], data=ONE_DATA), "bad shape"),
    "dim that is a float": lambda f: (
        f.table(["a", 6, [2.0, 3], *ONE[3:]], data=ONE_DATA), "bad shape"),
    "dim that is a truth value": lambda f: (f.table(["a", 16, [True]], data=b"\0\0"), "bad shape"),
    "dims are text": lambda f: (f.table(["a", 16, "1"], data=b"\0\0"), "bad shape"),
    "product wraps to 6 in 64 bits": lambda f: (
        f.table(["a", 16, [2**32 + 3, 2**32 + 2]], data=bytes(12)), "bad shape"),
    "product over the limit": lambda f: (f.table(["a", 16, [2**20, 2**20]]), "bad shape"),
    "five dims": lambda f: (f.table(["a", 16, [1] * 5], data=b"\0\0"), "bad shape"),
    "codes in one dim": lambda f: (f.table(["a", 6, [6], *ONE[3:]], data=ONE_DATA), "bad shape"),
    "many large empty tensors": lambda f: (
        f.table(*([f"t{i}", 6, [2**29, 0], *ONE[3:]] for i in range(64))), "the table needs"),
    "data missing": lambda f: (f.table(ONE, data=ONE_DATA[:-1]), "needs 10 bytes of data, there"),
    "data left over": lambda f: (f.table(ONE, data=ONE_DATA + b"\0"), "there are 11"),
    "data without tensors": lambda f: (f.table(data=b"\0"), "needs 0 bytes of data"),
    "NaN step": lambda f: (f.table(ONE, data=bytes(6) + halves(1, np.nan)), "a.weight: a value"),
    "infinite step": lambda f: (f.table(ONE, data=bytes(6) + halves(np.inf, 1)), "not finite"),
    "infinite value": lambda f: (f.table(["b", 16, []], data=halves(-np.inf)), "b: a value"),
    "code above its bits": lambda f: (f.table(ONE, data=b"\x20" + bytes(5) + HALVES), "6 bits"),
    "code below its bits": lambda f: (f.table(ONE, data=b"\xdf" + bytes(5) + HALVES), "6 bits"),
    "zstd bomb": lambda f: (f.seal(codec("zstd").compress(bytes(2**28), 1), 1000), "1000 bytes"),
    "lzma bomb": lambda f: (f.seal(codec("lzma").compress(bytes(2**26), 0), 1000, 2), "more than"),
    "zstd body as lzma": lambda f: (f.seal(codec("zstd").compress(bytes(9), 1), 9, 2), "lzma"),
    "lzma body as zstd": lambda f: (f.seal(codec("lzma").compress(bytes(9), 1), 9, 1), "zstd"),
    "second zstd frame": lambda f: (f.seal(codec("zstd").compress(bytes(9), 1) * 2, 9), "unused"),
    "second lzma stream": lambda f: (
        f.seal(codec("lzma").compress(bytes(9), 1) * 2, 9, 2), "trailing"),
    "sealed trailing byte": lambda f: (f.seal(codec("zstd").compress(bytes(9), 1) + b"!", 9),
                                       "unused"),
    "bits 6 in a short line": lambda f: (f.table(ONE[:3], data=ONE_DATA), "6 bits in a line of 3"),
    "bits 16 in a long line": lambda f: (f.table(["a", 16, [1], 2, None, None]), "16 bits in a"),
    "weights over the limit together": lambda f: (
        f.table(*([f"t{i}", 16, [2**28]] for i in range(3))), "more than 536870912 weights"),
    "group of the steps": lambda f: (f.table([*ONE[:3], 0, None, None]), "bad group 0"),
    "group of the factors": lambda f: (f.table([*ONE[:3], 1, None, None]), "bad group 1"),
    "group over the limit": lambda f: (f.table([*ONE[:3], 64, None, None]), "bad group 64"),
    "group that is a truth value": lambda f: (f.table([*ONE[:3], True, None, None]), "group True"),
    "base of steps is text": lambda f: (f.table([*ONE[:4], "half", None]), "bad base of steps"),
    "base of steps over 16 bits": lambda f: (f.table([*ONE[:4], 2**15, None]), "base of steps 3"),
    "columns of nothing": lambda f: (f.table([*ONE[:4], None, 0]), "no column factors 0"),
    "negative columns": lambda f: (
        f.table([*ONE[:4], None, -1], columns=FACTORS), "no column factors -1"),
    "columns past the table": lambda f: (f.table(INDEXED, [*INDEXED[:5], 1], columns=FACTORS),
                                         "no column factors 1"),
    "columns that are a truth value": lambda f: (
        f.table([*ONE[:4], None, False], columns=FACTORS), "no column factors False"),
    "factors of another length": lambda f: (
        f.table(INDEXED, columns=[[4, 5]], data=bytes(12)), "4 factors for 3 columns"),
    "factors that no tensor has": lambda f: (
        f.table(ONE, columns=FACTORS, data=bytes(3) + ONE_DATA), "no tensor has"),
    "table of columns is an object": lambda f: (f.table(columns={}), "the table of columns"),
    "too many column factors": lambda f: (
        f.table(columns=[[0, None]] * (MAX_TENSORS + 1)), "at most 4096"),
    "line of columns is a number": lambda f: (f.table(columns=[3]), "3 is not [length, base]"),
    "line of columns is too long": lambda f: (f.table(columns=[[3, 5, 5]]), "is not [length"),
    "negative length of factors": lambda f: (f.table(columns=[[-3, 5]]), "is not [length"),
    "length of factors over the limit": lambda f: (f.table(columns=[[2**40, 5]]), "is not [len"),
    "base of factors is a float": lambda f: (f.table(columns=[[3, 5.0]]), "is not [length"),
    "index above the grid": lambda f: (
        f.table([*ONE[:4], 255, None], data=bytes(7) + b"\1"), "tensor a.weight: an index"),
    "index below the grid": lambda f: (
        f.table([*ONE[:4], -224, None], data=bytes(7) + b"\xff"), "tensor a.weight: an index"),
    "base far from the grid": lambda f: (
        f.table([*ONE[:4], -(2**15), None], data=bytes(8)), "tensor a.weight: an index"),
    "index of a factor off the grid": lambda f: (
        f.table(INDEXED, columns=[[3, 200]], data=bytes(8) + b"\x7f\0\0"), "column factors 0: an"),
    "NaN factor": lambda f: (
        f.table(INDEXED, columns=[[3, None]], data=bytes(8) + halves(1, np.nan, 1)),
        "column factors 0: a value or step is not finite"),
    "infinite factor": lambda f: (
        f.table(INDEXED, columns=[[3, None]], data=bytes(8) + halves(1, 1, np.inf)),
        "column factors 0: a value or step is not finite"),
    "packing is of the stream": lambda f: (f.table(packing="rans"), "packing 'rans'"),
    "codec 0": lambda f: (f.seal(b"", 0, 0), "unknown codec 0"),
    "stream without a body": lambda f: (f.seal(b"", 0, 4, STREAM), "lzma body ends early"),
    "body longer than the file": lambda f: (
        f.seal(b"abc", 9, length=4), "a body of 4 bytes in a file of 36"),
    "body of 4 GiB": lambda f: (f.seal(b"abc", 9, length=2**32 - 1), "a body of 4294967295"),
    "bytes behind the body": lambda f: (f.seal(b"abc", 9, stream=b"!"), "a body of 3 bytes"),
    "checksum of another file": lambda f: (
        swapped(f.table(), f.table(ONE, data=ONE_DATA)), "wrong checksum"),
    "brotli bomb": lambda f: (f.seal(codec("brotli").compress(bytes(2**26), 5), 1000, 3), "more"),
    "brotli window of 1 GiB": lambda f: (
        f.seal(b"\x11\x1e" + codec("brotli").compress(bytes(99), 5)[1:], 99, 3), "brotli"),
    "brotli body as zstd": lambda f: (f.seal(codec("brotli").compress(bytes(9), 1), 9, 1), "zstd"),
    "zstd body as brotli": lambda f: (f.seal(codec("zstd").compress(bytes(9), 1), 9, 3), "brotli"),
    "more codes than a stream may hold": lambda f: (
        f.table(["a.weight", 6, [2**14, 2**14], 2, 0, None], stream=b""), "declares 268451840 c"),
    "more steps than a stream may hold": lambda f: (
        f.table(["a.weight", 6, [2**29, 0], 2, 0, None], stream=b""), "declares 536870912 codes"),
    "more matrices than a stream may hold": lambda f: (
        f.table(*([f"t{i}", 6, [1, 1], 2, 0, None] for i in range(2000)), stream=bytes(30_000)),
        "declares 4000 codes, too many"),
    "more vectors than a stream may hold": lambda f: (
        f.table(["a", 6, [999, 999], 2, None, None], data=halves(*[1] * 999),
                stream=bytes(31_250)), "declares 998001 codes, too many"),
    "codes in body and stream": lambda f: (
        f.table(ONE, data=ONE_DATA, stream=STREAM), "needs 4 bytes of data, there are 10"),
    "empty stream": lambda f: (f.table(ONE, data=HALVES, stream=b""), "rans"),
    "stream without an end": lambda f: (f.table(ONE, data=HALVES, stream=STREAM[:-2]), "rans"),
    "half a word behind the stream": lambda f: (
        f.table(ONE, data=HALVES, stream=STREAM + b"!"), "rans"),
    "word behind the stream": lambda f: (
        f.table(ONE, data=HALVES, stream=STREAM + b"!!"), "rans"),
    "two streams": lambda f: (f.table(ONE, data=HALVES, stream=STREAM * 2), "rans"),
    "stream of another shape": lambda f: (
        f.table([*ONE[:2], [2, 4], *ONE[3:]], data=HALVES, stream=STREAM), "rans"),
    "stream of a matrix more": lambda f: (f.table(ONE, data=HALVES, stream=streamed(CODES, CODES)),
                                          "rans"),
    "model data of a stream out of range": lambda f: (
        f.table(ONE, data=HALVES, stream=b"\xff\xff\xff" + STREAM[3:]), "rans body is damaged"),
    "states of a stream below their least": lambda f: (
        f.table(ONE, data=HALVES, stream=STREAM[:3] + bytes(5) + STREAM[8:]), "rans"),
    "states of a stream of 2^40": lambda f: (
        f.table(ONE, data=HALVES, stream=STREAM[:3] + b"\xff" * 5 + STREAM[8:]), "rans"),
    "code above its bits in a stream": lambda f: (
        f.table(["a.weight", 4, *ONE[2:]], data=HALVES, stream=STREAM), "does not fit 4 bits"),
    "stream for a general codec": lambda f: (
        f.seal(codec("zstd").compress(b"", 1), 0, stream=STREAM), "a body of"),
    "second brotli stream": lambda f: (
        f.seal(codec("brotli").compress(bytes(9), 1) * 2, 9, 3), "brotli body is damaged"),
}


def swapped(file: bytes, other: bytes) -> bytes:
    """`file` with the checksum of `other`."""
    end = HEAD.size
    return file[: end - DIGEST_BYTES] + other[end - DIGEST_BYTES : end] + file[end:]


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack(forge, attack: str):
    data, message = ATTACKS[attack](forge)
    assert message in refuse(data)


def test_the_forger_can_make_valid_files(forge):
    """So the attacks fail for what is wrong with them and not for how they are made."""
    artifact = read_artifact(forge.table(ONE, ["b", 16, []], data=bytes(6) + halves(1, 1, 0.5)))
    assert artifact.tensors["a.weight"].shape == (2, 3)
    assert artifact.state_dict()["b"].item() == 0.5
    assert read_artifact(forge.table()).tensors == {}
    coded = read_artifact(forge.table(ONE, data=HALVES, stream=STREAM))
    assert coded.codec == "rans" and coded.tensors["a.weight"].data.tolist() == CODES.tolist()
    indexed = read_artifact(forge.table(INDEXED, columns=FACTORS, data=bytes(11)))
    q = indexed.tensors["a.weight"]
    assert q.steps.tolist() == [step_values(torch.tensor(-50)).item()] * 2
    assert q.columns.tolist() == [step_values(torch.tensor(5)).item()] * 3


def test_cut_short_anywhere(good):
    for end in [*range(HEAD.size + 8), *range(HEAD.size + 8, len(good), 97)]:
        assert "too few" in (message := refuse(good[:end])) or "checksum" in message


def test_trailing_byte(good):
    assert "checksum" in refuse(good + b"\0")


def test_every_flipped_bit_of_the_head(good):
    for bit in range(HEAD.size * 8):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        message = refuse(bytes(data))
        assert bit < 9 * 8 or "checksum" in message or "too many" in message


def test_flipped_bits_of_the_body(good):
    rng = random.Random(0)
    for _ in range(300):
        data = bytearray(good)
        data[rng.randrange(HEAD.size, len(good))] ^= 1 << rng.randrange(8)
        assert "checksum" in refuse(bytes(data))


def test_cut_short_at_every_section_inside_a_right_checksum(forge, good):
    body = bytes(codec("zstd").decompress(good[HEAD.size :], HEAD.unpack_from(good)[3]))
    header = 4 + struct.unpack_from("<I", body)[0]
    table = json.loads(body[4:header])["tensors"]
    codes = sum(line[2][0] * line[2][1] for line in table if line[1] != 16)
    for end in (0, 2, 4, header // 2, header - 1, header, header + 1, header + codes - 1,
                header + codes, header + codes + 1, len(body) - 1):
        refuse(forge.body(body[:end]))
    assert read_artifact(forge.body(body)).tensors


@pytest.mark.parametrize(
    ("name", "message"),
    [("folder", "Is a directory"), ("missing", "No such file"), ("pipe", "not a regular file"),
     ("nul\0", "cannot read"), ("loop", "cannot read"), ("huge", "the limit is")],
)
def test_paths_that_hold_no_file(tmp_path, name: str, message: str):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with open(tmp_path / "huge", "wb") as f:
        f.truncate(MAX_DECODED + 1)  # sparse: takes no space
    with pytest.raises(ArtifactError, match=message) as caught:
        read_artifact(tmp_path / name)
    assert str(tmp_path) in str(caught.value)


def test_errors_name_the_file(tmp_path, forge):
    (tmp_path / "x.pgolf").write_bytes(forge.table(["a", 3, [1, 1]]))
    with pytest.raises(ArtifactError, match=r"x\.pgolf: tensor a: 3 bits"):
        read_artifact(tmp_path / "x.pgolf")
