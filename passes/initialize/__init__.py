"""In: new layers, and inputs of the model. Out: the layers' scales and queries set, and the rms of stream, MLP and layer."""
