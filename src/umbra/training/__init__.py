"""Training runs: trainers, `umbra train`, `umbra pretrain`, output folders and resuming."""
