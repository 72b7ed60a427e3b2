"""Tables, pages and pictures from records, and checks of them."""
