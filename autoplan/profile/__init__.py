"""Find a HardwareProfile."""
