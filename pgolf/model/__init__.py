"""The Parameter Golf transformer: `gpt`, made of `layers`, with the weights of `init`.

`decode` generates text with key/value caches, `frozen` copies a model for passes that train
nothing, `public_names` takes the checkpoints of the contest's public scripts.
"""

from pgolf.model.gpt import GPT

__all__ = ["GPT"]
