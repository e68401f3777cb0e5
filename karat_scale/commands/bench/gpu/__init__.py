"""`karat bench gpu`: check and measure a card in one call, with a process for each section.

`command` starts a `worker` process for each of the `sections` in turn and writes what it reports. So one process at a
time holds the card (as exclusive compute mode requires), and a crash of a kernel ends only its own section.
"""
