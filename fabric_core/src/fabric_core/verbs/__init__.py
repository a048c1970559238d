"""The verbs of a ``Fabric``, in groups. `fabric_core.fabric.Fabric` is all of them together."""
