"""In: the graphs that `torch.compile` creates. Out: the same graphs with memory layers, for the next backend."""
