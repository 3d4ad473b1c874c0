"""The artifact: one bounded file with the quantised model.

`header` and `layout` say what is in it, `pack` writes it, `container` reads it, `load` makes a
model of it, `verify` lists it.
"""
