"""What any run needs: settings, files, loading, adapter, ranks, the run directory, the curve."""
