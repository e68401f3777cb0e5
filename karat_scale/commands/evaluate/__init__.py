"""What a trained classifier makes of whole sets of labelled images: its own validation split and other test sets."""
