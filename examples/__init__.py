"""Short scripts that show one thing each; tests run them."""
