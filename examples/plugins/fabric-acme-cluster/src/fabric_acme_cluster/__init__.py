"""Jobs of Acme's scheduler as a plugin of fabric-core."""
