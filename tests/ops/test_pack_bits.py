"""pack_bits: the reference against Python's integers, and every implementation against it.

The CUDA kernel's source runs on the CPU here, in the emulator of tests/simt: this shows that its
indexing is right, and is no run on a GPU; the test marked gpu is.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgolf import extension
from pgolf.ops import pack_bits as op

GUARD = 64  # bytes on either side of a buffer that a kernel must not touch
# Empty, around one group of eight, around the 256 threads x 8 codes of a CUDA block, and ragged.
COUNTS = (0, 1, 7, 8, 9, 15, 16, 2047, 2048, 2049, 6151)
every_size = pytest.mark.parametrize("count", COUNTS)
every_width = pytest.mark.parametrize("bits", range(op.MIN_BITS, op.MAX_BITS + 1))


def random_codes(count: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count * 16 + bits)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (count,), dtype=torch.int8, generator=generator)
    codes[:2] = torch.tensor([-half, half - 1], dtype=torch.int8)[:count]
    return codes


def truth(codes: list[int], bits: int) -> bytes:
    """The format in one line of integers: code i is the bits [ik, (i+1)k) of a number."""
    number = sum((code & ((1 << bits) - 1)) << (i * bits) for i, code in enumerate(codes))
    return number.to_bytes((len(codes) * bits + 7) // 8, "little")


@pytest.fixture(params=["reference", "extension"])
def implementation(request, monkeypatch):
    """Run a test with and without the extension."""
    if request.param == "reference":
        monkeypatch.setattr(extension, "load", lambda: None)
    elif extension.load() is None:
        pytest.skip(extension.why_missing())


@st.composite
def codes_and_bits(draw):
    bits = draw(st.integers(op.MIN_BITS, op.MAX_BITS))
    half = 1 << (bits - 1)
    return draw(st.lists(st.integers(-half, half - 1), max_size=70)), bits


@given(codes_and_bits())
def test_reference_is_the_format(example):
    codes, bits = example
    packed = op.reference_pack(torch.tensor(codes, dtype=torch.int8), bits)
    assert packed.numpy().tobytes() == truth(codes, bits)
    assert op.reference_unpack(packed, bits, len(codes)).tolist() == codes


@every_size
@every_width
@pytest.mark.usefixtures("implementation")
def test_round_trip(count, bits):
    codes = random_codes(count, bits)
    packed = op.pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (op.packed_bytes(count, bits),)
    assert torch.equal(packed, op.reference_pack(codes, bits))
    assert torch.equal(op.unpack_bits(packed, bits, count), codes)


@pytest.mark.usefixtures("implementation")
def test_any_layout():
    codes = random_codes(60, 6).view(12, 5)
    for strided in (codes.t(), codes[::2], codes[:, 1:4], codes[:1].expand(3, 5)):
        assert torch.equal(op.pack_bits(strided, 6), op.pack_bits(strided.clone().flatten(), 6))
    packed = op.pack_bits(codes, 6)
    strided = torch.stack([packed, packed], 1)[:, 0]
    assert torch.equal(op.unpack_bits(strided, 6, 60), codes.flatten())


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("code", "bits"), [(8, 4), (-9, 4), (32, 6), (-33, 6), (127, 7)])
def test_a_code_that_does_not_fit_is_named(code, bits):
    codes = torch.tensor([0, 1, code, 3], dtype=torch.int8)
    with pytest.raises(ValueError, match=f"code {code} at position 2 does not fit {bits} bits"):
        op.pack_bits(codes, bits)


@pytest.mark.usefixtures("implementation")
def test_wrong_arguments_are_refused():
    codes, packed = random_codes(9, 5), op.pack_bits(random_codes(9, 5), 5)
    for bits in (3, 9, 0, -4):
        with pytest.raises(ValueError, match=f"bits is {bits}"):
            op.pack_bits(codes, bits)
        with pytest.raises(ValueError, match=f"bits is {bits}"):
            op.unpack_bits(packed, bits, 9)
    with pytest.raises(TypeError, match="torch.int32"):
        op.pack_bits(codes.int(), 5)
    with pytest.raises(TypeError, match="torch.int8"):
        op.unpack_bits(packed.view(torch.int8), 5, 9)
    for wrong in (packed[:-1], torch.cat([packed, packed[:1]]), packed[:0]):
        with pytest.raises(ValueError, match=f"do not take {wrong.numel()} bytes but 6"):
            op.unpack_bits(wrong, 5, 9)
    with pytest.raises(ValueError, match="count is negative"):
        op.unpack_bits(packed[:0], 5, -1)
    with pytest.raises(ValueError, match="on meta"):
        op.pack_bits(torch.empty(8, dtype=torch.int8, device="meta"), 5)


# ---- kernels by pointer: pack(codes, count, packed, bytes, bits), unpack likewise


@pytest.fixture(scope="module")
def extension_kernels():
    module = extension.load()
    if module is None:
        pytest.skip(extension.why_missing())
    return module.pack_bits, module.unpack_bits


@pytest.fixture(scope="module")
def emulated_kernels():
    """csrc/cuda/pack_bits.cu on the CPU."""
    if not extension.emulates_cuda():
        pytest.skip("CUDA kernels are not emulated here: there is a GPU, or no C++ compiler")
    module = extension.cuda()

    def pack(*arguments):
        module.pack_bits_cuda(*arguments, 0)

    def unpack(*arguments):
        module.unpack_bits_cuda(*arguments, 0)

    return pack, unpack


def guarded(content: torch.Tensor, fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(a buffer of `fill` with guards around it, the view without them that holds `content`)."""
    buffer = torch.full((content.numel() + 2 * GUARD,), fill, dtype=torch.uint8)
    inside = buffer[GUARD : GUARD + content.numel()]
    inside.copy_(content.view(torch.uint8))
    return buffer, inside


def check_kernels(kernels, count: int, bits: int) -> None:
    """Results and untouched surroundings, with two different contents of the surroundings."""
    pack, unpack = kernels
    codes = random_codes(count, bits)
    packed = op.reference_pack(codes, bits)
    for fill in (0x00, 0xA5):
        expected, _ = guarded(packed, fill)
        _, source = guarded(codes, fill)
        result, target = guarded(torch.full_like(packed, fill), fill)
        pack(source.data_ptr(), count, target.data_ptr(), target.numel(), bits)
        assert torch.equal(result, expected)

        expected, _ = guarded(codes, fill)
        _, source = guarded(packed, fill)
        result, target = guarded(torch.full_like(codes, 0), fill)
        unpack(source.data_ptr(), source.numel(), target.data_ptr(), count, bits)
        assert torch.equal(result, expected)


@every_size
@every_width
def test_extension_by_pointer(extension_kernels, count, bits):
    check_kernels(extension_kernels, count, bits)


@every_size
@every_width
def test_emulated_kernels_by_pointer(emulated_kernels, count, bits):
    check_kernels(emulated_kernels, count, bits)


def test_extension_refuses_what_would_overrun(extension_kernels):
    codes, packed = random_codes(9, 5), torch.zeros(6, dtype=torch.uint8)
    c, p = codes.data_ptr(), packed.data_ptr()
    pack, unpack = extension_kernels
    for count, size, bits, message in (
        (9, 5, 5, "9 codes of 5 bits take 6 bytes, not 5"),
        (9, 7, 5, "take 6 bytes, not 7"),
        (10, 6, 5, "10 codes of 5 bits take 7 bytes"),
        (-1, 6, 5, "count is -1"),
        (9, 6, 3, "bits is 3"),
        (9, 6, 9, "bits is 9"),
        (2**63 - 1, 6, 8, f"take {2**63 - 1} bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(c, count, p, size, bits)
        with pytest.raises(ValueError, match=message):
            unpack(p, size, c, count, bits)
    for null in ((0, p), (c, 0)):
        with pytest.raises(ValueError, match="null pointer"):
            pack(null[0], 9, null[1], 6, 5)
    with pytest.raises(TypeError):
        pack(-c, 9, p, 6, 5)
    assert packed.tolist() == [0] * 6


@pytest.mark.gpu
@every_size
@every_width
def test_cuda(count, bits):
    module = extension.load()
    if module is None or not module.build_info()["cuda"] or not torch.cuda.is_available():
        pytest.skip("needs a GPU and an extension with CUDA kernels")
    codes = random_codes(count, bits).cuda()
    packed = torch.empty(op.packed_bytes(count, bits), dtype=torch.uint8, device="cuda")
    back = torch.empty_like(codes)
    stream = torch.cuda.current_stream().cuda_stream
    module.pack_bits_cuda(
        codes.data_ptr(), count, packed.data_ptr(), packed.numel(), bits, stream
    )
    module.unpack_bits_cuda(
        packed.data_ptr(), packed.numel(), back.data_ptr(), count, bits, stream
    )
    assert torch.equal(packed.cpu(), op.reference_pack(codes.cpu(), bits))
    assert torch.equal(back, codes)
