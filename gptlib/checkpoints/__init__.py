"""How a model and its training are saved, verified and loaded."""
