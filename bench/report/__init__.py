"""Ledgers, and the tables and plots that are made of them. Needs a checkout."""
