"""In: layers at their start, and one forward of the model. Out: the layers' scales set, and the rms of stream, MLP and layer."""
