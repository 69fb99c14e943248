"""Draws pictures of views, attention, neighbours and features."""
