"""What a run can do without: cache.py keeps the encoder's Z, dry_run.py plans memory and FLOPs."""
