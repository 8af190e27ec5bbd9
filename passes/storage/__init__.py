"""In: a rewritten model, or a path. Out: a saved directory, or a model with example inputs. Reads and writes models on disk."""
