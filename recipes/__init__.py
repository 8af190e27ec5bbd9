"""Recipes: their schema, their reader, and the gallery of ready-made recipes. YAML, mappings or names in, `Recipe` out."""
