"""In: a live module and its example inputs. Out: outputs, recorded calls, positions of blocks, hashes of its tensors."""
