"""The Parameter Golf transformer: `gpt`, made of `layers`, with the weights of `init`.

`decode` generates text with key/value caches, `frozen` copies a model for passes without training,
`public_names` reads the checkpoints of the contest's public scripts.
"""

from pgolf.model.gpt import GPT

__all__ = ["GPT"]
