"""What strategies share whose parameters lie in shards: any module with ``DTensor`` parameters will do."""
