"""What `karat bench`, `karat doctor` and `karat plan` measure, each in one place."""
