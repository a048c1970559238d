"""The options of our parts, as users may give them, in modules that import nothing heavy."""
