"""The configuration of another trainer -> a plan: what somebody runs today, priced. The way back from `autoplan.export`."""
