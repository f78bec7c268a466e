"""Rationals in other people's models, and FlashKATs in other libraries."""
