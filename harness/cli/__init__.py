"""The command line, one file a command; a file is imported when its command is used."""
