"""Optimisers: `muon`, and AdamW beside it in the `groups` of a model's parameters.

A step goes through torch's optimisers or through the kernels of `fused`. `schedule` says how much
of everything by the share of the run, and `averaging` follows the weights (EMA, SWA).
"""

from pgolf.optim.muon import Muon

__all__ = ["Muon"]
