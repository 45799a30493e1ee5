"""Where bytes lie: the only modules that open, list or stat a path for reading."""
