"""Fine-tuning: LLaVA data to token ids and labels, transformers' Trainer, an ordinary checkpoint at the end."""
