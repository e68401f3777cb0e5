"""`karat ledger`: compare finished runs with the paper's tables, and write the page that shows both."""
