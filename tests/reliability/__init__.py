"""Tries to break every command: corrupted and malicious inputs, failing system calls, kills, two processes at once.

The machinery here knows the program as a black box that is given command lines. The tests beside it run a little of
everything in seconds; ``benchmarks/bench_reliability.py`` runs as much of it as one likes.
"""
