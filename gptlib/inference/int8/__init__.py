"""The product with 8-bit weights that a C++ compiler makes on the spot."""
