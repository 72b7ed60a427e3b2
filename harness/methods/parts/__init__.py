"""What several methods share; nothing here is registered."""
