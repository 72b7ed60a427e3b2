"""The commands, by subject: parse, call, print."""
