"""Running an experiment: processes, training loop, averages, schedules, command line."""
