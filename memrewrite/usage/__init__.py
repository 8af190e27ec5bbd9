"""Which slots of a memory are read: counters, the numbers that follow from them, a plot, and a callback for training."""
