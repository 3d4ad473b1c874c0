"""From trained weights to integer codes: which grid each tensor gets, its steps, pruning to fit.

`plan` says what is stored for each tensor. `calibration` chooses the text on which `hessians` sums
up the inputs of matrices and the gradients of their outputs. `quantize` follows the plan. If it
knows the Hessian of a tensor's inputs, it uses `gptq`, on a grid per row (`gptq_rows`) or on one
step per matrix with factors per column (`gptq_uniform`); otherwise `clip_search`. `safeguard`
rounds to nearest where GPTQ does worse on text that it has not seen. `step_grid` is the grid of all
steps, `budget` chooses steps to fill a budget, `prune` makes a model smaller until it fits, and
decoding needs only `dequantize`.
"""
