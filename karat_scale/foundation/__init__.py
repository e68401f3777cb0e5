"""What all other packages use: errors, files, the console, the machine, tables of parts, stores."""
