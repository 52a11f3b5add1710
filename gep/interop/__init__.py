"""Weights of other releases into GEP's folders, and models out of them for other runtimes."""
