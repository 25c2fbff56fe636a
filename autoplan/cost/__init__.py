"""What a plan costs: (Graph, HardwareProfile, Workload, strategies) -> seconds and bytes."""
