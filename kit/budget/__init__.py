"""Bytes as a budget: sensitivity, allocation, training under a rate."""
