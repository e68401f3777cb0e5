"""`karat compare`: runs over seeds, with the spread of each group and only those differences that the runs support."""
