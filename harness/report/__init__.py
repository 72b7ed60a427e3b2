"""Tables and pictures from records. Floor 8: may import floors 0 to 7."""
