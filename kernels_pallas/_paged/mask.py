"""The mask with which a query names the slots that it sees beyond its limit."""

MASK_BITS = 32
"""Bits of a mask, and so slots from `tree_start` on that it can name; masks are uint32."""
