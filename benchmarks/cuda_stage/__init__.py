"""How near a stage on a CUDA device comes to the device's limits."""
