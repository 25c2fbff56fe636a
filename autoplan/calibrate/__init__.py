"""(Plan, HardwareProfile, measured steps) -> a HardwareProfile that would have predicted them."""
