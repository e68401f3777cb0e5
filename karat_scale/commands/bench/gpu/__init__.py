"""`karat bench gpu`: checks and measures a card in one call, a process a section.

`command` starts a `worker` process for each of the `sections` in turn and writes what it reports. So one process at a
time holds the card (which exclusive compute mode asks for), and a crash of a kernel ends its own section only.
"""
