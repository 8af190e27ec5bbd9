"""In: a config, a Python file or an archive. Out: the model that it describes; nothing in it runs without consent."""
