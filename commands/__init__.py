"""The commands, one file per group: each parses, calls one function and prints.

Data goes to stdout, messages to stderr. Nothing heavy is imported before a command needs it.
"""
