"""In place of pgolf.ops.product: a script multiplies where it has something to multiply."""

handed_on = None  # nobody has a product to hand on


class Product:
    """There is none."""
