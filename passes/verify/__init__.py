"""In: the model before and after a rewrite. Out: named checks, each with an outcome, a number and a sentence."""
