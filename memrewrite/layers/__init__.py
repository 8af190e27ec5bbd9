"""The layers that can replace an MLP, one kind per file; `kinds` lists them."""
