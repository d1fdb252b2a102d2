"""Learning rates as numbers: schedules, exposure, bounds. No torch."""
