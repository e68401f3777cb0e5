"""The commands of `karat`, by what they are for: their options, and the calls behind them."""
