"""In: a model or a graph, and a `Plan`. Out: the same model or a new graph with the layers in place, and how to undo it."""
