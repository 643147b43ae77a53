"""Run models on several processes: the mesh, sequence parallelism, checkpoints."""
