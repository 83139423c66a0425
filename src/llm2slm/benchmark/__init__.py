"""Speed: measured beside what else one might use, and estimated before there are weights."""
