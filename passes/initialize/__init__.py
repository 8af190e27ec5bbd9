"""In: new layers, and one forward of the model. Out: the layers' scales set, and the rms of stream, MLP and layer."""
