"""Training: the run's session and folder, the loop, and what follows it up to the score."""
