"""What every room stands on: files written whole, workers, progress bars, timing."""
