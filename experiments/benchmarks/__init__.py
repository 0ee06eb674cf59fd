"""Timed comparisons with peers and with what the matrix products alone take."""
