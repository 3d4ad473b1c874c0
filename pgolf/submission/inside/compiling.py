"""In place of pgolf.training.compiling: a script compiles anew, slow as that is, and trains on."""

from contextlib import nullcontext

compiled_once = nullcontext
