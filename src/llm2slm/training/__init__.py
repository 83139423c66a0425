"""Training: options, what it starts from, the trainer, and the folder it leaves."""
