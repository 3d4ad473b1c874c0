"""Optimisers: `muon`, and AdamW beside it in the `groups` of a model's parameters.

A step runs torch's optimisers or the kernels of `fused`. `layout` deals the matrices out to ranks,
`exchange` sends gradients and weights between them. `schedule` gives the rates by the share of the
run, and `averaging` averages weights (EMA, SWA).
"""

from pgolf.optim.muon import Muon

__all__ = ["Muon"]
