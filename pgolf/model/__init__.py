"""The Parameter Golf transformer, in the form that `ops=reference` means: short and obvious."""

from pgolf.model.gpt import GPT

__all__ = ["GPT"]
