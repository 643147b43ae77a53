"""Parts of training programs: schedules, averages, watchdogs, logs, validation."""
