"""The artifact: one bounded file with the quantised model.

`header` and `layout` say what is in it, `pack` writes and `container` reads it, `load` makes a model
of it, `verify` lists it.
"""
