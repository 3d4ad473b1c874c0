"""What mutants of fake-quantisation have to get past."""

import math

import torch

from .tiles import small_tiles

BF16, FP32 = torch.bfloat16, torch.float32


def fake_quant_in_general() -> None:
    small_tiles("fake_quant", BLOCK=128)
    from tests.triton import test_fake_quant as t

    t.check(*t.weights(9, 70, FP32), bits=4, floor=1e-3)
    t.check(*t.weights(9, 130, FP32), bits=4, full=True)
    for multiple, full in t.GRIDS:
        t.check(*t.weights(3, 7, BF16), 5, 1.0, 0.0, multiple, full)
    t.test_off_changes_nothing(FP32)
    t.test_strided_rows(FP32)


def fake_quant_of_several_matrices() -> None:
    """One launch: other widths, strides, bits and scales, and rows longer than a block."""
    small_tiles("fake_quant", BLOCK=128)
    from pgolf.triton_kernels.fake_quant import fake_quant_all
    from tests.triton import test_fake_quant as t

    on = torch.tensor(1.0)
    for shapes in ([(3, 70), (5, 20), (2, 128)], [(3, 70), (1, 300), (4, 7)]):
        inputs = [t.weights(*shape, FP32, seed) for seed, shape in enumerate(shapes)]
        ws, clips = zip(*inputs, strict=True)
        bits = [torch.tensor(4.0 + i) for i in range(3)]
        with t.GuardZones() as zones:
            ws, clips, bits = ([zones.input(x) for x in some] for some in (ws, clips, bits))
            values, scales = fake_quant_all(ws, clips, bits, on, 0.0, 1, False, BF16, True)
        for i, (value, scale) in enumerate(zip(values, scales, strict=True)):
            wanted, step, _ = t.defined(ws[i], clips[i], 4 + i, 0.0, 1, False)
            assert t.same_bits(value, wanted.to(BF16)) and t.same_bits(scale, step)
        again, none = fake_quant_all(ws, clips, bits, on, 0.0, 1, False, BF16, False)
        assert none == [] and all(map(torch.equal, again, values))


def fake_quant_of_long_rows() -> None:
    from tests.triton import test_fake_quant as t

    t.check(*t.weights(2, 300, FP32), multiple=4)
    t.check(*t.weights(2, 300, FP32), on=0.0, multiple=4)


def fake_quant_at_the_edges() -> None:
    from tests.triton import test_fake_quant as t

    for multiple in (1, 4):
        t.test_ties_go_to_the_even_code(multiple)
    t.test_weights_far_beyond_the_clip(FP32)
    t.test_steps_that_fp16_holds_badly(FP32)
    t.test_zeros_keep_their_sign(FP32)
    t.test_what_is_not_finite_stays_in_its_row(FP32)
    for bits in (3.0, 9.0, 5.5, math.nan):
        t.test_unknown_bits_give_nan(bits, 70)
    t.test_touched_bytes_are_inputs_and_outputs(77, FP32)


FAKE_QUANT = [fake_quant_in_general, fake_quant_of_long_rows, fake_quant_at_the_edges]
CHECKS = {
    "fake_quant_forward_kernel": [*FAKE_QUANT, fake_quant_of_several_matrices],
    "fake_quant_backward_kernel": FAKE_QUANT,
}
