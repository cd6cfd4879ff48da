"""fedsim: federated fine-tuning with real learning on simulated devices."""
