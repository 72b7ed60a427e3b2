"""Noise schedules, conditions, keyed randomness, denoisers and counting."""
