"""Read, make and describe training clips."""
