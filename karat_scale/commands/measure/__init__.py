"""The measurements of `karat bench`, `karat doctor` and `karat plan`, each in one place."""
