"""The real scheduling core before pretended stages, in virtual time: the same on every machine."""
