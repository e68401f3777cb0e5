"""`karat ledger`: the paper's rows, our runs beside them, and the page that shows both."""
