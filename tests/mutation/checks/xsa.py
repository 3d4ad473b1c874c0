"""What mutants of XSA have to get past."""

import math

import torch

BF16, FP32 = torch.bfloat16, torch.float32


def xsa_in_general() -> None:
    from tests.triton import test_xsa as t

    t.check(*t.as_attention_gives(2, 7, 6, 2, 20, FP32))
    t.check(*t.as_attention_gives(1, 17, 4, 4, 64, BF16))


def xsa_at_the_edges() -> None:
    from tests.triton import test_xsa as t

    t.test_strides((1, 0, 2, 3), FP32)
    t.test_touched_bytes_are_inputs_and_outputs(FP32)
    for norm in (0.0, 0.999e-12, 1.001e-12):
        t.test_norms_of_v(norm, FP32)
    for up in (False, True):
        t.test_the_two_float32_norms_around_the_floor(up)
    for which in range(3):
        t.test_what_is_not_finite_stays_in_its_group(which, math.nan, FP32)


XSA = [xsa_in_general, xsa_at_the_edges]
CHECKS = {
    "xsa_forward_kernel": XSA,
    "xsa_backward_kernel": XSA,
}
