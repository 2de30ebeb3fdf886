"""Kernel configurations: defaults per GPU family, their look-up, and (coming) the tuner."""
