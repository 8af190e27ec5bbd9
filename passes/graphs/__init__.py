"""In: nodes of one fx graph. Out: facts and values: op kinds, shapes, constants, module stacks, source lines."""
