"""The reports of a run: lines and bars, figures, histograms, traces."""
