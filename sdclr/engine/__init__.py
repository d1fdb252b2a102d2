"""What a run is made of: plan, parts, loop, validation, checkpoints."""
