"""In: parsed JSON of graphs.json. Out: graphs that are made of allowed functions and plain values only; or why not."""
