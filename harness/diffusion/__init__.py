"""Schedules, conditions, keyed noise, and a network seen through them."""
