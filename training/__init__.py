"""What any run needs: settings, files, loading, adapter, ranks, checks, the run directory."""
