"""`karat export`: a trained model as others read it. One module a format; each holds the same facts of the model."""
