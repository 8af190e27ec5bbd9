"""In: the graphs that `torch.compile` makes. Out: the same graphs with memory layers, for the backend that follows."""
