"""`karat export`: write a trained model for other tools. One module per format; each holds the same metadata."""
