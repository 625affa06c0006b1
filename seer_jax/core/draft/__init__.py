"""Drafting: suffix structures, draft trees."""
