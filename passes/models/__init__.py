"""In: a live module and its example inputs. Out: outputs, recorded calls, block stacks, fingerprints of its tensors."""
