"""Devices, processes and chips."""
