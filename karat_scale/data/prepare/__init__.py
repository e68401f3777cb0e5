"""Making data sets: the sources, and the scripts behind `karat prepare` and data_prep/."""
