"""How fast, measured: each module is a command that anyone can run."""
