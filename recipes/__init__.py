"""What one may wish: the recipe's schema, its reader and the gallery."""
