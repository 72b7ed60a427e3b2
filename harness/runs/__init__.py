"""From a config to a record: settled configs, runs, their cost, work from outside."""
