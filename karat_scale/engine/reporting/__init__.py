"""What a run says of itself: lines and bars, figures, histograms, traces."""
