"""What the commands share: errors, the console, plots."""
