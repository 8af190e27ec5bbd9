"""In: a rewritten model, or a path. Out: a saved directory, or a model; everything that models on disk need."""
