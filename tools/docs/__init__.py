"""What the site is made of: `make docs`."""
