"""Routing, and the experts' GEMMs."""
