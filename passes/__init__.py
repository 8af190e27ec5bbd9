"""The verbs, one a file: capture, normalize, locate, select, substitute, verify, checkpoint."""
