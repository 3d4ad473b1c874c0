"""Triton kernels and their launchers, installed as `pgolf.triton_kernels`; no policy in here."""

if __name__ != "pgolf.triton_kernels":
    raise ImportError(
        f"this is pgolf's folder of Triton kernels, imported as {__name__!r}: import it as "
        "pgolf.triton_kernels. The name triton_kernels belongs to another package; if that is the "
        "one you want, start Python outside of pgolf's checkout."
    )
