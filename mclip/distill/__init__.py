"""Training students: planning runs, their pairs and targets, the trainer and its loss."""
