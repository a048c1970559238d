"""A plugin of version 1 of every contract. It is never changed: it stands for those that nobody maintains any more."""
