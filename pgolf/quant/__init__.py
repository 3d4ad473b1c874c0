"""From trained weights to integer codes: which grid each tensor gets, its clip, pruning to fit.

`policy` says what is stored for each tensor, `gptq_lite` finds the clips, `quantize` applies both,
`prune` makes a model smaller until it fits, `dequantize` is all that decoding needs. Full GPTQ
(with Hessians) belongs beside `gptq_lite`, and choosing clips or bits so that the file lands just
under the limit belongs beside `prune`: both end in the same `QuantizedTensor`.
"""
