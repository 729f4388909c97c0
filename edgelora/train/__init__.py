"""Fine-tuning: W' = W + (alpha / r) B A on a frozen base."""
