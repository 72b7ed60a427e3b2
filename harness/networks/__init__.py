"""Networks, without any notion of a noise schedule. Floor 1: may import floor 0."""
