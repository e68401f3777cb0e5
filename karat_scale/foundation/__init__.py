"""The base of all other packages: errors, files, the console, the machine, tables of parts, stores."""
