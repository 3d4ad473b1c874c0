"""From trained weights to integer codes: which grid each tensor gets, its steps, pruning to fit.

`plan` says what is stored for each tensor. `calibration` chooses the text on which `hessians` sums
up what matrices read and what their outputs are worth. `quantize` follows the plan: by `gptq` where
the Hessian of a tensor's inputs is known, on a grid per row (`gptq_rows`) or on one step a matrix
with factors per column (`gptq_uniform`); by the clip search of `clip_search` where it is not.
`safeguard` takes rounding to nearest where GPTQ does worse on text that it has not seen.
`step_grid` is the grid that steps lie on, `budget` chooses them to fill a budget, `prune` makes a
model smaller until it fits, and `dequantize` is all that decoding needs.
"""
