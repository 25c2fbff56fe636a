"""Plan -> the configuration of another trainer: pure functions of the plan. What the trainer cannot express is said."""
