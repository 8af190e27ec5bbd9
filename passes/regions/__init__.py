"""In: a canonical graph. Out: the regions that compute an MLP or a mixture of experts, or a `Rejection` with rule and node."""
