"""In place of pgolf.ops.product: a script multiplies where it has something to multiply."""


class Product:
    """There is none."""


def handed_on(operator, branch, x, linear):
    """The branch as it is."""
    return branch, None
