"""Texts for a model: the tokenizer of its directory, and token ids in pieces that fit its context."""
