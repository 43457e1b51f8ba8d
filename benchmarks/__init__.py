"""How fast the ops are beside everything else that is installed, and beside the machine's limits.

Run `python -m benchmarks` from the root of the repository; docs/benchmarks.md says how to read it.
"""
