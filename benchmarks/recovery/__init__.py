"""Recovery, measured and worn down: how long a mesh takes to go on, and whether it always does."""
