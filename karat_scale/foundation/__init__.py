"""What every room stands on: errors, files, the console, the machine, tables of parts, stores."""
