"""What stands below the method: settings, files, loading, ranks, and what only makes it fast."""
