"""The counting device: a stand-in for an H100 that logs every launch and runs none.

`device/` is the stand-in itself, C that is loaded before CUDA's libraries; `build` compiles it and
gives the environment of a process that sees it, `extension` pgolf's CUDA kernels for it. `worker`
is that process: it runs a model and writes what was launched. `launches`, `inductor`, `eager` and
`compiled` turn that into counts and bytes.

What it can prove: which kernels the host starts, how often, on what, and how much memory torch
asks for. What it can't: values (they are garbage) and times (there are none).
"""
