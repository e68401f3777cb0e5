"""The fast implementations of the modular Fourier operator, each for one kind of device."""
