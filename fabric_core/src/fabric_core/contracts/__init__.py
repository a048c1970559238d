"""The contracts: what an accelerator, a strategy, a precision and every other part promises, one file per kind.

Each method says when it is called and on which ranks. What has a default may be left out, so that a new method
never breaks an old plugin.
"""
