"""The layers that may take an MLP's place, one kind a file; `kinds` lists them."""
