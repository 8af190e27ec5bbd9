"""In: a recorded graph and the names of its weights. Out: its canonical graph, every product with a weight an `aten.linear`."""
