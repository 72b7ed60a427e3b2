"""What a person types and sees, a file a command."""
