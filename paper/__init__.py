"""Finished runs beside the paper's tables, and the page that shows both: `python -m paper`, for developers."""
