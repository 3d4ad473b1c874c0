"""For each kernel, the checks that its mutants have to get past, from quick to thorough.

They are those of tests/triton, on the few inputs that tell most, in a file for each module of
triton_kernels: a proof depends on its own. Kernels are imported inside of them, since each mutant
has a process of its own.
"""
