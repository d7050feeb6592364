"""Sweeps over sampler settings: which settings are tried, who wins, and what speed costs."""
