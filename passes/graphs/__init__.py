"""Questions about one fx graph: in, nodes; out, op kinds, shapes, module stacks, source lines, what comes from weights."""
