"""The artifact: one bounded file with the quantised model. `container` reads, `pack` writes."""
