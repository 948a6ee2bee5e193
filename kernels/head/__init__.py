"""The language-model head: losses and log-probs that never hold all logits."""
