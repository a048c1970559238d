"""What fabric-xla registers with fabric-core: nothing yet.

The distribution's entry point names this module, so it is listed as a plugin without parts. A part is
registered here on the day that it works: a name that cannot be used is worse than one that is missing.
"""
