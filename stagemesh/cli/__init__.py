"""The `stagemesh` command. Knows the services by the modules that run them, and nothing in them."""
