"""Networks; they know no noise schedule."""
