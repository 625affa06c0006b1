"""What attention over paged caches shares: `mla_attention` and `gqa_attention` are thin beside it."""
