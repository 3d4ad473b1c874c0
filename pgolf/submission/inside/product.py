"""In place of pgolf.ops.product: a script multiplies where it has something to multiply."""

MULTIPLIED = (None, None, "")
handed_on = None  # nobody has a product to hand on


class Product:
    """There is none."""
