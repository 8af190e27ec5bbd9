"""In: located sites and a name. Out: why it is or is not an MLP, and the model as a tree of modules."""
