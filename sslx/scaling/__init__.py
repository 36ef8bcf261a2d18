"""Scaling laws: points of finished runs, forms of laws, fits with intervals that were checked against back-tests."""
