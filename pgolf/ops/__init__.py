"""Operators: one file each, with the formula, its source, the pure torch reference and the table
of implementations. The functions named here work alone: `from pgolf.ops import xsa`.
"""

from pgolf.ops.attention import attention
from pgolf.ops.embed_smear import embed_smear
from pgolf.ops.grad_norm import grad_norm
from pgolf.ops.leaky_relu2_mlp import leaky_relu2_mlp
from pgolf.ops.linear_mix import linear_mix
from pgolf.ops.linear_qk_rope import linear_qk_rope
from pgolf.ops.linear_residual import linear_residual
from pgolf.ops.muon_momentum import muon_momentum
from pgolf.ops.newton_schulz import newton_schulz, newton_schulz_all
from pgolf.ops.norm_mlp import norm_mlp
from pgolf.ops.param_update import param_update
from pgolf.ops.part_sums import part_sums
from pgolf.ops.qk_rope import qk_rope
from pgolf.ops.residual_norm import residual_norm, rms_norm
from pgolf.ops.scaled_copies import scaled_copies
from pgolf.ops.softcap_cross_entropy import softcap_cross_entropy
from pgolf.ops.weight_cast import fake_quant, fake_quant_all, weight_cast, weight_cast_all
from pgolf.ops.xsa import xsa
from pgolf.ops.xsa_linear import xsa_linear

__all__ = [
    "attention",
    "embed_smear",
    "fake_quant",
    "fake_quant_all",
    "grad_norm",
    "leaky_relu2_mlp",
    "linear_mix",
    "linear_qk_rope",
    "linear_residual",
    "muon_momentum",
    "newton_schulz",
    "newton_schulz_all",
    "norm_mlp",
    "param_update",
    "part_sums",
    "qk_rope",
    "residual_norm",
    "rms_norm",
    "scaled_copies",
    "softcap_cross_entropy",
    "weight_cast",
    "weight_cast_all",
    "xsa",
    "xsa_linear",
]
