"""A span of layers on a device: executes plans, decides nothing."""
