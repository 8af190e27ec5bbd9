"""In: layers at their start, and inputs of the model. Out: the layers' scales and queries set, and what was measured."""
