"""The state that must survive: saving, verifying, and loading on any number of ranks."""
