"""In place of pgolf.optim.fused, which runs kernels that only the compiled half has."""

OPERATORS = ()
FusedStep = None
