"""What the six scripts share. Nothing here imports a script, and nothing imports in a circle."""
