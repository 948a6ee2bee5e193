"""What DeepSpeed's ZeRO keeps of a trained model, and where it is."""
