"""The counting device: a stand-in for an H100 that logs every launch and runs none.

`device/` is the stand-in itself, C that is loaded before CUDA's libraries. `build` compiles it and
makes the environment of a process that sees it; `extension` builds pgolf's CUDA kernels for it.
`worker` is that process: it runs a model and writes its launches, and `turn` runs turns of the
training loop. `launches`, `inductor`, `eager`, `compiled` and `attention` turn the log into counts
and bytes; `replay` compares a replayed step with the eager one.

It can prove which kernels the host starts, how often, on what, and how much memory torch asks for.
It cannot show values (they are garbage) or times (there are none).
"""
