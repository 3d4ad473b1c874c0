"""For each kernel, the checks that its mutants have to get past: quick ones that see a lot."""

CHECKS = {}
