"""The ground: the operators, their meaning and their kernels. Importing this package registers nothing."""
