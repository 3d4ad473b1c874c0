"""In place of pgolf.ops.derivatives: a script takes no second derivative, and no autocast is on."""

ticket = rerouted = None


def once(operator, gradient):
    """As it is."""
    return gradient


def register_gradient(operator, forward, gradient, setup_context):
    """Give an opaque operator its gradient."""
    forward.register_autograd(gradient, setup_context=setup_context)


def register_no_gradient(operator, forward):
    """There is none."""


def factor_gradient(x, dx, factor):
    """The gradient of a factor of each row of x."""
    return (x.to(factor.dtype) * dx.to(factor.dtype)).sum(-1) / factor
