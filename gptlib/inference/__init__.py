"""Logits to tokens to text."""
