"""The parsers of all commands, by what they are about."""
