"""Plan -> something to look at: pure functions of the plan."""
