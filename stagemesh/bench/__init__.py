"""Measures a server as its clients see it: loads, clients, what came back, and reports of it.

`stagemesh bench` is the command; `benchmarks/` uses the same parts.
"""
