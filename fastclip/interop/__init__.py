"""Calls that other packages' users know, over the rooms below."""
