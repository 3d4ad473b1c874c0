"""Text to tokens: shards, loaders, tokenizers, the embedded corpus and the contest's download.

Importing this package loads none of its modules.
"""
