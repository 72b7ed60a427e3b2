"""Image sets and trajectories. Floor 3: may import floors 0 to 2."""
