"""The operators, their reference formulas and their kernels. Importing this package registers nothing."""
